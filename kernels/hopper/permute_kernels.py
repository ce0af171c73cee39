"""Kernels that move rows by index: both read where they are told and write in order, so nothing is added atomically.

Shapes: V rows of tokens, X expanded rows, D features or words of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["X"])
def take_kernel(ROWS, INDEX, OUT, X, D, row_stride, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr):
    """ROWS [V, D] words -> OUT [X, D], row INDEX [X] of it. Grid: row blocks times column blocks, the latter first."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)[:, None]
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    source = tl.load(INDEX + row, mask=row < X, other=0)
    inside = (row < X) & (column < D)
    tl.store(OUT + row * D + column, tl.load(ROWS + source * row_stride + column, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["X", "s_row", "s_tile"])
def take_scales_kernel(
    S, INDEX, OUT, X, TILES, s_row, s_tile, out_stride, BLOCK_X: tl.constexpr, BLOCK_T: tl.constexpr
):
    """S [V, TILES] FP32 of any strides -> OUT [TILES, out_stride], its rows INDEX [X] with the rows contiguous; 1
    beyond X. Grid: row blocks."""
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    source = tl.load(INDEX + row, mask=row < X, other=0)
    for first in tl.range(0, TILES, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)[:, None]
        scale = tl.load(S + source * s_row + tile * s_tile, mask=(row < X) & (tile < TILES), other=1.0)
        tl.store(OUT + tile.to(tl.int64) * out_stride + row, scale, mask=(row < out_stride) & (tile < TILES))


@triton.jit
def sum_kernel(ROWS, ORDER, FIRST, OUT, D, row_stride, BLOCK_D: tl.constexpr, SUM_TYPE: tl.constexpr):
    """ROWS [X, D] -> OUT [count, D]: row v is the sum of rows ORDER[FIRST[v] : FIRST[v + 1]], in that order. Grid:
    (count times column blocks, the latter first)."""
    blocks = tl.cdiv(D, BLOCK_D)
    target = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros((BLOCK_D,), SUM_TYPE)
    for position in tl.range(tl.load(FIRST + target), tl.load(FIRST + target + 1)):
        row = tl.load(ORDER + position)
        total += tl.load(ROWS + row * row_stride + column, mask=inside, other=0.0).to(SUM_TYPE)
    tl.store(OUT + target * D + column, total.to(OUT.dtype.element_ty), mask=inside)
