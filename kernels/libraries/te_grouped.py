"""The products of a layer's experts by transformer-engine's `general_grouped_gemm`: one cuBLAS call for each expert, on
several streams.

Shapes: M rows of all experts together, E experts, N output features, K input features. Experts without rows are left
out of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import grouped
from kernels.gemm import result_dtype
from kernels.libraries import te_tensors
from kernels.libraries.layout import Groups
from kernels.libraries.operands import (
    check_counts,
    dgrad_pair,
    fprop_pair,
    grouped_wgrad_pair,
    library_dtype,
    takes_sum,
)
from kernels.libraries.requirements import check_shapes
from kernels.libraries.te_tensors import problem
from kernels.observe import Operand, report
from kernels.quantize import Quantized
from kernels.tiles import TILE

__all__ = ["check_shapes", "dgrad", "fprop", "problem", "wgrad"]


def fprop(
    x: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """`kernels.grouped.fprop`."""
    if isinstance(x, Tensor):
        return grouped.fprop(x, w, counts, out_dtype, name=name)
    x, w = fprop_pair("grouped fprop", x, w, name)
    check_counts("grouped fprop", counts, w.shape[0], x.rows)
    weights = {expert: te_tensors.blocks(w.data[expert], w.scale[expert]) for expert in _busy(counts)}
    out = _by_expert(x, weights, counts, "TN", w.rows, result_dtype(x, out_dtype))
    report(name, "fprop", x, w, out)
    return out


def dgrad(
    dy: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """`kernels.grouped.dgrad`; FP8 weights with their transposed copy."""
    if isinstance(dy, Tensor):
        return grouped.dgrad(dy, w, counts, out_dtype, name=name)
    dy, w, transposed = dgrad_pair("grouped dgrad", dy, w, name)
    check_counts("grouped dgrad", counts, w.shape[0], dy.rows)
    weights = {expert: te_tensors.transposed_blocks(transposed[expert], w.scale[expert]) for expert in _busy(counts)}
    out = _by_expert(dy, weights, counts, "NN", w.columns, result_dtype(dy, out_dtype))
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, counts: Sequence[int], *, into: Tensor | None = None, name: str = "") -> Tensor:
    """`kernels.grouped.wgrad`; an FP32 `into` is added to inside the products."""
    if isinstance(dy, Tensor):
        return grouped.wgrad(dy, x, counts, into=into, name=name)
    dy, x, experts = grouped_wgrad_pair(dy, x, counts, name)
    inside = into if takes_sum(into) else None
    out = inside if inside is not None else dy.scale.new_zeros((len(experts), dy.rows, x.rows))
    spans = Groups(experts, TILE).spans()
    if spans:
        inputs, gradients = (
            [te_tensors.column_tiles(_tokens(q, first, end)) for _, first, end in spans] for q in (x, dy)
        )
        parts = [out[expert] for expert, _, _ in spans]
        _multiply(inputs, gradients, parts, [end - first for _, first, end in spans], "NT", inside is not None)
    if into is not None and inside is None:
        out = into.add_(out)
    report(name, "wgrad", dy, x, out)
    return out


def _by_expert(
    rows: Quantized, weights: dict[int, Any], counts: Sequence[int], layout: str, width: int, dtype: torch.dtype
) -> Tensor:
    """[M, ...] times each expert's matrix -> [M, width]."""
    groups = Groups.of(counts, te_tensors.MULTIPLE)
    padded = groups.pad_tiles(rows)
    out = rows.scale.new_empty((padded.rows, width), dtype=library_dtype(dtype))
    spans = groups.spans()
    if spans:
        inputs = [te_tensors.row_tiles(padded.index_rows(slice(first, end))) for _, first, end in spans]
        parts = [out[first:end] for _, first, end in spans]
        splits = [end - first for _, first, end in spans]
        _multiply([weights[expert] for expert, _, _ in spans], inputs, parts, splits, layout, False)
    return groups.unpad(out).to(dtype)


def _busy(counts: Sequence[int]) -> list[int]:
    return [expert for expert, count in enumerate(counts) if count]


def _tokens(q: Quantized, first: int, end: int) -> Quantized:
    """Tokens [first, end) of column-quantised groups; both are multiples of 128."""
    return Quantized(q.data[:, first:end], q.scale[:, first // TILE : end // TILE])


def _multiply(a: list[Any], b: list[Any], out: list[Tensor], splits: list[int], layout: str, accumulate: bool) -> None:
    from transformer_engine.pytorch.cpp_extensions.gemm import general_grouped_gemm

    general_grouped_gemm(
        a,
        b,
        out,
        [None] * len(a),
        out[0].dtype,
        layout=layout,
        m_splits=splits,
        accumulate=accumulate,
        use_split_accumulator=True,
    )
