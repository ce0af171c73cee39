"""Operands as libraries want them: rows contiguous along the summed dimension, scales along the other, padded.

Shapes: R rows, C columns, T tiles of 128 columns, M rows of all experts, P rows with every expert's group padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantize import Quantized
from kernels.tiles import TILE, tile_count


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple >= length."""
    return tile_count(length, multiple) * multiple


def padded_codes(data_RC: Tensor, rows: int, columns: int) -> Tensor:
    """E4M3 [R, C] in any order -> contiguous [rows, columns] with zeros beyond; `data` itself when it is that."""
    if data_RC.shape == (rows, columns):
        return data_RC.contiguous()
    codes = data_RC.view(torch.uint8)
    out = codes.new_zeros((rows, columns))
    out[: data_RC.shape[0], : data_RC.shape[1]].copy_(codes)
    return out.view(torch.float8_e4m3fn)


def tile_major_scale(scale_RT: Tensor, rows: int) -> Tensor:
    """Scales of 1x128 tiles [R, T] -> contiguous [T, rows], zeros beyond R."""
    if scale_RT.shape[0] == rows:
        return scale_RT.t().contiguous()
    out = scale_RT.new_zeros((scale_RT.shape[1], rows))
    out[:, : scale_RT.shape[0]].copy_(scale_RT.t())
    return out


def padded_block_scale(scale: Tensor) -> Tensor:
    """Scales of 128x128 blocks [R/128, C/128] -> contiguous, zero columns added to a multiple of 4, as cuBLAS reads
    them."""
    columns = round_up(scale.shape[1], 4)
    if scale.shape[1] == columns:
        return scale.contiguous()
    out = scale.new_zeros((scale.shape[0], columns))
    out[:, : scale.shape[1]].copy_(scale)
    return out


def padded_rows_of(q: Quantized, rows: int) -> Quantized:
    """1x128 tiles [R, C] -> contiguous [rows, C], zero codes and scales beyond R."""
    scale = tile_major_scale(q.scale, rows).t()
    return Quantized(padded_codes(q.data, rows, q.columns), scale)


@dataclass(frozen=True)
class Groups:
    """Rows of experts, each expert's group padded to a multiple of `alignment`."""

    counts: tuple[int, ...]
    alignment: int

    @classmethod
    def of(cls, counts: Sequence[int], alignment: int) -> Groups:
        return cls(tuple(int(count) for count in counts), alignment)

    @property
    def padded(self) -> tuple[int, ...]:
        """Rows that each group takes."""
        return tuple(round_up(count, self.alignment) for count in self.counts)

    @property
    def whole(self) -> bool:
        """Nothing is padded."""
        return self.padded == self.counts

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first padded row, end) of every group that has rows."""
        found, first = [], 0
        for expert, rows in enumerate(self.padded):
            if rows:
                found.append((expert, first, first + rows))
            first += rows
        return found

    def pad(self, matrix: Tensor) -> Tensor:
        """[M, C] -> [P, C], zeros in the padding; `matrix` itself when nothing is padded."""
        if self.whole:
            return matrix
        bytes_wide = matrix.view(torch.uint8) if matrix.dtype == torch.float8_e4m3fn else matrix
        out = bytes_wide.new_zeros((sum(self.padded), matrix.shape[1]))
        return out.index_copy_(0, self.position(matrix.device), bytes_wide).view(matrix.dtype)

    def pad_tiles(self, q: Quantized) -> Quantized:
        """1x128 tiles [M, C] -> contiguous [P, C]."""
        return Quantized(self.pad(q.data).contiguous(), self.pad(q.scale))

    def unpad(self, matrix: Tensor) -> Tensor:
        """[P, C] -> [M, C]."""
        return matrix if self.whole else matrix.index_select(0, self.position(matrix.device))

    def position(self, device: torch.device) -> Tensor:
        """int64 [M]: where each row lies among the padded rows."""
        shift, total = [], 0
        for count, rows in zip(self.counts, self.padded, strict=True):
            shift.append(total)
            total += rows - count
        numbers, rows = from_host((shift, self.counts), torch.int64, device), sum(self.counts)
        return numbers[0].repeat_interleave(numbers[1], output_size=rows) + torch.arange(rows, device=device)

    def expert_of_row(self, device: torch.device) -> Tensor:
        """int32 [P]: each row's expert, -1 for padding."""
        counts = from_host(self.counts, torch.int64, device)
        experts = torch.arange(len(self.counts), dtype=torch.int32, device=device)
        experts = experts.repeat_interleave(counts, output_size=sum(self.counts))
        if self.whole:
            return experts
        out = experts.new_full((sum(self.padded),), -1)
        return out.index_copy_(0, self.position(device), experts)


def from_host(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On `device` without the host waiting: copied from pinned memory."""
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def row_scales_of_blocks(scale: Tensor, rows: int) -> Tensor:
    """Scales of 128x128 blocks [R/128, T] -> one for each row [rows, T]: blocks read as 1x128 tiles."""
    return scale.repeat_interleave(TILE, 0)[:rows]
