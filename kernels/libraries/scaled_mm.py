"""The three products of a linear layer by torch's `scaled_mm`, which is cuBLAS's.

Shapes: M tokens (rows), N output features, K input features. `mat_a` lies along its rows and `mat_b` along its columns;
scales of 1x128 tiles have strides (1, rows); those of 128x128 blocks are [blocks of K, rounded up to a multiple of 4,
blocks of N] with the blocks of K next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import gemm
from kernels.gemm import result_dtype
from kernels.libraries.layout import padded_block_scale, padded_codes, padded_rows_of, round_up, tile_major_scale
from kernels.libraries.operands import dgrad_pair, fprop_pair, library_dtype, wgrad_pair
from kernels.libraries.requirements import check_shapes, cuda_version_problem, hopper_problem
from kernels.observe import Operand, report
from kernels.quantize import Quantized

__all__ = ["check_shapes", "dgrad", "fprop", "problem", "wgrad"]

LIBRARY = "torch.nn.functional.scaled_mm"
# cuBLAS needs rows in multiples of 8 and summed lengths in multiples of 16 bytes.
MULTIPLE = 16


def problem(device: torch.device) -> str | None:
    """Why `scaled_mm` cannot multiply our blocks on `device`; None when it can."""
    if not hasattr(F, "scaled_mm"):
        return f"{LIBRARY} needs torch 2.10 or newer; found {torch.__version__}"
    return hopper_problem(LIBRARY, device) or cuda_version_problem(LIBRARY)


def fprop(x: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.fprop`."""
    if isinstance(x, Tensor):
        return gemm.fprop(x, w, out_dtype, name=name)
    x, w = fprop_pair("fprop", x, w, name)
    out = _by_blocks(x, w.data.contiguous(), w.scale, result_dtype(x, out_dtype))
    report(name, "fprop", x, w, out)
    return out


def dgrad(dy: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.dgrad`; FP8 weights with their transposed copy."""
    if isinstance(dy, Tensor):
        return gemm.dgrad(dy, w, out_dtype, name=name)
    dy, w, transposed = dgrad_pair("dgrad", dy, w, name)
    out = _by_blocks(dy, transposed, w.scale.t(), result_dtype(dy, out_dtype))
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, *, into: Tensor | None = None, name: str = "") -> Tensor:
    """`kernels.gemm.wgrad`. `scaled_mm` adds to nothing: with `into` the product is written, then added."""
    if isinstance(dy, Tensor):
        return gemm.wgrad(dy, x, into=into, name=name)
    dy, x = wgrad_pair(dy, x, name)
    if dy.columns == 0:
        out = dy.scale.new_zeros((dy.rows, x.rows))
    else:
        tokens = round_up(dy.columns, MULTIPLE)
        out = F.scaled_mm(
            padded_codes(dy.data, dy.rows, tokens),
            padded_codes(x.data, x.rows, tokens).t(),
            tile_major_scale(dy.scale, dy.rows).t(),
            F.ScalingType.BlockWise1x128,
            tile_major_scale(x.scale, x.rows).t(),
            F.ScalingType.BlockWise1x128,
            output_dtype=torch.float32,
        )
    out = out if into is None else into.add_(out)
    report(name, "wgrad", dy, x, out)
    return out


def _by_blocks(rows: Quantized, data_BA: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [M, A] by a matrix of blocks stored as [B, A] -> [M, B]."""
    if rows.rows == 0:
        return rows.scale.new_empty((0, data_BA.shape[0]), dtype=dtype)
    padded = padded_rows_of(rows, round_up(rows.rows, MULTIPLE))
    out = F.scaled_mm(
        padded.data,
        data_BA.t(),
        padded.scale,
        F.ScalingType.BlockWise1x128,
        padded_block_scale(scale).t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=library_dtype(dtype),
    )
    return out[: rows.rows].to(dtype)
