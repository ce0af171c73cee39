"""Kernels that write E4M3 tiles: 1x128 along columns, along tokens (transposed), or both of one read, and blocks.

Every program has 128 columns, and programs that follow each other have the same rows. The device functions at the top
are for the fused kernels too: with them a kernel writes the numbers of `kernels.quantize` bit for bit. Shapes: M tokens
(rows), K features, N rows of a weight, P padded tokens, E matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
# 2^-100, the smallest amax.
FLOOR_BITS = tl.constexpr(27 << 23)


@triton.jit
def largest_bits(x, axis: tl.constexpr):
    """Bits of the largest |x| along an axis, FP32 -> int32, dimension kept: integers order like the numbers, with NaN
    above infinity.

    A maximum of floats would lose a NaN, and costs shuffles where integers have an instruction for a whole warp.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis, keep_dims=True)


@triton.jit
def scale_and_inverse(bits, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(scale, 1 / scale) from `largest_bits`. Both divisions are IEEE's: Triton's `/` is off by up to two units."""
    amax = tl.maximum(bits, FLOOR_BITS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:
        up = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        # Zero, or NaN where the scale is not finite.
        scale = up + scale * 0.0
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def write_rows(x, Y, S, row, block, K, s_stride, code_mask, scale_mask, POWER_OF_TWO: tl.constexpr):
    """Quantise x [R, 128] along columns: codes to Y [M, K] at `row` [R, 1] and column block `block`, scales to S."""
    scale, inverse = scale_and_inverse(largest_bits(x, 1), E4M3_MAX, POWER_OF_TWO)
    column = block * 128 + tl.arange(0, 128)[None, :]
    tl.store(Y + row.to(tl.int64) * K + column, (x * inverse).to(tl.float8e4nv), mask=code_mask & (column < K))
    tl.store(S + block * s_stride + row, scale, mask=scale_mask)


@triton.jit
def write_columns(x, YT, ST, tile, block, real, K, padded, POWER_OF_TWO: tl.constexpr):
    """Quantise x [128, 128] along rows: codes to YT [K, P] at token tile `tile`, zero where not `real`, scales to ST
    [P/128, K]."""
    # The gathers change nothing but who computes: a column's divisions once, not in every row of threads.
    bits = tl.gather(tl.reshape(largest_bits(x, 0), (128,)), tl.arange(0, 128), 0)
    scale, inverse = scale_and_inverse(bits, E4M3_MAX, POWER_OF_TWO)
    scale, inverse = scale[None, :], tl.gather(inverse, tl.arange(0, 128), 0)[None, :]
    # The padding is zero under a NaN scale too.
    codes = tl.where(real, x * inverse, 0.0).to(tl.float8e4nv)
    column = block * 128 + tl.arange(0, 128)
    position = tile * 128 + tl.arange(0, 128)[None, :]
    target = YT + column[:, None].to(tl.int64) * padded + position
    tl.store(target, tl.trans(codes), mask=(column < K)[:, None])
    tl.store(ST + tile.to(tl.int64) * K + column[None, :], scale, mask=(column < K)[None, :])


@triton.jit
def tile_rows(TABLE, tile, tiles, M):
    """(first row, rows) of a tile of 128 rows: from the table of `layout.tile_table`, or by position without one."""
    first = tile.to(tl.int64) * 128
    rows = tl.minimum(M - first, 128)
    if TABLE is not None:
        first = tl.load(TABLE + tile)
        rows = tl.load(TABLE + tiles + tile)
    return first, rows


@triton.jit
def load_values(X, S, row, block, real, K, x_stride, s_row, s_column, SOURCE: tl.constexpr):
    """FP32 values of X [M, K] at `row` [R, 1] and column block `block`, zero where not `real` [R, 1]. SOURCE: float
    `values`, or the codes of stored E4M3 `tiles` or `e5m6` with scales S [M, K/128] of any strides."""
    row = row.to(tl.int64)
    column = block * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(X + row * x_stride + column, mask=real & (column < K), other=0.0)
    if SOURCE == "tiles":
        # On the way to FP32 in any case; named, it is what Triton 3.6 transposes. Else that transposes the codes, and
        # converts and scales them twice.
        x = x.to(tl.float16)
    x = code_values(x, SOURCE)
    if SOURCE != "values":
        # The gather changes nothing but who loads: a row's scale once, not by every thread that has numbers of the row.
        row, real = tl.reshape(row, (row.shape[0],)), tl.reshape(real, (row.shape[0],))
        scale = tl.load(S + row * s_row + block.to(tl.int64) * s_column, mask=real, other=1.0)
        x = x * tl.gather(scale, tl.arange(0, row.shape[0]), 0)[:, None]
    return x


@triton.jit
def code_values(codes, SOURCE: tl.constexpr):
    """FP32 values of stored numbers, before any scale."""
    if SOURCE == "e5m6":
        codes = (codes << 4).to(tl.float16, bitcast=True)
    return codes.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(X, Y, S, M, K, x_stride, s_stride, BLOCK_M: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """X [M, K] -> codes Y [M, K], scales S [K/128, s_stride]. Grid: row blocks times column blocks."""
    blocks = tl.cdiv(K, 128)
    block = tl.program_id(0) % blocks
    row = ((tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    x = load_values(X, None, row, block, row < M, K, x_stride, 0, 0, "values")
    write_rows(x, Y, S, row, block, K, s_stride, row < M, row < s_stride, POWER_OF_TWO)


@triton.jit(do_not_specialize=["M", "s_row", "s_column"])
def columns_kernel(
    X,
    S,
    Y,
    YS,
    YT,
    YTS,
    TABLE,
    M,
    K,
    x_stride,
    s_row,
    s_column,
    ys_stride,
    padded,
    SOURCE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """X [M, K] (see `load_values`) -> codes YT [K, P] and scales YTS [P/128, K] along tokens; if Y is given also codes
    Y [M, K] and scales YS [K/128, ys_stride] along columns. TABLE: groups, see `tile_rows`. Grid: P/128 token tiles
    times column blocks."""
    blocks = tl.cdiv(K, 128)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, rows = tile_rows(TABLE, tile, padded // 128, M)
    inside = tl.arange(0, 128)[:, None]
    row, real = first + inside, inside < rows
    x = load_values(X, S, row, block, real, K, x_stride, s_row, s_column, SOURCE)
    write_columns(x, YT, YTS, tile, block, real, K, padded, POWER_OF_TWO)
    if Y is not None:
        # Found in L1 the second time: kept in registers, it would leave room for one program on a multiprocessor only.
        # The rows last: first, they make Triton 3.6 spill.
        x = load_values(X, S, row, block, real, K, x_stride, s_row, s_column, SOURCE)
        # Without groups the padding of the scales is written too, in whole vectors.
        scale_mask = real if TABLE is not None else row < ys_stride
        write_rows(x, Y, YS, row, block, K, ys_stride, real, scale_mask, POWER_OF_TWO)


@triton.jit
def blocks_kernel(W, Y, YT, S, N, K):
    """W [E, N, K] -> codes Y [E, N, K] and YT [E, K, N], scales S [E, N/128, K/128]. Grid: one program a block."""
    row_blocks, column_blocks = tl.cdiv(N, 128), tl.cdiv(K, 128)
    index = tl.program_id(0).to(tl.int64)
    matrix = (index // (row_blocks * column_blocks)) * N * K
    row = (((index // column_blocks) % row_blocks) * 128 + tl.arange(0, 128))[:, None]
    column = ((index % column_blocks) * 128 + tl.arange(0, 128))[None, :]
    inside = (row < N) & (column < K)
    x = tl.load(W + matrix + row * K + column, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(tl.max(largest_bits(x, 1), 0, keep_dims=True), E4M3_MAX, False)
    codes = (x * inverse).to(tl.float8e4nv)
    tl.store(Y + matrix + row * K + column, codes, mask=inside)
    row, column = tl.trans(row), tl.trans(column)
    tl.store(YT + matrix + column * N + row, tl.trans(codes), mask=(row < N) & (column < K))
    tl.store(S + index + tl.zeros_like(scale).to(tl.int64), scale)


@triton.jit(do_not_specialize=["M", "s_batch", "s_row", "s_column"])
def values_kernel(
    X,
    S,
    Y,
    M,
    K,
    x_batch,
    x_stride,
    y_batch,
    y_stride,
    s_batch,
    s_row,
    s_column,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Codes X [E, M, K] times scales S [E, M/ROW_TILE, K/COLUMN_TILE] -> Y, rounded to its type. Grid: (row blocks
    times column blocks, E)."""
    blocks = tl.cdiv(K, 128)
    block, batch = tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    row = ((tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    column = block * 128 + tl.arange(0, 128)[None, :]
    inside = (row < M) & (column < K)
    x = tl.load(X + batch * x_batch + row * x_stride + column, mask=inside, other=0.0)
    if COLUMN_TILE == 1:
        # The rows of a program lie in one tile.
        tile = (tl.program_id(0) // blocks) * BLOCK_M // ROW_TILE
        scale = tl.load(S + batch * s_batch + tile * s_row + column.to(tl.int64) * s_column, mask=column < K, other=1.0)
    else:
        scale_at = S + batch * s_batch + (row // ROW_TILE) * s_row + block * s_column
        scale = tl.load(scale_at, mask=row < M, other=1.0)
    y = (code_values(x, SOURCE) * scale).to(Y.dtype.element_ty)
    tl.store(Y + batch * y_batch + row * y_stride + column, y, mask=inside)
