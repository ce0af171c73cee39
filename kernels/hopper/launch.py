"""Launching the GEMM kernels: strides, tables, programs, workspace."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hopper.gemm_kernels import columns_by_columns, rows_by_blocks
from kernels.hopper.tile import TileConfig
from kernels.tiles import TILE, tile_count

# Of an H100 or H800, for the interpreter.
STREAMING_MULTIPROCESSORS = 132
ALIGNMENT = 16
OUT_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def launch_rows(
    out: Tensor,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tile: TileConfig,
    num_sms: int | None = None,
    table: Tensor | None = None,
) -> None:
    """out [M, N] BF16 or FP32 = a [M, K] . b [N, K]^T, with a table of tiles b [E, N, K]; M at least 1.

    a_scale [M, ceil(K/128)], b_scale [..., ceil(N/128), ceil(K/128)], of any strides; a_scale is read fastest with
    neighbouring rows side by side. num_sms: programs at most, all multiprocessors of the device by default.
    """
    rows, depth = a.shape
    columns = b.shape[-2]
    a = with_aligned_rows(a)
    row_tiles = tile_count(rows, tile.rows) if table is None else table.shape[0]
    _start(
        rows_by_blocks,
        out,
        row_tiles * tile_count(columns, tile.columns),
        num_sms,
        (a, b, out, a_scale, b_scale, table, rows, row_tiles, b.numel() // (columns * depth), columns, depth)
        + (a.stride(0), *a_scale.stride(), 0 if b.ndim == 2 else b_scale.stride(0), *b_scale.stride()[-2:]),
        constants(tile, table is not None),
        tile.num_warps,
        tile.num_stages,
    )


def launch_columns(
    out: Tensor,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tile: TileConfig,
    num_sms: int | None = None,
    accumulate: bool = False,
    table: Tensor | None = None,
) -> None:
    """out [M, N] FP32 = or += a [M, T] . b [N, T]^T, with a table of blocks out [E, M, N]; T at least 1.

    a_scale [M, ceil(T/128)], b_scale [N, ceil(T/128)], of any strides, fastest with neighbouring rows side by side.
    """
    a, b = with_aligned_rows(a), with_aligned_rows(b)
    (rows, tokens), columns = a.shape, b.shape[0]
    experts = out.numel() // (rows * columns)
    _start(
        columns_by_columns,
        out,
        experts * tile_count(rows, tile.rows) * tile_count(columns, tile.columns),
        num_sms,
        (a, b, out, a_scale, b_scale, table, experts, rows, columns, tokens, a.stride(0), b.stride(0))
        + (*a_scale.stride(), *b_scale.stride()),
        constants(tile, table is not None) | {"ACCUMULATE": accumulate},
        tile.num_warps,
        tile.num_stages,
    )


def row_table(counts: tuple[int, ...], tile_rows: int, device: torch.device) -> Tensor:
    """int32 [tiles, 3]: (expert, first row, end of the expert's rows) of each tile of rows; none has two experts."""
    table, first = [], 0
    for expert, count in enumerate(counts):
        table += [(expert, row, first + count) for row in range(first, first + count, tile_rows)]
        first += count
    return _from_host(table, device)


def block_table(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [E + 1]: first block of 128 tokens of each group, padded to whole blocks, and how many there are."""
    table = [0]
    for count in counts:
        table.append(table[-1] + tile_count(count, TILE))
    return _from_host(table, device)


def with_aligned_rows(codes: Tensor) -> Tensor:
    """FP8 codes with the last dimension side by side and rows 16 bytes aligned, as the tensor memory unit reads them.

    The quantisers of this package store them so. Others, as the transposed views of `kernels.quantize`, are copied.
    """
    if codes.stride(-1) == 1 and codes.stride(-2) % ALIGNMENT == 0 and codes.data_ptr() % ALIGNMENT == 0:
        return codes
    rows, columns = codes.shape
    room = torch.empty((rows, tile_count(columns, ALIGNMENT) * ALIGNMENT), dtype=torch.uint8, device=codes.device)
    room[:, :columns].copy_(codes.view(torch.uint8) if codes.stride(-1) == 1 else codes.mT.view(torch.uint8).mT)
    return room[:, :columns].view(codes.dtype)


def constants(tile: TileConfig, grouped: bool) -> dict[str, Any]:
    """What the compiler is told of a tile."""
    return {
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "GROUP": tile.group,
        "GROUPED": grouped,
        "WARP_SPECIALIZED": tile.warp_specialised,
    }


def _start(
    kernel: Any,
    out: Tensor,
    tiles: int,
    num_sms: int | None,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    if out.device.type == "cuda":
        num_sms = num_sms or torch.cuda.get_device_properties(out.device).multi_processor_count
        # Of the calling thread; the backward pass has its own.
        triton.set_allocator(_workspace)
        with torch.cuda.device(out.device):
            kernel[(min(num_sms, tiles),)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
    else:
        programs = min(num_sms or STREAMING_MULTIPROCESSORS, tiles)
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Room for the tensor descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _from_host(numbers: list[Any], device: torch.device) -> Tensor:
    """int32 on `device`, without the host waiting for it: copied from pinned memory."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
