"""The three products of a linear layer by transformer-engine's `general_gemm`, which is cuBLAS's.

Shapes: M tokens (rows), N output features, K input features. `general_gemm(A, B)` with layout "TN" is B A^T, "NN" is
B A, "NT" is B^T A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import gemm
from kernels.gemm import result_dtype
from kernels.libraries import te_tensors
from kernels.libraries.operands import dgrad_pair, fprop_pair, library_dtype, takes_sum, wgrad_pair
from kernels.libraries.requirements import check_shapes
from kernels.libraries.te_tensors import problem
from kernels.observe import Operand, report

__all__ = ["check_shapes", "dgrad", "fprop", "problem", "wgrad"]


def fprop(x: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.fprop`."""
    if isinstance(x, Tensor):
        return gemm.fprop(x, w, out_dtype, name=name)
    x, w = fprop_pair("fprop", x, w, name)
    dtype = result_dtype(x, out_dtype)
    if x.rows == 0:
        out = x.scale.new_empty((0, w.rows), dtype=dtype)
    else:
        weight = te_tensors.blocks(w.data, w.scale)
        out = _multiply(weight, te_tensors.row_tiles(x), "TN", dtype)[: x.rows]
    report(name, "fprop", x, w, out)
    return out


def dgrad(dy: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """`kernels.gemm.dgrad`; FP8 weights with their transposed copy."""
    if isinstance(dy, Tensor):
        return gemm.dgrad(dy, w, out_dtype, name=name)
    dy, w, transposed = dgrad_pair("dgrad", dy, w, name)
    dtype = result_dtype(dy, out_dtype)
    if dy.rows == 0:
        out = dy.scale.new_empty((0, w.columns), dtype=dtype)
    else:
        weight = te_tensors.transposed_blocks(transposed, w.scale)
        out = _multiply(weight, te_tensors.row_tiles(dy), "NN", dtype)[: dy.rows]
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, *, into: Tensor | None = None, name: str = "") -> Tensor:
    """`kernels.gemm.wgrad`; an FP32 `into` is added to inside the product."""
    if isinstance(dy, Tensor):
        return gemm.wgrad(dy, x, into=into, name=name)
    dy, x = wgrad_pair(dy, x, name)
    inside = takes_sum(into)
    if dy.columns == 0:
        out = into if into is not None else dy.scale.new_zeros((dy.rows, x.rows))
    else:
        operands = te_tensors.column_tiles(x), te_tensors.column_tiles(dy)
        out = _multiply(*operands, "NT", torch.float32, into if inside else None)
        if into is not None and not inside:
            out = into.add_(out)
    report(name, "wgrad", dy, x, out)
    return out


def _multiply(a: Any, b: Any, layout: str, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm

    out, *_ = general_gemm(
        a,
        b,
        out_dtype=library_dtype(dtype),
        layout=layout,
        out=into,
        accumulate=into is not None,
        use_split_accumulator=True,
    )
    return out.to(dtype)
