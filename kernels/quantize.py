"""Block-scaled FP8 (E4M3), DeepSeek-V3 section 3.3: 1x128 tiles for activations, 128x128 blocks for weights.

Shapes: M tokens (rows), K and N features, E experts, P rows of all groups with each group padded to a multiple of
128. A stored number is `round(x * (1 / scale))`, to nearest, ties to even, with `scale = max(amax, 2^-100) / 448` in
FP32, or the next power of two. Nothing overflows: amax maps to 448. Inputs of any float dtype are first rounded to
FP32, the precision of the scales.

`dequantize_reference` is the definition; `dequantize` does the same without torch's CPU cast from FP8, which takes ten
times as long. They differ for the NaN code only, which the quantisers write under a non-finite scale alone: there both
give a non-finite number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.tiles import TILE, multiply_tiles, scales_from_amax, tile_amax, tile_count

E4M3_MAX = 448.0
WIDTH_MULTIPLE = 16
ROW_TILE = "1x128"
BLOCK_TILE = "128x128"


@dataclass(frozen=True, eq=False)
class Quantized:
    """FP8 numbers and their scales.

    data: float8_e4m3fn, [rows, columns] or stacked [E, rows, columns]; not always contiguous: the transposed
    quantisers return a transposed view. scale: FP32, [rows, ceil(columns/128)] for 1x128 tiles, [..., ceil(rows/128),
    ceil(columns/128)] for 128x128 blocks. counts: rows of each group when the columns are groups of tokens, each
    padded with zeros to a multiple of 128 (`quantize_columns(..., counts=...)`). memo: see `remember`. transposed:
    the same codes as a contiguous matrix [..., columns, rows], which a tensor core needs where a product sums over
    the rows (dgrad of a weight in blocks); the scales are those of `scale`, transposed.
    """

    data: Tensor
    scale: Tensor
    counts: tuple[int, ...] | None = None
    memo: list[Tensor] | None = field(default=None, repr=False)
    transposed: Tensor | None = field(default=None, repr=False)

    def remember(self) -> Quantized:
        """The same numbers, whose FP32 values are kept once computed: for weights, which many products use.

        Four more bytes per number, on back ends that multiply in FP32. What `dequantize` returns must not be changed.
        """
        return Quantized(self.data, self.scale, self.counts, [], self.transposed)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def rows(self) -> int:
        return self.data.shape[-2]

    @property
    def columns(self) -> int:
        return self.data.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def tile(self) -> str:
        """Tile kind as the shapes tell it: "1x128", "128x128", or "other". A single row fits both: "1x128"."""
        return next((kind for kind in (ROW_TILE, BLOCK_TILE) if self.has_tile(kind)), "other")

    def has_tile(self, kind: str) -> bool:
        """Whether the scale's shape is that of tile kind "1x128" or "128x128"."""
        *lead, rows, columns = self.data.shape
        if kind == ROW_TILE and lead:
            return False
        scale_rows = rows if kind == ROW_TILE else tile_count(rows, TILE)
        return self.scale.shape == (*lead, scale_rows, tile_count(columns, TILE))

    def index_rows(self, index: Tensor | slice) -> Quantized:
        """Rows [i, columns] of 1x128 tiles, by an integer tensor (copied) or a slice (a view)."""
        if not self.has_tile(ROW_TILE):
            raise ValueError(f"rows can be taken from 1x128 tiles only; data {tuple(self.shape)} has {self.tile} tiles")
        codes = self.data.view(torch.uint8)
        if isinstance(index, slice):
            return Quantized(codes[index].view(torch.float8_e4m3fn), self.scale[index])
        return Quantized(codes.index_select(0, index).view(torch.float8_e4m3fn), self.scale.index_select(0, index))

    def to_bytes(self) -> Tensor:
        """uint8 [rows, columns + 4 * ceil(columns/128)]: a row's codes, then its scales, for transports without FP8."""
        if not self.has_tile(ROW_TILE):
            raise ValueError(f"only 1x128 tiles are sent by row; data {tuple(self.shape)} has {self.tile} tiles")
        return torch.cat((self.data.view(torch.uint8), self.scale.contiguous().view(torch.uint8)), dim=1)

    @staticmethod
    def row_bytes(columns: int) -> int:
        """Width in bytes of `to_bytes` for rows of `columns` numbers."""
        return columns + 4 * tile_count(columns, TILE)

    @classmethod
    def from_bytes(cls, packed: Tensor, columns: int) -> Quantized:
        """The inverse of `to_bytes`; `packed` uint8 [rows, row_bytes(columns)]."""
        if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != cls.row_bytes(columns):
            raise ValueError(
                f"packed rows are {tuple(packed.shape)} of {packed.dtype}; {columns} columns need uint8 rows of "
                f"{cls.row_bytes(columns)} bytes"
            )
        data, scale = packed.split((columns, packed.shape[1] - columns), dim=1)
        return cls(data.contiguous().view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32))


