"""The FP8 recipe and what it is compared with: the quantisers of `kernels.quantize` with other numbers in them.

- recipe: E4M3 in 1x128 tiles and 128x128 blocks, as training runs it.
- e4m1: the same operands of the same products with one mantissa bit instead of three (largest number 384, smallest
  1/128): a positive control. A study that cannot tell it from the recipe cannot tell anything.
- per_tensor: E4M3 with one scale for a whole activation or gradient, and for each expert's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from kernels import quantize, swiglu
from kernels.quantize import E4M3_MAX, Quantized
from kernels.tiles import scales_from_amax

Scales = Callable[[Tensor, bool], Tensor]
Codes = Callable[[Tensor], Tensor]
E4M1_MAX = 384.0
_SMALLEST_NORMAL = 2.0**-6
# For x in [2^e, 2^(e+1)), x + 1.5 * 2^(e+22) lies where FP32 numbers are 2^(e-1) apart, E4M1's step: the sum is rounded
# to it, to nearest, ties to even, and taking the constant away again is exact.
_ROUNDER = 1.5 * 2.0**22


def e4m1_scales(amax: Tensor, power_of_two: bool) -> Tensor:
    """`quantize.choose_scales` for a format whose largest number is 384."""
    return scales_from_amax(amax, E4M1_MAX, power_of_two)


def e4m1_codes(scaled: Tensor) -> Tensor:
    """`quantize.round_to_codes` with one mantissa bit: E4M3 codes whose last two bits are zero."""
    binade = (scaled.view(torch.int32) & 0x7F800000).view(torch.float32)
    rounder = binade.clamp_(min=_SMALLEST_NORMAL).mul_(_ROUNDER)
    return (scaled + rounder).sub_(rounder).to(torch.float8_e4m3fn)


def per_tensor_scales(amax: Tensor, power_of_two: bool) -> Tensor:
    """`quantize.choose_scales` with the largest tile's scale in every tile of a matrix."""
    if amax.numel():
        amax.copy_(amax.amax((-2, -1), keepdim=True).expand_as(amax))
    return scales_from_amax(amax, E4M3_MAX, power_of_two)


# What takes the place of `choose_scales` and `round_to_codes`; None leaves it.
FORMATS: dict[str, tuple[Scales | None, Codes | None]] = {
    "recipe": (None, None),
    "e4m1": (e4m1_scales, e4m1_codes),
    "per_tensor": (per_tensor_scales, None),
}


@contextmanager
def quantised_as(name: str) -> Iterator[None]:
    """Every quantised operand of a product is written in this entry of FORMATS while the context is open.

    Reaches rows, columns, columns by group, blocks and requantised tiles, for they all go through the two functions
    of `kernels.quantize` that are replaced here. What is no operand stays as the recipe has it: the E5M6 attention
    output, and SwiGLU's cached input, whose tiles are E4M3 in every format. For this process and all its threads.
    """
    scales, codes = FORMATS[name]
    plain_scales, plain_codes = quantize.choose_scales, quantize.round_to_codes

    def tiles(gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Quantized, Quantized]:
        with replaced(plain_scales, plain_codes):
            kept = quantize.quantize_rows(gate_up)
        return kept, quantize.quantize_rows(swiglu.swiglu(gate_up, row_weight_M))

    with replaced(scales or plain_scales, codes or plain_codes), mock.patch.object(swiglu, "swiglu_tiles", tiles):
        yield


@contextmanager
def replaced(scales: Scales, codes: Codes) -> Iterator[None]:
    with mock.patch.object(quantize, "choose_scales", scales), mock.patch.object(quantize, "round_to_codes", codes):
        yield
