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

from kernels.tiles import TILE, multiply_tiles, tile_scales

E5M6_MAX = 65024.0
_SMALLEST_NORMAL = 2.0**-14
# FP32 numbers in [8, 16) are 2^-20 apart, E5M6's subnormal step: adding and taking away 12 rounds to it, ties to even.
_SUBNORMAL_ROUNDER = 12.0


@dataclass(frozen=True, eq=False)
class E5M6:
    """codes: int16 [M, K], 0 to 4095. scale: FP32 [M, ceil(K/128)], powers of two. value = scale * from_codes(code)."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


def encode(x_MK: Tensor) -> E5M6:
    """[M, K] of any float dtype (first rounded to FP32) -> codes; scale = 2^ceil(log2(max(amax, 1e-4) / 65024))."""
    if x_MK.ndim != 2 or not x_MK.is_floating_point():
        raise ValueError(f"E5M6 encode: {x_MK.dtype} of shape {tuple(x_MK.shape)}; allowed is a float matrix")
    values = x_MK.contiguous().to(torch.float32)
    scale = tile_scales(values, 1, TILE, E5M6_MAX, power_of_two=True)
    return E5M6(to_codes(multiply_tiles(values, scale.reciprocal(), 1, TILE, out=torch.empty_like(values))), scale)


def decode(q: E5M6, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, K]; exact in FP32 and float64, rounded once to any other dtype."""
    values = from_codes(q.codes)
    return multiply_tiles(values, q.scale, 1, TILE, out=values).to(dtype)


def to_codes(values: Tensor) -> Tensor:
    """FP32 -> int16 codes: round to nearest, ties to even; saturates at +-65024, infinities too; NaN stays NaN."""
    values = values.clamp(-E5M6_MAX, E5M6_MAX)
    bits = values.view(torch.int32)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).view(torch.float32)
    subnormal = (values + _SUBNORMAL_ROUNDER).sub_(_SUBNORMAL_ROUNDER).copysign_(values)
    rounded = torch.where(values.abs() < _SMALLEST_NORMAL, subnormal, normal)
    # A NaN's bits may round to anything.
    rounded = torch.where(values.isnan(), values, rounded)
    return (rounded.to(torch.float16).view(torch.int16) >> 4).bitwise_and_(0xFFF)


def from_codes(codes: Tensor) -> Tensor:
    """int16 codes 0 to 4095 -> FP32."""
    return (codes << 4).view(torch.float16).to(torch.float32)