def quantize_rows(x_MK: Tensor, power_of_two: bool = False) -> Quantized:
    """[M, K] -> data [M, K], scale [M, ceil(K/128)]: one scale per row and 128 columns. K: any multiple of 16."""
    check_matrix(x_MK, "quantize_rows")
    return Quantized(*_quantize(x_MK.contiguous(), 1, TILE, power_of_two))


def quantize_blocks(w_NK: Tensor) -> Quantized:
    """[N, K] or stacked [E, N, K] -> data of that shape, scale [..., ceil(N/128), ceil(K/128)]: one scale per block."""
    check_weight(w_NK)
    return Quantized(*_quantize(w_NK.contiguous(), TILE, TILE, False))


def quantize_columns(x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """X [M, K] -> its transpose quantised along tokens, for the weight gradient: data [K, M], scale [K, ceil(M/128)].

    With `counts` (rows per expert, in order, summing to M) no tile crosses a group: each group is padded with zeros
    to a multiple of 128 rows, data [K, P], scale [K, P/128]; an empty group takes no columns.
    """
    check_matrix(x_MK, "quantize_columns")
    if counts is not None:
        return _quantize_groups(x_MK.contiguous(), tuple(int(count) for count in counts), power_of_two)
    data, scale = _quantize(x_MK.contiguous(), TILE, 1, power_of_two)
    return Quantized(data.t(), scale.t())


def quantize_both(
    x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
) -> tuple[Quantized, Quantized]:
    """(`quantize_rows`, `quantize_columns`) of one matrix."""
    return quantize_rows(x_MK, power_of_two), quantize_columns(x_MK, power_of_two, counts)


def requantize_columns(q_MK: Quantized, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """`quantize_columns` of stored 1x128 tiles: dequantised, transposed, quantised again (V3 section 3.5.2)."""
    check_row_tiles(q_MK)
    return quantize_columns(dequantize(q_MK), power_of_two, counts)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Code times scale, rounded to FP32 (exact for power-of-two scales), then to `dtype`; exact for float64.

    Same shape as `q.data`, and the same memory order.
    """
    if dtype == torch.float64:
        return dequantize_reference(q, dtype)
    if q.memo:
        return q.memo[0].to(dtype)
    transposed = q.data.ndim == 2 and not q.data.is_contiguous() and q.data.t().is_contiguous()
    row_tile, column_tile = (1 if q.has_tile(ROW_TILE) else TILE), TILE
    data, scale = q.data, q.scale
    if transposed:
        data, scale, row_tile, column_tile = data.t(), scale.t(), column_tile, row_tile
    values = _decode(data.contiguous())
    # 256 undoes the exponent bias of `_decode`; folding it into the scale is exact and saves a pass.
    multiply_tiles(values, scale * 256.0, row_tile, column_tile, out=values)
    values = values.t() if transposed else values
    if q.memo is not None:
        q.memo.append(values)
    return values.to(dtype)


def dequantize_reference(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition: each scale repeated over its tile, times torch's own value of the code."""
    compute = torch.promote_types(dtype, torch.float32)
    scale = q.scale.to(compute).repeat_interleave(TILE, -1)[..., : q.columns]
    if not q.has_tile(ROW_TILE):
        scale = scale.repeat_interleave(TILE, -2)[..., : q.rows, :]
    return (q.data.to(compute) * scale).to(dtype)


def dequantize_groups(q: Quantized) -> Tensor:
    """Column-quantised groups [K, P] -> FP32 [K, M], the padding left out; the numbers are those of `dequantize`."""
    if q.counts is None:
        raise ValueError(f"dequantize_groups: data {tuple(q.shape)} was quantised without counts")
    values = _decode(q.data.view(torch.uint8).t().index_select(0, _padded_position(q.counts, q.device)))
    return values.mul_(_spread((q.scale * 256.0).t(), q.counts)).t()


def padded_rows(count: int) -> int:
    """Rows that a group of `count` rows takes in a column-quantised matrix."""
    return tile_count(count, TILE) * TILE


def choose_scales(amax: Tensor, power_of_two: bool) -> Tensor:
    """FP32 scales of tiles from their largest absolute values, of any shape; overwrites `amax`.

    All quantisers here call this and `round_to_codes` by these names and write no number another way, so that a study
    of another format replaces the two.
    """
    return scales_from_amax(amax, E4M3_MAX, power_of_two)


def round_to_codes(scaled: Tensor) -> Tensor:
    """FP32 numbers, already divided by their scales, to the nearest E4M3 number, ties to even; may overwrite them."""
    return scaled.to(torch.float8_e4m3fn)


def _quantize(x: Tensor, row_tile: int, column_tile: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [..., R, C] contiguous -> E4M3 data of that shape, FP32 scale."""
    values = x.to(torch.float32)
    scale = choose_scales(tile_amax(values, row_tile, column_tile), power_of_two)
    scaled = values if values is not x else torch.empty_like(values)
    multiply_tiles(values, scale.reciprocal(), row_tile, column_tile, out=scaled)
    return round_to_codes(scaled), scale


def _decode(data: Tensor) -> Tensor:
    """E4M3 codes -> FP32 values divided by 256; the NaN codes become +-480/256.

    E4M3 seee emmm moved into an FP16 pattern s0ee eemm m... keeps its meaning, subnormals too, but for the exponent
    bias (15 instead of 7: a factor of 2^-8). The sign arrives in its place by sign extension.
    """
    pattern = data.view(torch.int8).to(torch.int16)
    pattern.mul_(128).bitwise_and_(-0x4080)
    return pattern.view(torch.float16).to(torch.float32)


def _quantize_groups(x_MK: Tensor, counts: tuple[int, ...], power_of_two: bool) -> Quantized:
    """`quantize_columns` with groups: only real rows are computed with, the padding is bytes."""
    check_counts(counts, x_MK.shape[0])
    values = x_MK.to(torch.float32)
    padded = sum(map(padded_rows, counts))
    amax = values.new_empty((padded // TILE, x_MK.shape[1]))
    for tile, rows in enumerate(values.abs().split(_tile_rows(counts))):
        torch.amax(rows, 0, out=amax[tile])
    scale = choose_scales(amax, power_of_two)
    codes = round_to_codes(values * _spread(scale.reciprocal(), counts)).view(torch.uint8)
    data = codes.new_zeros((padded, x_MK.shape[1])).index_copy_(0, _padded_position(counts, codes.device), codes)
    return Quantized(data.view(torch.float8_e4m3fn).t(), scale.t(), counts)


def _tile_rows(counts: tuple[int, ...]) -> list[int]:
    """Real rows of each tile: no tile holds rows of two groups."""
    return [min(TILE, count - first) for count in counts for first in range(0, count, TILE)]


def _spread(per_tile: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[tiles, K] -> [M, K]: each real row gets its tile's values."""
    repeats = _from_host(_tile_rows(counts), per_tile.device)
    return per_tile.repeat_interleave(repeats, 0, output_size=sum(counts))


def _padded_position(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [M]: where each real row lies among the padded rows."""
    shift, total = [], 0
    for count in counts:
        shift.append(total)
        total += padded_rows(count) - count
    groups, rows = _from_host((shift, counts), device), sum(counts)
    return groups[0].repeat_interleave(groups[1], output_size=rows) + torch.arange(rows, device=device)


def _from_host(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """int64 on `device`, without the host waiting for it: copied from pinned memory."""
    pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def check_matrix(x_MK: Tensor, name: str) -> None:
    """ValueError: the quantiser `name` cannot take this matrix."""
    if x_MK.ndim != 2 or x_MK.shape[1] % WIDTH_MULTIPLE or not x_MK.is_floating_point():
        raise ValueError(
            f"{name}: {x_MK.dtype} of shape {tuple(x_MK.shape)}; allowed is a float matrix [rows, columns], columns "
            f"a multiple of {WIDTH_MULTIPLE}: choose such a width or leave this layer unquantised"
        )


def check_weight(w_NK: Tensor) -> None:
    """ValueError: `quantize_blocks` cannot take this weight."""
    fits = w_NK.ndim in (2, 3) and not w_NK.shape[-1] % WIDTH_MULTIPLE and not w_NK.shape[-2] % WIDTH_MULTIPLE
    if not fits or not w_NK.is_floating_point():
        raise ValueError(
            f"quantize_blocks: weight {w_NK.dtype} of shape {tuple(w_NK.shape)}; allowed is a float [N, K] or "
            f"[E, N, K] with N and K multiples of {WIDTH_MULTIPLE}: choose such widths or leave this layer unquantised"
        )


def check_counts(counts: Sequence[int], rows: int) -> None:
    """ValueError: these are not the rows of the groups of a matrix of `rows` rows."""
    if sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(
            f"quantize_columns: counts {tuple(counts)} sum to {sum(counts)}; the matrix has {rows} rows, each group 0 "
            "or more"
        )


def check_row_tiles(q_MK: Quantized) -> None:
    """ValueError: `requantize_columns` cannot take these tiles."""
    if not q_MK.has_tile(ROW_TILE):
        raise ValueError(f"requantize_columns takes 1x128 tiles; data {tuple(q_MK.shape)} has {q_MK.tile} tiles")
