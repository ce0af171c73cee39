"""Block-scaled FP8 products, both operands with the summed dimension last: the kernels of `gemm` and `grouped`.

Both are persistent (each program walks over tiles), load through tensor descriptors (zeros beyond an edge), and add the
product of every 128 of the summed dimension, from a fresh tensor-core accumulator, to FP32 sums with one FMA (V3
section 3.3.2).

With WARP_SPECIALIZED the compiler makes one warp group that loads and two that multiply 64 rows each. It does so for
bodies as simple as these only: 4 warps, descriptors made in the kernel, no value but the sums carried over blocks.
"""

# Arguments of a kernel have the types of its launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)


@triton.jit
def rasterise(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles are walked together, column by column."""
    band = GROUP * column_tiles
    first = tile // band * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + tile % band % height, tile % band // height


@triton.jit
def store_rows(out_ptr, sums, own_rows, end, first_column, columns, WIDTH: tl.constexpr):
    """The rows before `end` and the columns before `columns` of a tile; the others are not its own."""
    own_columns = first_column + tl.arange(0, WIDTH)
    places = out_ptr + own_rows[:, None].to(tl.int64) * columns + own_columns[None, :]
    inside = (own_rows[:, None] < end) & (own_columns[None, :] < columns)
    tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "row_tiles", "a_scale_block_stride"])
def rows_by_blocks(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    table_ptr,
    rows,
    row_tiles,
    experts,
    columns,
    depth,
    a_stride,
    a_scale_row_stride,
    a_scale_block_stride,
    b_scale_expert_stride,
    b_scale_row_stride,
    b_scale_block_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPED: tl.constexpr,
    WARP_SPECIALIZED: tl.constexpr,
):
    """out [M, N] = a [M, K] (1x128 tiles) . b [E, N, K]^T (128x128 blocks), in out's dtype.

    Not GROUPED: E is 1. GROUPED: table int32 [row tiles, 3] holds expert, first row and end of its rows for each row
    tile; a tile computes the rows after that end too, and does not store them.

    A tile of 192 columns is a product 128 wide and one 64 wide, in this order on even tiles and the other on odd ones:
    then neither crosses a block of b, each has one scale, and the second runs while the first is promoted.
    """
    NARROW: tl.constexpr = TILE_COLUMNS - BLOCK
    # A wide tile in FP32 leaves no room in shared memory for the descriptors' copy of it.
    BY_POINTERS: tl.constexpr = GROUPED or (NARROW > 0 and out_ptr.dtype.element_ty == tl.float32)
    a_desc = tl.make_tensor_descriptor(a_ptr, [rows, depth], [a_stride, 1], [TILE_ROWS, BLOCK])
    b_desc = tl.make_tensor_descriptor(b_ptr, [experts * columns, depth], [depth, 1], [BLOCK, BLOCK])
    if NARROW:
        narrow_b_desc = tl.make_tensor_descriptor(b_ptr, [experts * columns, depth], [depth, 1], [NARROW, BLOCK])
    if not BY_POINTERS:
        out_desc = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [TILE_ROWS, BLOCK])
        if NARROW:
            narrow_out_desc = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [TILE_ROWS, NARROW])
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    last_block = tl.cdiv(columns, BLOCK) - 1
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZED
    ):
        row_tile, column_tile = rasterise(tile, row_tiles, column_tiles, GROUP)
        if GROUPED:
            expert = tl.load(table_ptr + row_tile * 3)
            row = tl.load(table_ptr + row_tile * 3 + 1)
            end = tl.load(table_ptr + row_tile * 3 + 2)
        else:
            expert = 0
            row = row_tile * TILE_ROWS
            end = rows
        column = column_tile * TILE_COLUMNS
        narrow = column
        if NARROW:
            odd = column_tile % 2
            narrow = column + (1 - odd) * BLOCK
            column = column + odd * NARROW
        own_rows = row + tl.arange(0, TILE_ROWS)
        # What lies beyond an edge is not stored; its scales are read where there are some.
        a_scales = a_scale_ptr + tl.minimum(own_rows, rows - 1) * a_scale_row_stride
        expert_scales = b_scale_ptr + expert * b_scale_expert_stride
        b_scales = expert_scales + tl.minimum(column // BLOCK, last_block) * b_scale_row_stride
        sums = tl.zeros((TILE_ROWS, BLOCK), tl.float32)
        if NARROW:
            narrow_scales = expert_scales + tl.minimum(narrow // BLOCK, last_block) * b_scale_row_stride
            narrow_sums = tl.zeros((TILE_ROWS, NARROW), tl.float32)
        for block in tl.range(0, tl.cdiv(depth, BLOCK)):
            a = a_desc.load([row, block * BLOCK])
            b = b_desc.load([expert * columns + column, block * BLOCK])
            a_scale = tl.load(a_scales + block * a_scale_block_stride)
            b_scale = tl.load(b_scales + block * b_scale_block_stride)
            sums = tl.fma(tl.dot(a, b.T), (a_scale * b_scale)[:, None], sums)
            if NARROW:
                narrow_b = narrow_b_desc.load([expert * columns + narrow, block * BLOCK])
                narrow_scale = tl.load(narrow_scales + block * b_scale_block_stride)
                narrow_sums = tl.fma(tl.dot(a, narrow_b.T), (a_scale * narrow_scale)[:, None], narrow_sums)
        if BY_POINTERS:
            store_rows(out_ptr, sums, own_rows, end, column, columns, BLOCK)
            if NARROW:
                store_rows(out_ptr, narrow_sums, own_rows, end, narrow, columns, NARROW)
        else:
            out_desc.store([row, column], sums.to(out_ptr.dtype.element_ty))
            if NARROW:
                narrow_out_desc.store([row, narrow], narrow_sums.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "a_stride", "b_stride", "a_scale_block_stride", "b_scale_block_stride"])
def columns_by_columns(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    table_ptr,
    experts,
    rows,
    columns,
    tokens,
    a_stride,
    b_stride,
    a_scale_row_stride,
    a_scale_block_stride,
    b_scale_row_stride,
    b_scale_block_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WARP_SPECIALIZED: tl.constexpr,
):
    """out [E, M, N] FP32 = or += a [M, tokens] . b [N, tokens]^T, both in 1x128 tiles along tokens.

    Not GROUPED: E is 1. GROUPED: table int32 [E + 1] holds the first block of 128 tokens of every expert, then the
    number of blocks. An expert without tokens gets zeros, or is left as it is.

    The scales of b are read as even and odd columns: of 64 numbers each, they come straight into the places where the
    products of a thread are; 128 numbers would go through shared memory in every block.
    """
    a_desc = tl.make_tensor_descriptor(a_ptr, [rows, tokens], [a_stride, 1], [TILE_ROWS, BLOCK])
    b_desc = tl.make_tensor_descriptor(b_ptr, [columns, tokens], [b_stride, 1], [TILE_COLUMNS, BLOCK])
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    tiles = row_tiles * column_tiles
    for tile in tl.range(tl.program_id(0), experts * tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZED):
        expert = tile // tiles
        row_tile, column_tile = rasterise(tile % tiles, row_tiles, column_tiles, GROUP)
        if GROUPED:
            first_block = tl.load(table_ptr + expert)
            end_block = tl.load(table_ptr + expert + 1)
        else:
            first_block = 0
            end_block = tl.cdiv(tokens, BLOCK)
        row = row_tile * TILE_ROWS
        column = column_tile * TILE_COLUMNS
        own_rows = row + tl.arange(0, TILE_ROWS)
        own_columns = column + tl.arange(0, TILE_COLUMNS)
        # What lies beyond an edge is not stored; its scales are read where there are some: a mask would be computed
        # again in every block.
        a_scales = a_scale_ptr + tl.minimum(own_rows, rows - 1) * a_scale_row_stride
        even = tl.minimum(column + 2 * tl.arange(0, TILE_COLUMNS // 2), columns - 2)
        even_scales = b_scale_ptr + even * b_scale_row_stride
        sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for block in tl.range(first_block, end_block):
            a = a_desc.load([row, block * BLOCK])
            b = b_desc.load([column, block * BLOCK])
            a_scale = tl.load(a_scales + block * a_scale_block_stride)
            b_scale_even = tl.load(even_scales + block * b_scale_block_stride)
            b_scale_odd = tl.load(even_scales + b_scale_row_stride + block * b_scale_block_stride)
            b_scale = tl.join(b_scale_even, b_scale_odd).reshape(TILE_COLUMNS)
            sums = tl.fma(tl.dot(a, b.T) * a_scale[:, None], b_scale[None, :], sums)
        places = out_ptr + (expert * rows + own_rows)[:, None].to(tl.int64) * columns + own_columns[None, :]
        end = rows
        if ACCUMULATE:
            end = tl.where(first_block < end_block, rows, 0)
        inside = (own_rows[:, None] < end) & (own_columns[None, :] < columns)
        if ACCUMULATE:
            sums += tl.load(places, mask=inside, other=0.0)
        tl.store(places, sums, mask=inside)
