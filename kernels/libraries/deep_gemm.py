"""The three products of a linear layer by DeepGEMM (https://github.com/deepseek-ai/DeepGEMM), 2.3 to 2.8.

Shapes: M tokens (rows), N output features, K input features. On Hopper its product with 128x128 blocks writes BF16
alone and the one of 1x128 by 1x128 tiles adds to FP32 alone; an FP32 result of `fprop` and `dgrad` is the latter, with
a block's scale repeated over its rows. It turns scales to its own layout itself.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels import gemm
from kernels.gemm import result_dtype
from kernels.libraries.layout import padded_codes, round_up, row_scales_of_blocks
from kernels.libraries.operands import dgrad_pair, fprop_pair, takes_sum, wgrad_pair
from kernels.libraries.requirements import check_shapes, hopper_problem, import_problem
from kernels.observe import Operand, report
from kernels.quantize import Quantized
from kernels.tiles import TILE

__all__ = ["check_shapes", "dgrad", "fprop", "problem", "wgrad"]

LIBRARY = "DeepGEMM"
# The deep_gemm on PyPI is 1.0, whose functions have other names.
REMEDY = "pip install --no-build-isolation git+https://github.com/deepseek-ai/DeepGEMM"
FUNCTIONS = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "k_grouped_fp8_gemm_nt_contiguous")
TILES_BY_TILES = (1, 1, TILE)


def problem(device: torch.device) -> str | None:
    """Why DeepGEMM cannot multiply our blocks on `device`; None when it can."""
    found = hopper_problem(LIBRARY, device) or import_problem("deep_gemm", REMEDY)
    if found:
        return found
    library = importlib.import_module("deep_gemm")
    version = getattr(library, "__version__", "of unknown version")
    missing = [function for function in FUNCTIONS if not hasattr(library, function)]
    if missing:
        return f"deep_gemm {version} has no {', '.join(missing)}; 2.3 or newer is needed: {REMEDY}"
    alignment = getattr(library, "get_mk_alignment_for_contiguous_layout", lambda: TILE)()
    if alignment != TILE:
        return (
            f"deep_gemm is set to align groups to {alignment} rows; {TILE} are needed: call "
            f"deep_gemm.set_mk_alignment_for_contiguous_layout({TILE})"
        )
    return None


def fprop(x: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.fprop`."""
    if isinstance(x, Tensor):
        return gemm.fprop(x, w, out_dtype, name=name)
    x, w = fprop_pair("fprop", x, w, name)
    out = rows_by_blocks(x, w.data.contiguous(), w.scale, result_dtype(x, out_dtype))
    report(name, "fprop", x, w, out)
    return out


def dgrad(dy: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.dgrad`; FP8 weights with their transposed copy."""
    if isinstance(dy, Tensor):
        return gemm.dgrad(dy, w, out_dtype, name=name)
    dy, w, transposed = dgrad_pair("dgrad", dy, w, name)
    out = rows_by_blocks(dy, transposed, w.scale.t(), result_dtype(dy, out_dtype))
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, *, into: Tensor | None = None, name: str = "") -> Tensor:
    """`kernels.gemm.wgrad`; an FP32 `into` is added to inside the product."""
    if isinstance(dy, Tensor):
        return gemm.wgrad(dy, x, into=into, name=name)
    dy, x = wgrad_pair(dy, x, name)
    inside = into if takes_sum(into) else None
    out = inside if inside is not None else dy.scale.new_zeros((dy.rows, x.rows))
    if dy.columns:
        tokens = round_up(dy.columns, TILE)
        a, b = ((padded_codes(q.data, q.rows, tokens), q.scale) for q in (dy, x))
        _add_product(a, b, out)
    if into is not None and inside is None:
        out = into.add_(out)
    report(name, "wgrad", dy, x, out)
    return out


def rows_by_blocks(rows: Quantized, data_BA: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [M, A] in 1x128 tiles by a matrix of 128x128 blocks stored as [B, A] -> [M, B]."""
    shape = rows.rows, data_BA.shape[0]
    a = rows.data.contiguous(), rows.scale
    if dtype == torch.bfloat16:
        out = rows.scale.new_empty(shape, dtype=dtype)
        if rows.rows:
            load().fp8_gemm_nt(a, (data_BA, scale.contiguous()), out)
        return out
    out = rows.scale.new_zeros(shape)
    if rows.rows:
        _add_product(a, (data_BA, row_scales_of_blocks(scale, data_BA.shape[0])), out)
    return out.to(dtype)


def load() -> Any:
    return importlib.import_module("deep_gemm")


def _add_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor) -> None:
    """out [A, B] += a [A, C] b [B, C]^T, both in 1x128 tiles."""
    load().fp8_gemm_nt(a, b, out, c=out, recipe=TILES_BY_TILES, compiled_dims="mn")
