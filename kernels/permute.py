"""Rows of tokens to rows of experts and back: both gather, no atomics, so that sums have one order.

Shapes: V rows of tokens, X expanded rows (a token's row once for each of its experts), D features.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from kernels.quantize import Quantized

Rows = TypeVar("Rows", Tensor, Quantized)


def take_rows(rows: Rows, index_X: Tensor) -> Rows:
    """[V, D] tensor, or FP8 rows in 1x128 tiles with their scales -> [X, D] of the same kind; indices may repeat."""
    return rows.index_rows(index_X) if isinstance(rows, Quantized) else rows.index_select(0, index_X)


def sum_rows(rows_XD: Tensor, index_X: Tensor, count: int) -> Tensor:
    """[X, D] -> [count, D] in rows' dtype: row v is 0 + the rows x with index_X[x] = v, in order of x, added in FP32 at
    least and rounded once. The transpose of `take_rows`."""
    wide = rows_XD.to(torch.promote_types(rows_XD.dtype, torch.float32))
    if wide.device.type == "cpu":
        # One index after the other; elsewhere it adds with atomics, in any order.
        return wide.new_zeros(count, wide.shape[1]).index_add_(0, index_X, wide).to(rows_XD.dtype)
    return _sum_sorted(wide, index_X, count).to(rows_XD.dtype)


def _sum_sorted(wide_XD: Tensor, index_X: Tensor, count: int) -> Tensor:
    """The same numbers by sorting: each output row adds its own list. No host wait."""
    order_X, first = row_lists(index_X, count)
    return torch.segment_reduce(wide_XD.index_select(0, order_X), "sum", offsets=first, initial=0, unsafe=True)


def row_lists(index_X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(order [X], first [count + 1]): rows x with index_X[x] = v are order[first[v] : first[v + 1]], ascending."""
    sorted_X, order_X = torch.sort(index_X, stable=True)
    targets = torch.arange(count + 1, device=index_X.device, dtype=index_X.dtype)
    return order_X, torch.searchsorted(sorted_X, targets)
