"""E5M6 of `kernels.e5m6` as Triton kernels: the same codes bit for bit, NaN apart, which has many.

Row scales have the rows contiguous; `decode_columns` is one kernel, with the layout of `kernels.hopper.quantize`. BF16
and FP32 are computed here; other float types by the definition itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import e5m6 as definition
from kernels.e5m6 import E5M6
from kernels.hopper.layout import empty, readable, row_scales
from kernels.hopper.quantize import (
    FLOATS,
    ROW_BLOCK,
    columns_variant,
    decode_values,
    quantize_along_tokens,
    values_variant,
)
from kernels.hopper.quantize_kernels import largest_bits, scale_and_inverse
from kernels.hopper.variant import Variant
from kernels.quantize import WIDTH_MULTIPLE, Quantized
from kernels.tiles import TILE, tile_count

E5M6_MAX = tl.constexpr(definition.E5M6_MAX)
SMALLEST_NORMAL = tl.constexpr(2.0**-14)
# See `kernels.e5m6`: added and taken away again, it leaves six mantissa bits.
ROUNDER = tl.constexpr(1.5 * 2.0**17)
ENCODE_WARPS = 4


def encode(x_MK: Tensor) -> E5M6:
    """[M, K] -> codes [M, K], scale [M, ceil(K/128)]. K: any multiple of 16."""
    if x_MK.dtype not in FLOATS or x_MK.ndim != 2:
        return definition.encode(x_MK)
    check_width(x_MK, "encode")
    x = readable(x_MK)
    (rows, columns), device = x.shape, x.device
    codes, scale = empty((rows, columns), torch.int16, device), row_scales(rows, columns, device)
    grid = tile_count(rows, ROW_BLOCK) * tile_count(columns, TILE)
    if grid:
        encode_kernel[(grid,)](
            x,
            codes,
            scale,
            rows,
            columns,
            x.stride(0),
            scale.stride(1),
            BLOCK_M=ROW_BLOCK,
            num_warps=ENCODE_WARPS,
        )
    return E5M6(codes, scale)


def decode(q: E5M6, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, K]; exact in FP32, rounded once to BF16."""
    if dtype not in FLOATS:
        return definition.decode(q, dtype)
    check_width(q.codes, "decode")
    return decode_values(readable(q.codes), q.scale, dtype, 1, TILE, "e5m6")


def decode_columns(q: E5M6, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Decoded and quantised along tokens with power-of-two scales, without writing the values.

    Rounding to `dtype` changes no code: seven significant bits under a power of two are exact in BF16, except for
    numbers so small that they become zero.
    """
    if dtype not in FLOATS:
        return definition.decode_columns(q, dtype)
    check_width(q.codes, "decode_columns")
    return quantize_along_tokens(readable(q.codes), q.scale, True, None, "e5m6")


def check_width(matrix: Tensor, name: str) -> None:
    """ValueError: the kernels read 16 columns at a time."""
    if matrix.shape[1] % WIDTH_MULTIPLE:
        raise ValueError(
            f"E5M6 {name}: matrix of shape {tuple(matrix.shape)}; allowed are columns in multiples of "
            f"{WIDTH_MULTIPLE}: choose such a width or the torch back end"
        )


@triton.jit(do_not_specialize=["M"])
def encode_kernel(X, Y, S, M, K, x_stride, s_stride, BLOCK_M: tl.constexpr):
    """X [M, K] -> codes Y [M, K], scales S [K/128, s_stride]. Grid: row blocks times column blocks."""
    blocks = tl.cdiv(K, 128)
    block = tl.program_id(0) % blocks
    row = ((tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = block * 128 + tl.arange(0, 128)[None, :]
    inside = (row < M) & (column < K)
    x = tl.load(X + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_and_inverse(largest_bits(x, 1), E5M6_MAX, True)
    # Nothing to saturate: the scale is a power of two of at least amax / 65024, so the product is exact and in range.
    x = x * inverse
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    rounder = tl.maximum(binade, SMALLEST_NORMAL) * ROUNDER
    half = ((x + rounder) - rounder).to(tl.float16)
    codes = (half.to(tl.int16, bitcast=True) >> 4) & 0xFFF
    tl.store(Y + row.to(tl.int64) * K + column, codes, mask=inside)
    tl.store(S + block * s_stride + row, scale, mask=row < s_stride)


def variants() -> list[Variant]:
    """Every form of the kernels that these functions launch."""
    found = []
    for pointer in FLOATS.values():
        found.append(
            Variant(
                name=f"e5m6 encode {pointer[1:]}",
                kernel=encode_kernel,
                signature={"X": pointer, "Y": "*i16", "S": "*fp32"}
                | dict.fromkeys(("M", "K", "x_stride", "s_stride"), "i32"),
                constants={"BLOCK_M": ROW_BLOCK},
                aligned=("X", "Y", "S", "K", "x_stride", "s_stride"),
                num_warps=ENCODE_WARPS,
            )
        )
        found.append(values_variant("e5m6", "*i16", pointer, 1, TILE, f"e5m6 decode {pointer[1:]}"))
    return [*found, columns_variant("e5m6", "*i16", True, False, False, "e5m6 decode columns")]
