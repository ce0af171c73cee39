"""Kernels of SwiGLU: the result as values, as E4M3 tiles, or along tokens; the gradients as values or as tiles.

Every program has 128 of the F features, of gate and of up. Shapes: M rows, F features, P padded tokens. All arithmetic
is FP32, in the order of `kernels.swiglu`.

gate_up is given as values, or as stored E4M3 tiles that lie over both its halves: WHOLE says that 128 divides F, so
that a program's part of up lies in one tile; else it lies in two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hopper.quantize_kernels import tile_rows, write_columns, write_rows


@triton.jit
def load_part(X, S, row, real, block, first, F, x_stride, s_row, s_tile, WHOLE: tl.constexpr, ROUND: tl.constexpr):
    """FP32 [R, 128] of gate (first = 0) or up (first = F) at `row` [R, 1] and column block `block`, zero where not
    `real`: of values X, or if S is given of codes X times scales S [M, 2F/128], the product rounded to ROUND."""
    column = block * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(X + row * x_stride + first + column, mask=real & (column < F), other=0.0).to(tl.float32)
    if S is not None:
        tile = (first + block * 128) // 128
        scale = tl.load(S + row * s_row + tile * s_tile, mask=real, other=0.0)
        if not WHOLE:
            # Beyond the last tile nothing is read, and nothing used.
            there = real & ((tile + 1) * 128 + tl.zeros_like(row) < 2 * F)
            after = tl.load(S + row * s_row + (tile + 1) * s_tile, mask=there, other=0.0)
            scale = tl.where((first + column) // 128 == tile, scale, after)
        x = (x * scale).to(ROUND).to(tl.float32)
    return x


@triton.jit
def load_weight(W, row, real):
    """FP32 [R, 1] router weights, zero where not `real`."""
    return tl.load(W + row, mask=real, other=0.0).to(tl.float32)


@triton.jit
def gate_gradients(dy, gate):
    """(sigmoid, dy sigmoid, dup for a weight of 1); dgate = (dup (1 - sigmoid) + dy sigmoid) up."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    inner = dy * sigmoid
    return sigmoid, inner, inner * gate


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    X, W, HIDDEN, CODES, S, KEPT, KEPT_S, M, F, x_stride, s_stride, BLOCK_M: tl.constexpr
):  # fmt: skip
    """X = gate_up [M, 2F] -> the result, rounded to X's type, as values HIDDEN [M, F], or as codes CODES [M, F] and
    scales S [F/128, s_stride]; if KEPT is given also X's own codes [M, 2F] and scales KEPT_S [2F/128, s_stride], for an
    F that 128 divides. Grid: row blocks times column blocks, the latter first."""
    blocks = tl.cdiv(F, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = block * 128 + tl.arange(0, 128)[None, :]
    real = row < M
    if W is not None:
        # Later, between the two quantisations, it makes Triton 3.6 spill.
        weight = load_weight(W, row, real)
    gate = load_part(X, None, row, real, block, 0, F, x_stride, 0, 0, True, None)
    up = load_part(X, None, row, real, block, F, F, x_stride, 0, 0, True, None)
    if KEPT is not None:
        write_rows(gate, KEPT, KEPT_S, row, block, 2 * F, s_stride, real, row < s_stride, False)
        write_rows(up, KEPT, KEPT_S, row, blocks + block, 2 * F, s_stride, real, row < s_stride, False)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if W is not None:
        hidden = hidden * weight
    hidden = hidden.to(X.dtype.element_ty)
    if HIDDEN is not None:
        tl.store(HIDDEN + row * F + column, hidden, mask=real & (column < F))
    if CODES is not None:
        write_rows(hidden.to(tl.float32), CODES, S, row, block, F, s_stride, real, row < s_stride, False)


@triton.jit(do_not_specialize=["M", "s_tile"])
def columns_kernel(
    X, S, W, YT, YTS, TABLE, M, F, x_stride, s_row, s_tile, padded, WHOLE: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    """Stored tiles X [M, 2F] -> the result, rounded to ROUND, along tokens: codes YT [F, P], scales YTS [P/128, F].
    TABLE: groups, see `tile_rows`. Grid: P/128 token tiles times column blocks, the latter first."""
    blocks = tl.cdiv(F, 128)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, rows = tile_rows(TABLE, tile, padded // 128, M)
    inside = tl.arange(0, 128)[:, None]
    row, real = first + inside, inside < rows
    gate = load_part(X, S, row, real, block, 0, F, x_stride, s_row, s_tile, True, ROUND)
    up = load_part(X, S, row, real, block, F, F, x_stride, s_row, s_tile, WHOLE, ROUND)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if W is not None:
        hidden = hidden * load_weight(W, row, real)
    hidden = hidden.to(ROUND).to(tl.float32)
    write_columns(hidden, YT, YTS, tile, block, real, F, padded, False)


@triton.jit(do_not_specialize=["M", "s_tile"])
def gradient_kernel(
    DY, X, S, W, DX, PARTIAL, M, F, dy_stride, x_stride, s_row, s_tile,
    BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """DY [M, F], X = gate_up [M, 2F] as values or tiles -> DX [M, 2F] as values; with W each column block's share of
    drow_weight to its row of PARTIAL [F/128, M]. Grid: row blocks times column blocks, the latter first."""
    blocks = tl.cdiv(F, 128)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = block * 128 + tl.arange(0, 128)[None, :]
    real = row < M
    ROUND: tl.constexpr = DY.dtype.element_ty
    inside = real & (column < F)
    dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = load_part(X, S, row, real, block, 0, F, x_stride, s_row, s_tile, True, ROUND)
    up = load_part(X, S, row, real, block, F, F, x_stride, s_row, s_tile, WHOLE, ROUND)
    sigmoid, inner, dup = gate_gradients(dy, gate)
    dgate = tl.fma(dup, 1.0 - sigmoid, inner) * up
    if W is not None:
        share = tl.sum(dup * up, 1, keep_dims=True)
        tl.store(PARTIAL + block.to(tl.int64) * M + row, share, mask=real)
        weight = load_weight(W, row, real)
        dgate, dup = dgate * weight, dup * weight
    target = DX + row * (2 * F) + column
    tl.store(target, dgate.to(DX.dtype.element_ty), mask=inside)
    tl.store(target + F, dup.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "s_tile"])
def gradient_tiles_kernel(
    DY, X, S, W, Y, YS, YT, YTS, PARTIAL, TABLE, M, F, dy_stride, x_stride, s_row, s_tile, ys_stride, padded
):  # fmt: skip
    """`gradient_kernel` for stored tiles X and an F that 128 divides, with the result quantised: codes Y [M, 2F] and
    scales YS [2F/128, ys_stride] along columns, codes YT [2F, P] and scales YTS [P/128, 2F] along tokens. It is rounded
    to DY's type before. TABLE: groups, see `tile_rows`. Grid: P/128 token tiles times column blocks times 2, the latter
    first: dgate and dup have a program each, which read the same at the same time; one for both has too few registers.
    """
    blocks = F // 128
    half, block = tl.program_id(0) % 2, tl.program_id(0) // 2 % blocks
    tile = tl.program_id(0) // (2 * blocks)
    first, rows = tile_rows(TABLE, tile, padded // 128, M)
    inside = tl.arange(0, 128)[:, None]
    row, real = first + inside, inside < rows
    column = block * 128 + tl.arange(0, 128)[None, :]
    ROUND: tl.constexpr = DY.dtype.element_ty
    dy = tl.load(DY + row * dy_stride + column, mask=real, other=0.0).to(tl.float32)
    gate = load_part(X, S, row, real, block, 0, F, x_stride, s_row, s_tile, True, ROUND)
    sigmoid, inner, dup = gate_gradients(dy, gate)
    # dup's program needs nothing of up, and gets zeros.
    for_gate = tl.zeros_like(inside) + half == 0
    up = load_part(X, S, row, real & for_gate, block, F, F, x_stride, s_row, s_tile, True, ROUND)
    gradient = tl.where(for_gate, tl.fma(dup, 1.0 - sigmoid, inner) * up, dup)
    if W is not None:
        share = tl.sum(dup * up, 1, keep_dims=True)
        tl.store(PARTIAL + block.to(tl.int64) * M + row, share, mask=real & for_gate)
        gradient = gradient * load_weight(W, row, real)
    gradient = gradient.to(ROUND).to(tl.float32)
    # Without groups the padding of the scales is written too, in whole vectors.
    scale_mask = real if TABLE is not None else row < ys_stride
    write_rows(gradient, Y, YS, row, half * blocks + block, 2 * F, ys_stride, real, scale_mask, False)
    write_columns(gradient, YT, YTS, tile, half * blocks + block, real, 2 * F, padded, False)
