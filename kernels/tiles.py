"""Scales over tiles of a matrix: the part that every block-scaled format shares.

A matrix [..., R, C] is cut into tiles of `row_tile` x `column_tile`; the last tile of a row or column covers what is
left, so no padding enters a maximum. Each tile has one FP32 scale with `value = scale * stored number`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

TILE = 128
# Keeps scales and their reciprocals normal numbers, and nothing more. DeepSeek's published activation quantiser has
# 1e-4: most gradients lie under it when the loss is a mean over a few thousand tokens, and at V3's 63 million a step
# they would all become zero.
AMAX_FLOOR = 2.0**-100


def tile_count(length: int, tile: int) -> int:
    """Tiles that cover `length` elements."""
    return -(-length // tile)


@lru_cache(4096)
def _spans(length: int, tile: int) -> list[tuple[slice, slice, int]]:
    """(elements, tiles, tile length) of the whole tiles, then of the edge tile."""
    whole = length // tile
    spans = [(slice(0, whole * tile), slice(0, whole), tile)] if whole else []
    if length % tile:
        spans.append((slice(whole * tile, length), slice(whole, whole + 1), length % tile))
    return spans


def tiled(matrix: Tensor, scale: Tensor, row_tile: int, column_tile: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views that pair tiles with their scales, for at most four regions (whole and edge tiles, both ways).

    matrix [..., R, C], scale [..., tiles of R, tiles of C] -> pairs ([..., a, row_tile, b, column_tile], [..., a, b]).
    """
    lead = matrix.shape[:-2]
    row_spans, column_spans = _spans(matrix.shape[-2], row_tile), _spans(matrix.shape[-1], column_tile)
    for rows, scale_rows, row_length in row_spans:
        for columns, scale_columns, column_length in column_spans:
            region, scales = matrix, scale
            if len(row_spans) + len(column_spans) > 2:
                region, scales = matrix[..., rows, columns], scale[..., scale_rows, scale_columns]
            yield region.view(*lead, scales.shape[-2], row_length, scales.shape[-1], column_length), scales


def ceil_power_of_two(scale: Tensor) -> Tensor:
    """Smallest power of two >= scale (FP32, positive, normal); NaN and infinity give NaN."""
    up = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    # Zero, or NaN where the scale is not finite: integer arithmetic alone would make a NaN an ordinary number.
    return up.add_(scale * 0.0)


def tile_amax(matrix: Tensor, row_tile: int, column_tile: int) -> Tensor:
    """Largest absolute value of each tile, [..., tiles of R, tiles of C], in the matrix's dtype."""
    *lead, rows, columns = matrix.shape
    amax = matrix.new_empty((*lead, tile_count(rows, row_tile), tile_count(columns, column_tile)))
    for tiles, tile_largest in tiled(matrix.abs(), amax, row_tile, column_tile):
        tile_largest.copy_(tiles.amax((-3, -1)))
    return amax


def tile_scales(matrix: Tensor, row_tile: int, column_tile: int, largest: float, power_of_two: bool) -> Tensor:
    """FP32 scales [..., tiles of R, tiles of C]: max(amax, 2^-100) / largest, rounded up to a power of two when asked.

    A NaN or infinity in a tile makes its scale NaN or infinite: it cannot be lost on the way.
    """
    return scales_from_amax(tile_amax(matrix, row_tile, column_tile), largest, power_of_two)


def scales_from_amax(amax: Tensor, largest: float, power_of_two: bool) -> Tensor:
    """max(amax, 2^-100) / largest, rounded up to a power of two when asked; overwrites `amax`."""
    # A tensor on the device: torch turns the division of a CUDA tensor by a number into a product with its reciprocal.
    scale = amax.clamp_(min=AMAX_FLOOR).div_(amax.new_full((), largest))
    return ceil_power_of_two(scale) if power_of_two else scale


def multiply_tiles(matrix: Tensor, factor: Tensor, row_tile: int, column_tile: int, out: Tensor) -> Tensor:
    """out = matrix * its tile's factor. `out` may be `matrix`."""
    targets = tiled(out, factor, row_tile, column_tile)
    for (tiles, tile_factor), (target, _) in zip(tiled(matrix, factor, row_tile, column_tile), targets, strict=True):
        torch.mul(tiles, tile_factor[..., :, None, :, None], out=target)
    return out
