"""Memory layouts that the kernels of this package share, so that every access is of 16 bytes and TMA can read it.

Row scales are stored with tokens contiguous, padded; matrices quantised along tokens are stored [K, P] with P, the
tokens padded to whole tiles, contiguous. Shapes: M tokens (rows), K features, P padded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.quantize import padded_rows
from kernels.tiles import TILE, tile_count

# The launcher tells the compiler that a stride is aligned when 16 divides it.
ALIGNMENT = 16


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result. Every kernel's outputs come from here."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def readable(matrix: Tensor) -> Tensor:
    """The [..., R, C] matrix itself if its rows are aligned and its columns adjacent, else a copy that is so."""
    aligned = matrix.data_ptr() % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in matrix.stride()[:-1])
    if matrix.stride(-1) == 1 and aligned:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def row_scales(rows: int, columns: int, device: torch.device) -> Tensor:
    """FP32 [M, ceil(K/128)] with the rows contiguous; the stride between columns is padded to a multiple of 16.

    Kernels write the padding too: it holds finite numbers.
    """
    stride = -(-rows // ALIGNMENT) * ALIGNMENT
    return empty((tile_count(columns, TILE), stride), torch.float32, device)[:, :rows].t()


def column_tiles(features: int, padded: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(E4M3 [K, P], FP32 scale [K, P/128] whose memory is [P/128, K])."""
    data = empty((features, padded), torch.float8_e4m3fn, device)
    return data, empty((padded // TILE, features), torch.float32, device).t()


def tile_table(counts: Sequence[int], device: torch.device) -> Tensor:
    """int64 [2, P/128] on `device`, without a wait: first row of each tile, and how many of its rows are real.

    No tile holds rows of two groups; padded position = 128 * tile.
    """
    groups = torch.tensor(counts, dtype=torch.int64)
    tiles = (groups + TILE - 1) // TILE
    # Position of each tile in its group.
    inside = torch.arange(int(tiles.sum())) - (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
    first = (groups.cumsum(0) - groups).repeat_interleave(tiles) + TILE * inside
    real = (groups.repeat_interleave(tiles) - TILE * inside).clamp_(max=TILE)
    table = torch.stack((first, real))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def padded_total(counts: Sequence[int]) -> int:
    """P: rows of all groups, each padded to whole tiles."""
    return sum(map(padded_rows, counts))
