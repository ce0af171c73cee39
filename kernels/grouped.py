"""The three products for the experts of a layer: rows sorted by expert, one weight per expert.

Shapes: M rows of all experts together, E experts, N output features, K input features, P rows with each expert's
group padded to a multiple of 128 (FP8 weight gradient only). `counts`: rows per expert, in order, summing to M; zeros
are fine. Numbers and dtypes are those of `kernels.gemm`; its products, expert by expert, are the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gemm import check_pair, multiply, on_tensor_cores, result_dtype, widen
from kernels.observe import Operand, report
from kernels.quantize import BLOCK_TILE, ROW_TILE, Quantized, dequantize_groups


def fprop(
    x: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """x [M, K] (FP8: 1x128), w [E, N, K] (FP8: 128x128) -> [M, N]."""
    check_pair("grouped fprop", x, w, (ROW_TILE, BLOCK_TILE), ndim=(2, 3))
    _check_counts("grouped fprop", counts, w.shape[0], x.shape[0])
    if x.shape[1] != w.shape[2]:
        raise ValueError(
            f"grouped fprop {name}: x {tuple(x.shape)} and w {tuple(w.shape)} differ in K, their last dimension"
        )
    out = _by_expert(x, w, counts, result_dtype(x, out_dtype), transpose=True)
    report(name, "fprop", x, w, out)
    return out


def dgrad(
    dy: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """dy [M, N] (FP8: 1x128), w [E, N, K] (FP8: 128x128) -> dX [M, K]."""
    check_pair("grouped dgrad", dy, w, (ROW_TILE, BLOCK_TILE), ndim=(2, 3))
    _check_counts("grouped dgrad", counts, w.shape[0], dy.shape[0])
    if dy.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped dgrad {name}: dy {tuple(dy.shape)} and w {tuple(w.shape)} differ in N (dy's columns)"
        )
    out = _by_expert(dy, w, counts, result_dtype(dy, out_dtype), transpose=False)
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, counts: Sequence[int], *, into: Tensor | None = None, name: str = "") -> Tensor:
    """dW [E, N, K] in FP32 (float64 for float64); zeros for an expert without rows.

    Plain rows dy [M, N], x [M, K]; FP8 dy^T [N, P], x^T [K, P] from `quantize_columns(..., counts=counts)`. With `into`
    the product is added to it, in its precision, and it is returned.
    """
    check_pair("grouped wgrad", dy, x, (ROW_TILE, ROW_TILE), ndim=(2, 2))
    groups = tuple(int(count) for count in counts)
    for operand in (dy, x):
        if not isinstance(operand, Quantized):
            _check_counts("grouped wgrad", groups, len(groups), operand.shape[0])
        elif operand.counts != groups:
            raise ValueError(
                f"grouped wgrad {name}: called with groups {groups}; the operand is quantised for {operand.counts}"
            )
    if isinstance(dy, Tensor) and isinstance(x, Tensor) and on_tensor_cores(dy):
        rows = zip(dy.split(groups), x.split(groups), strict=True)
        out = torch.stack([torch.mm(a.t(), b, out_dtype=torch.float32) for a, b in rows])
        report(name, "wgrad", dy, x, out)
        return out if into is None else into.add_(out)
    dy_NM, x_KM = _tokens_last(dy), _tokens_last(x)
    out = dy_NM.new_empty((len(groups), dy_NM.shape[0], x_KM.shape[0]))
    operands = zip(groups, dy_NM.split(groups, 1), x_KM.t().split(groups), out.unbind(), strict=True)
    for count, dy_Nm, x_mK, out_NK in operands:
        if count:
            torch.mm(dy_Nm, x_mK, out=out_NK)
        else:
            out_NK.zero_()
    report(name, "wgrad", dy, x, out)
    return out if into is None else into.add_(out)


def _by_expert(rows: Operand, weights: Operand, counts: Sequence[int], dtype: torch.dtype, transpose: bool) -> Tensor:
    """[M, A] . [E, A, B] (or [E, B, A] transposed) -> [M, B], each row with its expert's matrix."""
    if isinstance(rows, Tensor) and isinstance(weights, Tensor) and on_tensor_cores(rows):
        pairs = zip(rows.split([int(count) for count in counts]), weights, strict=True)
        return torch.cat([multiply(x, weight, dtype, transpose) for x, weight in pairs])
    wide = widen(rows)
    out = wide.new_empty((wide.shape[0], weights.shape[1 if transpose else 2]))
    groups = [int(count) for count in counts]
    for expert, (x, y) in enumerate(zip(wide.split(groups), out.split(groups), strict=True)):
        if groups[expert]:
            weight = _widen_expert(weights, expert)
            torch.mm(x, weight.t() if transpose else weight, out=y)
    return out.to(dtype)


def _widen_expert(weights: Operand, expert: int) -> Tensor:
    """One expert's matrix at a time: it fits a cache where all of them may not fit memory."""
    if isinstance(weights, Tensor):
        return widen(weights[expert])
    if weights.memo is not None:
        return widen(weights)[expert]
    return widen(Quantized(weights.data[expert], weights.scale[expert]))


def _tokens_last(operand: Operand) -> Tensor:
    """[features, M] without padding."""
    return dequantize_groups(operand) if isinstance(operand, Quantized) else widen(operand).t()


def _check_counts(kind: str, counts: Sequence[int], experts: int, rows: int) -> None:
    if len(counts) != experts or sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(f"{kind}: counts {list(counts)} do not describe {experts} experts and {rows} rows")
