"""Checks and result rules that the products of every library share: those of `kernels.gemm` and `kernels.grouped`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gemm import check_pair
from kernels.observe import Operand
from kernels.quantize import BLOCK_TILE, ROW_TILE, Quantized


def fprop_pair(kind: str, x: Operand, w: Operand, name: str) -> tuple[Quantized, Quantized]:
    """x [M, K], w [N, K] or [E, N, K], checked. kind: "fprop" or "grouped fprop"."""
    x, w = _pair(kind, x, w, (ROW_TILE, BLOCK_TILE), (2, 3 if kind.startswith("grouped") else 2))
    if x.columns != w.columns:
        raise ValueError(f"{kind} {name}: x {tuple(x.shape)} and w {tuple(w.shape)} differ in K, their last dimension")
    return x, w


def dgrad_pair(kind: str, dy: Operand, w: Operand, name: str) -> tuple[Quantized, Quantized, Tensor]:
    """dy [M, N], w [N, K] or [E, N, K], and the contiguous codes of w's transpose."""
    dy, w = _pair(kind, dy, w, (ROW_TILE, BLOCK_TILE), (2, 3 if kind.startswith("grouped") else 2))
    if dy.columns != w.rows:
        raise ValueError(f"{kind} {name}: dy {tuple(dy.shape)} and w {tuple(w.shape)} differ in N (dy's columns)")
    if w.transposed is None:
        raise ValueError(
            f"{kind} {name}: w {tuple(w.shape)} has no transposed copy, and tensor cores of Hopper need FP8 operands "
            "along the summed dimension; quantise the weight with a back end that writes both layouts"
        )
    wanted = (*w.shape[:-2], w.columns, w.rows)
    if w.transposed.shape != wanted or not w.transposed.is_contiguous():
        raise ValueError(
            f"{kind} {name}: the transposed copy of w {tuple(w.shape)} has shape {tuple(w.transposed.shape)}, strides "
            f"{w.transposed.stride()}; a contiguous {wanted} is needed"
        )
    return dy, w, w.transposed


def wgrad_pair(dy: Operand, x: Operand, name: str) -> tuple[Quantized, Quantized]:
    """dy^T [N, M], x^T [K, M]."""
    dy, x = _pair("wgrad", dy, x, (ROW_TILE, ROW_TILE), (2, 2))
    if dy.columns != x.columns:
        raise ValueError(f"wgrad {name}: operands {tuple(dy.shape)} and {tuple(x.shape)} differ in M, the tokens")
    return dy, x


def grouped_wgrad_pair(
    dy: Operand, x: Operand, counts: Sequence[int], name: str
) -> tuple[Quantized, Quantized, tuple[int, ...]]:
    """dy^T [N, P], x^T [K, P], and the rows of each expert as numbers."""
    dy, x = _pair("grouped wgrad", dy, x, (ROW_TILE, ROW_TILE), (2, 2))
    groups = tuple(int(count) for count in counts)
    for operand in (dy, x):
        if operand.counts != groups:
            raise ValueError(
                f"grouped wgrad {name}: called with groups {groups}; the operand is quantised for {operand.counts}"
            )
    return dy, x, groups


def check_counts(kind: str, counts: Sequence[int], experts: int, rows: int) -> None:
    """Refuse counts that do not describe the rows of `experts` experts."""
    if len(counts) != experts or sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(f"{kind}: counts {list(counts)} do not describe {experts} experts and {rows} rows")


def library_dtype(asked: torch.dtype) -> torch.dtype:
    """What a library is told to write: BF16 when that is asked, else FP32, which is then rounded once."""
    return torch.bfloat16 if asked == torch.bfloat16 else torch.float32


def takes_sum(into: Tensor | None) -> bool:
    """A library can add to `into` itself."""
    return into is not None and into.dtype == torch.float32 and into.is_contiguous()


def _pair(
    kind: str, a: Operand, b: Operand, tiles: tuple[str, str], ndim: tuple[int, int]
) -> tuple[Quantized, Quantized]:
    check_pair(kind, a, b, tiles, ndim)
    assert isinstance(a, Quantized) and isinstance(b, Quantized)
    return a, b
