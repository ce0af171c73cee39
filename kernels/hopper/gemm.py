"""The three products of a linear layer for FP8 operands, in Triton; plain operands go to `kernels.gemm`.

Shapes: M tokens (rows), N output features, K input features. N and K are multiples of 16, M is free. The numbers are
those of `kernels.gemm.product_reference`, up to the order of FP32 sums.

Fastest, and without a copy: row scales with neighbouring rows side by side, and token-quantised operands with tokens
side by side in rows that start at multiples of 16 bytes. The quantisers of this package store both so.

tile: what a program computes at a time, one of `kernels.hopper.tile.TILES`, chosen by shape by default. num_sms:
programs at most; fewer than the device has leave the others to communication (V3 section 3.2.2). measured: a table of
tiles that a benchmark wrote.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels import gemm as plain
from kernels.hopper import layout
from kernels.hopper.gemm_variants import column_variants, row_variants
from kernels.hopper.launch import launch_columns, launch_rows
from kernels.hopper.products import (
    check_accumulator,
    check_operands,
    check_weight_memory,
    chosen_tile,
    result_dtype,
)
from kernels.hopper.tile import DGRAD, FPROP, WGRAD, TileConfig
from kernels.hopper.variant import Variant
from kernels.libraries.operands import dgrad_pair, fprop_pair, wgrad_pair
from kernels.observe import Operand, report


def fprop(
    x: Operand,
    w: Operand,
    out_dtype: torch.dtype | None = None,
    *,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """x [M, K] in 1x128 tiles, w [N, K] in 128x128 blocks -> [M, N] in BF16 (default) or FP32."""
    if isinstance(x, Tensor) and isinstance(w, Tensor):
        return plain.fprop(x, w, out_dtype, name=name)
    x, w = fprop_pair(FPROP, x, w, name)
    check_operands(FPROP, name, (x, w), {"N": w.rows, "K": w.columns})
    check_weight_memory(FPROP, name, w.data)
    out = layout.empty((x.rows, w.rows), result_dtype(FPROP, name, out_dtype), x.device)
    if x.rows:
        tile = tile or chosen_tile(FPROP, x.rows, w.rows, w.columns, 1, num_sms, measured)
        launch_rows(out, x.data, x.scale, w.data, w.scale, tile, num_sms)
    report(name, "fprop", x, w, out)
    return out


def dgrad(
    dy: Operand,
    w: Operand,
    out_dtype: torch.dtype | None = None,
    *,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """dy [M, N] in 1x128 tiles, w [N, K] in 128x128 blocks with `transposed` -> dX [M, K] in BF16 (default) or FP32."""
    if isinstance(dy, Tensor) and isinstance(w, Tensor):
        return plain.dgrad(dy, w, out_dtype, name=name)
    dy, w, w_KN = dgrad_pair(DGRAD, dy, w, name)
    check_operands(DGRAD, name, (dy, w), {"N": w.rows, "K": w.columns})
    check_weight_memory(DGRAD, name, w_KN)
    out = layout.empty((dy.rows, w.columns), result_dtype(DGRAD, name, out_dtype), dy.device)
    if dy.rows:
        tile = tile or chosen_tile(DGRAD, dy.rows, w.columns, w.rows, 1, num_sms, measured)
        launch_rows(out, dy.data, dy.scale, w_KN, w.scale.mT, tile, num_sms)
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(
    dy: Operand,
    x: Operand,
    *,
    into: Tensor | None = None,
    name: str = "",
    tile: TileConfig | None = None,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> Tensor:
    """dy^T [N, M] and x^T [K, M] in 1x128 tiles -> dW [N, K] in FP32.

    With `into` (FP32, contiguous) the kernel adds to it and it is returned; observers then get the sum.
    """
    if isinstance(dy, Tensor) and isinstance(x, Tensor):
        return plain.wgrad(dy, x, into=into, name=name)
    dy, x = wgrad_pair(dy, x, name)
    check_operands(WGRAD, name, (dy, x), {"N": dy.rows, "K": x.rows})
    if into is not None:
        check_accumulator(WGRAD, name, into, (dy.rows, x.rows), dy.device)
    out = layout.empty((dy.rows, x.rows), torch.float32, dy.device) if into is None else into
    if dy.columns:
        tile = tile or chosen_tile(WGRAD, dy.rows, x.rows, dy.columns, 1, num_sms, measured)
        launch_columns(out, dy.data, dy.scale, x.data, x.scale, tile, num_sms, accumulate=into is not None)
    elif into is None:
        out.zero_()
    report(name, "wgrad", dy, x, out)
    return out


def variants() -> list[Variant]:
    """All compiled forms of the dense products."""
    return [*row_variants(FPROP), *row_variants(DGRAD), *column_variants(WGRAD)]
