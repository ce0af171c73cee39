"""The three products for the experts of a layer in FP8, in Triton; plain operands go to `kernels.grouped`.

Shapes: M rows of all experts together, E experts, N output features, K input features, P rows with each expert's group
padded to a multiple of 128 (weight gradient only). `counts`: rows per expert, in order, summing to M; zeros are fine.
Rows need no padding: the last tile of an expert computes rows of the next one too and does not store them. The host
knows the counts and sends a table of tiles without a wait.

Numbers, memory and `tile`, `num_sms`, `measured` are as in `kernels.hopper.gemm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import grouped as plain
from kernels.hopper import layout
from kernels.hopper.gemm_variants import column_variants, row_variants
from kernels.hopper.launch import block_table, launch_columns, launch_rows, row_table
from kernels.hopper.products import (
    check_accumulator,
    check_operands,
    check_weight_memory,
    chosen_tile,
    result_dtype,
)
from kernels.hopper.tile import GROUPED_DGRAD, GROUPED_FPROP, GROUPED_WGRAD, TileConfig
from kernels.hopper.variant import Variant
from kernels.libraries.operands import check_counts, dgrad_pair, fprop_pair, grouped_wgrad_pair
from kernels.observe import Operand, report


def fprop(
    x: Operand,
    w: Operand,
    counts: Sequence[int],
    out_dtype: torch.dtype | None = None,
    *,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """x [M, K] in 1x128 tiles, w [E, N, K] in 128x128 blocks -> [M, N] in BF16 (default) or FP32."""
    if isinstance(x, Tensor) and isinstance(w, Tensor):
        return plain.fprop(x, w, counts, out_dtype, name=name)
    x, w = fprop_pair(GROUPED_FPROP, x, w, name)
    groups = _checked_counts(GROUPED_FPROP, name, counts, w.shape[0], x.rows)
    check_operands(GROUPED_FPROP, name, (x, w), {"N": w.rows, "K": w.columns})
    check_weight_memory(GROUPED_FPROP, name, w.data)
    out = layout.empty((x.rows, w.rows), result_dtype(GROUPED_FPROP, name, out_dtype), x.device)
    if x.rows:
        tile = tile or chosen_tile(GROUPED_FPROP, x.rows, w.rows, w.columns, len(groups), num_sms, measured)
        table = row_table(groups, tile.rows, x.device)
        launch_rows(out, x.data, x.scale, w.data, w.scale, tile, num_sms, table)
    report(name, "fprop", x, w, out)
    return out


def dgrad(
    dy: Operand,
    w: Operand,
    counts: Sequence[int],
    out_dtype: torch.dtype | None = None,
    *,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """dy [M, N] in 1x128 tiles, w [E, N, K] in 128x128 blocks with `transposed` -> dX [M, K] in BF16 or FP32."""
    if isinstance(dy, Tensor) and isinstance(w, Tensor):
        return plain.dgrad(dy, w, counts, out_dtype, name=name)
    dy, w, w_EKN = dgrad_pair(GROUPED_DGRAD, dy, w, name)
    groups = _checked_counts(GROUPED_DGRAD, name, counts, w.shape[0], dy.rows)
    check_operands(GROUPED_DGRAD, name, (dy, w), {"N": w.rows, "K": w.columns})
    check_weight_memory(GROUPED_DGRAD, name, w_EKN)
    out = layout.empty((dy.rows, w.columns), result_dtype(GROUPED_DGRAD, name, out_dtype), dy.device)
    if dy.rows:
        tile = tile or chosen_tile(GROUPED_DGRAD, dy.rows, w.columns, w.rows, len(groups), num_sms, measured)
        table = row_table(groups, tile.rows, dy.device)
        launch_rows(out, dy.data, dy.scale, w_EKN, w.scale.mT, tile, num_sms, table)
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(
    dy: Operand,
    x: Operand,
    counts: Sequence[int],
    *,
    into: Tensor | None = None,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """dy^T [N, P] and x^T [K, P] from `quantize_columns(..., counts=counts)` -> dW [E, N, K] in FP32.

    Zeros for an expert without rows. With `into` (FP32, contiguous) the kernel adds to it, leaves an expert without
    rows as it is, and `into` is returned; observers then get the sum.
    """
    if isinstance(dy, Tensor) and isinstance(x, Tensor):
        return plain.wgrad(dy, x, counts, into=into, name=name)
    dy, x, groups = grouped_wgrad_pair(dy, x, counts, name)
    check_operands(GROUPED_WGRAD, name, (dy, x), {"N": dy.rows, "K": x.rows})
    shape = (len(groups), dy.rows, x.rows)
    if into is not None:
        check_accumulator(GROUPED_WGRAD, name, into, shape, dy.device)
    out = layout.empty(shape, torch.float32, dy.device) if into is None else into
    if dy.columns:
        tile = tile or chosen_tile(GROUPED_WGRAD, dy.rows, x.rows, dy.columns, len(groups), num_sms, measured)
        table = block_table(groups, dy.device)
        launch_columns(out, dy.data, dy.scale, x.data, x.scale, tile, num_sms, into is not None, table)
    elif into is None:
        out.zero_()
    report(name, "wgrad", dy, x, out)
    return out


def variants() -> list[Variant]:
    """All compiled forms of the grouped products."""
    return [*row_variants(GROUPED_FPROP), *row_variants(GROUPED_DGRAD), *column_variants(GROUPED_WGRAD)]


def _checked_counts(kind: str, name: str, counts: Sequence[int], experts: int, rows: int) -> tuple[int, ...]:
    groups = tuple(int(count) for count in counts)
    check_counts(f"{kind} {name}", groups, experts, rows)
    return groups
