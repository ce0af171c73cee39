"""E5M6: the 12-bit format of the activation between attention and its output projection (DeepSeek-V3 section 3.3.3).

One sign, five exponent and six mantissa bits with FP16's bias, subnormals, infinities and NaN: FP16 without its last
four mantissa bits. 1x128 tiles, power-of-two scales: requantising along tokens in backward then multiplies exactly. A
code is stored in the low 12 bits of an int16.

Shapes: M tokens, K features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantize import Quantized, quantize_columns
from kernels.tiles import TILE, multiply_tiles, tile_scales

E5M6_MAX = 65024.0
_SMALLEST_NORMAL = 2.0**-14
# For x in [2^e, 2^(e+1)), x + 1.5 * 2^(e+17) lies where FP32 numbers are 2^(e-6) apart, E5M6's step: the sum is rounded
# to it, to nearest, ties to even, and taking the constant away again is exact.
_ROUNDER = 1.5 * 2.0**17


@dataclass(frozen=True, eq=False)
class E5M6:
    """codes: int16 [M, K], 0 to 4095. scale: FP32 [M, ceil(K/128)], powers of two. value = scale * from_codes(code)."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def encode(x_MK: Tensor) -> E5M6:
    """[M, K] of any float dtype (first rounded to FP32) -> codes; scale = 2^ceil(log2(max(amax, 2^-100) / 65024))."""
    if x_MK.ndim != 2 or not x_MK.is_floating_point():
        raise ValueError(f"E5M6 encode: {x_MK.dtype} of shape {tuple(x_MK.shape)}; allowed is a float matrix")
    values = x_MK.contiguous().to(torch.float32)
    scale = tile_scales(values, 1, TILE, E5M6_MAX, power_of_two=True)
    return E5M6(to_codes(multiply_tiles(values, scale.reciprocal(), 1, TILE, out=torch.empty_like(values))), scale)


def decode(q: E5M6, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, K]; exact in FP32 and float64, rounded once to any other dtype."""
    values = from_codes(q.codes)
    return multiply_tiles(values, q.scale, 1, TILE, out=values).to(dtype)


def decode_columns(q: E5M6, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Decoded, rounded to `dtype`, and quantised along tokens with power-of-two scales: data [K, M]."""
    return quantize_columns(decode(q, dtype), power_of_two=True)


def to_codes(values: Tensor) -> Tensor:
    """FP32 -> int16 codes: to nearest, ties to even; saturates at +-65024, infinities too; NaN stays NaN; no -0."""
    values = values.clamp(-E5M6_MAX, E5M6_MAX)
    binade = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    rounder = binade.clamp_(min=_SMALLEST_NORMAL).mul_(_ROUNDER)
    half = values.add_(rounder).sub_(rounder).to(torch.float16)
    return (half.view(torch.int16) >> 4).bitwise_and_(0xFFF)


def from_codes(codes: Tensor) -> Tensor:
    """int16 codes 0 to 4095 -> FP32."""
    return (codes << 4).view(torch.float16).to(torch.float32)
