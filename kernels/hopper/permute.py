"""Rows by index on Hopper: the functions of `kernels.permute`, which defines the numbers, bit for bit.

Shapes: V rows of tokens, X expanded rows, D features.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hopper import layout
from kernels.hopper.permute_kernels import sum_kernel, take_kernel, take_scales_kernel
from kernels.hopper.variant import Variant
from kernels.permute import row_lists
from kernels.quantize import Quantized, check_row_tiles

# Rows and 4-byte words that a program moves: 16 numbers for each of its 128 threads.
BLOCK_ROWS, BLOCK_WORDS = 4, 512
BLOCK_SCALES = (64, 16)
WARPS = 4
# Columns of a program that sums -> its warps: router weights have few columns.
SUM_WARPS = {256: 1, 1024: 4}
Rows = TypeVar("Rows", Tensor, Quantized)


def take_rows(rows: Rows, index_X: Tensor) -> Rows:
    """[V, D] tensor, or FP8 rows in 1x128 tiles with their scales -> [X, D] of the same kind."""
    if not isinstance(rows, Quantized):
        return _take(rows, index_X)
    check_row_tiles(rows)
    index_X = _index(index_X, rows.device, "take_rows")
    taken = len(index_X)
    scale = layout.row_scales(taken, rows.columns, rows.device)
    block_x, block_t = BLOCK_SCALES
    if scale.numel():
        take_scales_kernel[(triton.cdiv(scale.stride(1), block_x),)](
            rows.scale, index_X, scale, taken, scale.shape[1], *rows.scale.stride(), scale.stride(1),
            BLOCK_X=block_x, BLOCK_T=block_t, num_warps=WARPS,
        )  # fmt: skip
    return Quantized(_take(rows.data, index_X), scale)


def sum_rows(rows_XD: Tensor, index_X: Tensor, count: int) -> Tensor:
    """[X, D] -> [count, D] in rows' dtype: row v is the sum of the rows x with index_X[x] = v, in order of x. The lists
    are made by a stable sort on the device; the host waits for nothing."""
    index_X = _index(index_X, rows_XD.device, "sum_rows")
    if rows_XD.ndim != 2 or len(rows_XD) != len(index_X):
        raise ValueError(f"sum_rows: rows {tuple(rows_XD.shape)}, indices {tuple(index_X.shape)}; allowed is one a row")
    rows = layout.readable(rows_XD)
    order, first = row_lists(index_X, count)
    width = rows.shape[1]
    out = layout.empty((count, width), rows.dtype, rows.device)
    block = next((block for block in SUM_WARPS if width <= block), max(SUM_WARPS))
    if out.numel():
        sum_kernel[(count * triton.cdiv(width, block),)](
            rows, order, first, out, width, rows.stride(0),
            BLOCK_D=block, SUM_TYPE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            num_warps=SUM_WARPS[block],
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """What these functions launch for FP8 rows, and for BF16 rows and FP32 router weights' gradients to be summed."""
    block_x, block_t = BLOCK_SCALES
    found = [
        Variant(
            name="take rows",
            kernel=take_kernel,
            signature={"ROWS": "*i32", "INDEX": "*i64", "OUT": "*i32", "X": "i32", "D": "i32", "row_stride": "i32"},
            constants={"BLOCK_X": BLOCK_ROWS, "BLOCK_D": BLOCK_WORDS},
            aligned=("ROWS", "INDEX", "OUT", "D", "row_stride"),
            num_warps=WARPS,
        ),
        Variant(
            name="take scales",
            kernel=take_scales_kernel,
            signature={"S": "*fp32", "INDEX": "*i64", "OUT": "*fp32"}
            | dict.fromkeys(("X", "TILES", "s_row", "s_tile", "out_stride"), "i32"),
            constants={"BLOCK_X": block_x, "BLOCK_T": block_t},
            aligned=("S", "INDEX", "OUT", "out_stride"),
            num_warps=WARPS,
        ),
    ]
    for dtype in ("*bf16", "*fp32"):
        for block, warps in SUM_WARPS.items():
            found.append(
                Variant(
                    name=f"sum rows {block} {dtype[1:]}",
                    kernel=sum_kernel,
                    signature={"ROWS": dtype, "ORDER": "*i64", "FIRST": "*i64", "OUT": dtype, "D": "i32"}
                    | {"row_stride": "i32"},
                    constants={"BLOCK_D": block, "SUM_TYPE": tl.float32},
                    aligned=("ROWS", "ORDER", "FIRST", "OUT", "D", "row_stride"),
                    num_warps=warps,
                )
            )
    return found


def _take(rows: Tensor, index_X: Tensor) -> Tensor:
    """Rows [V, D] of any type, as words of 4 bytes where they are aligned, else byte for byte."""
    index_X = _index(index_X, rows.device, "take_rows")
    if rows.ndim != 2:
        raise ValueError(f"take_rows: rows {tuple(rows.shape)}; allowed is [rows, columns]")
    source = layout.readable(rows)
    out = layout.empty((len(index_X), rows.shape[1]), rows.dtype, rows.device)
    whole = source.shape[1] * source.element_size() % 16 == 0
    given, taken = (matrix.view(torch.int32 if whole else torch.uint8) for matrix in (source, out))
    if out.numel():
        grid = triton.cdiv(len(out), BLOCK_ROWS) * triton.cdiv(given.shape[1], BLOCK_WORDS)
        take_kernel[(grid,)](
            given, index_X, taken, len(out), given.shape[1], given.stride(0),
            BLOCK_X=BLOCK_ROWS, BLOCK_D=BLOCK_WORDS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _index(index_X: Tensor, device: torch.device, name: str) -> Tensor:
    """Indices as the kernels read them: int64, side by side."""
    if index_X.ndim != 1 or index_X.dtype not in (torch.int64, torch.int32) or index_X.device != device:
        raise ValueError(
            f"{name}: indices {index_X.dtype} {tuple(index_X.shape)} on {index_X.device}; allowed are [X] integers on "
            f"{device}"
        )
    return index_X.to(torch.int64).contiguous()
