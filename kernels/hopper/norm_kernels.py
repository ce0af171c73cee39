"""Kernels of RMSNorm: rows with or without their E4M3 tiles, the result along tokens, and the gradients.

A program of the row kernels holds whole rows in registers; WIDTH is D rounded up to a power of two. Shapes: M rows, D
features, P padded tokens. All arithmetic is FP32, in the order of `kernels.norm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hopper.quantize_kernels import E4M3_MAX, largest_bits, scale_and_inverse, write_columns


@triton.jit
def inverse_rms(x, D, eps):
    """1 / rms [R, 1] of x [R, WIDTH], which is zero beyond D columns."""
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)


@triton.jit
def block_of_rows(M, D, block, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(row [R, 1], column [1, WIDTH], where both exist)."""
    row = (block * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    return row, column, (row < M) & (column < D)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    X, GAIN, Y, CODES, S, M, D, x_stride, s_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """X [M, D] -> Y [M, D] in its type; if CODES is given, the rounded Y's codes [M, D] and scales S [D/128, s_stride].
    Grid: row blocks, those of the padding of the scales included."""
    row, column, inside = block_of_rows(M, D, tl.program_id(0), ROWS, WIDTH)
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(GAIN + column, mask=column < D, other=0.0).to(tl.float32)
    y = (x * inverse_rms(x, D, eps) * gain).to(Y.dtype.element_ty)
    tl.store(Y + row * D + column, y, mask=inside)
    if CODES is not None:
        tiles = tl.reshape(y.to(tl.float32), (ROWS, WIDTH // 128, 128))
        scale, inverse = scale_and_inverse(largest_bits(tiles, 2), E4M3_MAX, POWER_OF_TWO)
        codes = tl.reshape(tiles * inverse, (ROWS, WIDTH)).to(tl.float8e4nv)
        tl.store(CODES + row * D + column, codes, mask=inside)
        block = tl.arange(0, WIDTH // 128)[None, :]
        scale_mask = (row < s_stride) & (block * 128 < D)
        tl.store(S + block * s_stride + row, tl.reshape(scale, (ROWS, WIDTH // 128)), mask=scale_mask)


@triton.jit(do_not_specialize=["M"])
def inverse_kernel(X, INVERSE, M, D, x_stride, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """X [M, D] -> INVERSE [M] FP32, 1 / rms of each row. Grid: row blocks."""
    row, column, inside = block_of_rows(M, D, tl.program_id(0), ROWS, WIDTH)
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(INVERSE + row, inverse_rms(x, D, eps), mask=row < M)


@triton.jit(do_not_specialize=["M"])
def columns_kernel(X, GAIN, INVERSE, YT, YTS, M, D, x_stride, padded):
    """X [M, D] -> codes YT [D, P] and scales YTS [P/128, D] along tokens of the normed X, rounded to X's type.
    Grid: P/128 token tiles times column blocks, the latter first."""
    blocks = tl.cdiv(D, 128)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = tile.to(tl.int64) * 128 + tl.arange(0, 128)[:, None]
    column = block * 128 + tl.arange(0, 128)[None, :]
    real = row < M
    x = tl.load(X + row * x_stride + column, mask=real & (column < D), other=0.0).to(tl.float32)
    gain = tl.load(GAIN + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.load(INVERSE + row, mask=real, other=0.0)
    y = (x * inverse * gain).to(X.dtype.element_ty).to(tl.float32)
    write_columns(y, YT, YTS, tile, block, real, D, padded, False)


@triton.jit(do_not_specialize=["M"])
def gradient_kernel(
    DY, X, GAIN, DX, PARTIAL, M, D, dy_stride, x_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DY, X [M, D] -> DX [M, D]; each program's share of dgain to its row of PARTIAL [programs, D] FP32. Persistent: a
    program takes every (number of programs)th row block, in order."""
    column = tl.arange(0, WIDTH)[None, :]
    gain = tl.load(GAIN + column, mask=column < D, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, column, inside = block_of_rows(M, D, block, ROWS, WIDTH)
        x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, D, eps)
        product = dy * x
        sums = tl.fma(product, inverse, sums)
        projection = tl.sum(product * gain, 1, keep_dims=True)
        projection = projection / -D * (inverse * inverse * inverse)
        dx = tl.fma(x, projection, dy * gain * inverse)
        tl.store(DX + row * D + column, dx.to(DX.dtype.element_ty), mask=inside)
    target = PARTIAL + tl.program_id(0).to(tl.int64) * D + tl.arange(0, WIDTH)
    tl.store(target, tl.sum(sums, 0), mask=tl.arange(0, WIDTH) < D)
