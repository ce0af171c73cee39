"""Block-scaled FP8 in a folder: `weight` E4M3 and `weight_scale_inv` FP32, one scale per 128 x 128 block, value =
code * scale (V3 section 3.3).

Quantising again what was read from FP8 gives the same codes wherever a block's largest code is +-448, as in every block
that this file or DeepSeek's rule scale = amax / 448 makes: the amax is then code 448 times the scale again. The scale
itself comes back to within one unit in the last place from FP32 (448 * scale is rounded, then divided by 448), and to
within BF16's rounding from BF16.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.quantize import WIDTH_MULTIPLE, Quantized, dequantize, quantize_blocks
from kernels.tiles import TILE

FP8 = torch.float8_e4m3fn
NAN_CODE = 0x7F


def to_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (E4M3 [N, K], FP32 [ceil(N / 128), ceil(K / 128)]). Any widths: zeros that fill the last 16 leave every
    amax as it is.
    """
    rows, columns = weight_NK.shape
    quantized = quantize_blocks(functional.pad(weight_NK, (0, -columns % WIDTH_MULTIPLE, 0, -rows % WIDTH_MULTIPLE)))
    return quantized.data[:rows, :columns].contiguous(), quantized.scale


def from_blocks(codes_RK: torch.Tensor, scale: torch.Tensor, first_row: int) -> torch.Tensor:
    """Rows [first_row, first_row + R) of a weight in FP32, from their codes and the scales of the blocks they touch.

    ValueError: a NaN code, or a scale that is not finite; both would otherwise become ordinary numbers or spread.
    """
    if bool(((codes_RK.view(torch.uint8) & NAN_CODE) == NAN_CODE).any()):
        raise ValueError("holds NaN")
    if not bool(scale.isfinite().all()):
        raise ValueError("has a scale that is not finite")
    blocks = torch.arange(first_row, first_row + codes_RK.shape[0]) // TILE - first_row // TILE
    return dequantize(Quantized(codes_RK, scale.index_select(0, blocks)))
