"""The quantisers of `kernels.quantize` as Triton kernels: the same numbers bit for bit, in the layouts of `layout`.

Beyond the definition: row scales have the rows contiguous; what is quantised along tokens has the tokens contiguous,
padded in memory with zeros to a multiple of 128; `quantize_blocks` gives `transposed` too. Under a scale that is not
finite, codes and scales are non-finite where the definition's are, not always by the same NaN or infinity.

BF16 and FP32 are computed here; other float types, float64 above all, by the definition itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from kernels import quantize as definition
from kernels.hopper.layout import column_tiles, empty, padded_total, readable, row_scales, tile_table
from kernels.hopper.quantize_kernels import blocks_kernel, columns_kernel, rows_kernel, values_kernel
from kernels.hopper.variant import Variant
from kernels.quantize import (
    ROW_TILE,
    Quantized,
    check_counts,
    check_matrix,
    check_row_tiles,
    check_weight,
    padded_rows,
)
from kernels.tiles import TILE, tile_count

FLOATS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TRITON_FLOATS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
ROW_BLOCK = 64
# A transposing kernel with 4 warps needs over 210 registers a thread.
WARPS = {rows_kernel: 4, columns_kernel: 8, blocks_kernel: 8, values_kernel: 4}


def quantize_rows(x_MK: Tensor, power_of_two: bool = False) -> Quantized:
    """[M, K] -> data [M, K], scale [M, ceil(K/128)]."""
    check_matrix(x_MK, "quantize_rows")
    if x_MK.dtype not in FLOATS:
        return definition.quantize_rows(x_MK, power_of_two)
    x = readable(x_MK)
    (rows, columns), device = x.shape, x.device
    data, scale = empty((rows, columns), torch.float8_e4m3fn, device), row_scales(rows, columns, device)
    grid = tile_count(rows, ROW_BLOCK) * tile_count(columns, TILE)
    if grid:
        rows_kernel[(grid,)](
            x,
            data,
            scale,
            rows,
            columns,
            x.stride(0),
            scale.stride(1),
            BLOCK_M=ROW_BLOCK,
            POWER_OF_TWO=power_of_two,
            num_warps=WARPS[rows_kernel],
        )
    return Quantized(data, scale)


def quantize_columns(x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """[M, K] -> data [K, M], scale [K, ceil(M/128)]; with counts data [K, P]."""
    check_matrix(x_MK, "quantize_columns")
    if x_MK.dtype not in FLOATS:
        return definition.quantize_columns(x_MK, power_of_two, counts)
    return quantize_along_tokens(readable(x_MK), None, power_of_two, counts)


def quantize_both(
    x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
) -> tuple[Quantized, Quantized]:
    """(`quantize_rows`, `quantize_columns`) of one read."""
    check_matrix(x_MK, "quantize_both")
    if x_MK.dtype not in FLOATS:
        return definition.quantize_both(x_MK, power_of_two, counts)
    rows, columns = x_MK.shape
    device = x_MK.device
    given = Quantized(empty((rows, columns), torch.float8_e4m3fn, device), row_scales(rows, columns, device))
    return given, quantize_along_tokens(readable(x_MK), None, power_of_two, counts, rows_into=given)


def requantize_columns(q_MK: Quantized, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """Stored 1x128 tiles [M, K] -> data [K, M] or [K, P], quantised along tokens; the values are not written."""
    check_row_tiles(q_MK)
    check_matrix(q_MK.data, "requantize_columns")
    return quantize_along_tokens(readable(q_MK.data), q_MK.scale, power_of_two, counts, source="tiles")


def quantize_blocks(w_NK: Tensor) -> Quantized:
    """[N, K] or [E, N, K] -> data of that shape, `transposed` [..., K, N], scale [..., ceil(N/128), ceil(K/128)]."""
    check_weight(w_NK)
    if w_NK.dtype not in FLOATS:
        return definition.quantize_blocks(w_NK)
    w = readable(w_NK.contiguous())
    *lead, rows, columns = w.shape
    scale = empty((*lead, tile_count(rows, TILE), tile_count(columns, TILE)), torch.float32, w.device)
    data = empty(w.shape, torch.float8_e4m3fn, w.device)
    transposed = empty((*lead, columns, rows), torch.float8_e4m3fn, w.device)
    if scale.numel():
        blocks_kernel[(scale.numel(),)](w, data, transposed, scale, rows, columns, num_warps=WARPS[blocks_kernel])
    return Quantized(data, scale, transposed=transposed)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Code times scale, rounded to FP32, then to `dtype`. Same shape and memory order as `q.data`, without padding."""
    if dtype not in FLOATS:
        return definition.dequantize(q, dtype)
    if q.memo:
        return q.memo[0].to(dtype)
    along_rows = q.has_tile(ROW_TILE)
    data, scale, row_tile, column_tile = q.data, q.scale, 1 if along_rows else TILE, TILE
    transposed = data.ndim == 2 and data.stride(1) != 1 and data.stride(0) == 1
    if transposed:
        data, scale, row_tile, column_tile = data.t(), scale.t(), column_tile, row_tile
    values = decode_values(
        readable(data), scale, torch.float32 if q.memo is not None else dtype, row_tile, column_tile, "tiles"
    )
    values = values.t() if transposed else values
    if q.memo is not None:
        q.memo.append(values)
    return values.to(dtype)


def quantize_along_tokens(
    x_MK: Tensor,
    scale: Tensor | None,
    power_of_two: bool,
    counts: Sequence[int] | None,
    source: str = "values",
    rows_into: Quantized | None = None,
) -> Quantized:
    """Every transposed quantisation, see `columns_kernel`. x_MK is `readable`; rows_into takes the 1x128 tiles."""
    (rows, features), device = x_MK.shape, x_MK.device
    groups = None if counts is None else tuple(int(count) for count in counts)
    if groups is not None:
        check_counts(groups, rows)
    padded = padded_rows(rows) if groups is None else padded_total(groups)
    data, scales = column_tiles(features, padded, device)
    y, y_scale = (None, None) if rows_into is None else (rows_into.data, rows_into.scale)
    grid = padded // TILE * tile_count(features, TILE)
    if grid:
        columns_kernel[(grid,)](
            x_MK,
            scale,
            y,
            y_scale,
            data,
            scales,
            None if groups is None else tile_table(groups, device),
            rows,
            features,
            x_MK.stride(0),
            0 if scale is None else scale.stride(0),
            0 if scale is None else scale.stride(1),
            0 if y_scale is None else y_scale.stride(1),
            padded,
            SOURCE=source,
            POWER_OF_TWO=power_of_two,
            num_warps=WARPS[columns_kernel],
        )
    return Quantized(data if groups is not None else data[:, :rows], scales, groups)


def decode_values(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, row_tile: int, column_tile: int, source: str
) -> Tensor:
    """Contiguous [..., R, C] of `dtype` from `readable` codes and scales of any strides; see `values_kernel`."""
    values = empty(codes.shape, dtype, codes.device)
    *lead, rows, columns = codes.shape
    grid = tile_count(rows, ROW_BLOCK) * tile_count(columns, TILE), math.prod(lead)
    if math.prod(grid):
        values_kernel[grid](
            codes,
            scale,
            values,
            rows,
            columns,
            codes.stride(0) if lead else 0,
            codes.stride(-2),
            values.stride(0) if lead else 0,
            values.stride(-2),
            scale.stride(0) if lead else 0,
            scale.stride(-2),
            scale.stride(-1),
            ROW_TILE=row_tile,
            COLUMN_TILE=column_tile,
            SOURCE=source,
            BLOCK_M=ROW_BLOCK,
            num_warps=WARPS[values_kernel],
        )
    return values


def variants() -> list[Variant]:
    """Every form of the kernels here that these functions launch."""
    found = []
    for dtype in FLOATS.values():
        for power_of_two in (False, True):
            found.append(rows_variant(dtype, power_of_two))
            for grouped in (False, True):
                for both in (False, True):
                    found.append(columns_variant("values", dtype, power_of_two, grouped, both))
        found.append(
            Variant(
                name=f"quantize blocks {dtype[1:]}",
                kernel=blocks_kernel,
                signature={"W": dtype, "Y": "*fp8e4nv", "YT": "*fp8e4nv", "S": "*fp32", "N": "i32", "K": "i32"},
                aligned=("W", "Y", "YT", "S", "N", "K"),
                num_warps=WARPS[blocks_kernel],
            )
        )
        for row_tile, column_tile in ((1, TILE), (TILE, TILE), (TILE, 1)):
            found.append(values_variant("tiles", "*fp8e4nv", dtype, row_tile, column_tile))
    for power_of_two in (False, True):
        for grouped in (False, True):
            found.append(columns_variant("tiles", "*fp8e4nv", power_of_two, grouped, False))
    return found


def rows_variant(dtype: str, power_of_two: bool) -> Variant:
    """A form of `rows_kernel`."""
    return Variant(
        name=f"quantize rows {dtype[1:]}{' power of two' * power_of_two}",
        kernel=rows_kernel,
        signature={"X": dtype, "Y": "*fp8e4nv", "S": "*fp32"}
        | dict.fromkeys(("M", "K", "x_stride", "s_stride"), "i32"),
        constants={"BLOCK_M": ROW_BLOCK, "POWER_OF_TWO": power_of_two},
        aligned=("X", "Y", "S", "K", "x_stride", "s_stride"),
        num_warps=WARPS[rows_kernel],
    )


def columns_variant(source: str, dtype: str, power_of_two: bool, grouped: bool, both: bool, name: str = "") -> Variant:
    """A form of `columns_kernel`."""
    pointers = {
        "X": dtype,
        "S": None if source == "values" else "*fp32",
        "Y": "*fp8e4nv" if both else None,
        "YS": "*fp32" if both else None,
        "YT": "*fp8e4nv",
        "YTS": "*fp32",
        "TABLE": "*i64" if grouped else None,
    }
    integers = ("M", "K", "x_stride", "s_row", "s_column", "ys_stride", "padded")
    given = {name: pointer for name, pointer in pointers.items() if pointer is not None}
    kind = "requantize columns" if source == "tiles" else f"quantize {'both' if both else 'columns'} {dtype[1:]}"
    return Variant(
        name=name or f"{kind}{' grouped' * grouped}{' power of two' * power_of_two}",
        kernel=columns_kernel,
        signature=given | dict.fromkeys(integers, "i32"),
        constants={name: None for name in pointers if name not in given}
        | {"SOURCE": source, "POWER_OF_TWO": power_of_two},
        aligned=(*given, "K", "x_stride", "ys_stride", "padded"),
        num_warps=WARPS[columns_kernel],
    )


def values_variant(source: str, codes: str, dtype: str, row_tile: int, column_tile: int, name: str = "") -> Variant:
    """A form of `values_kernel`, for a width that is a multiple of 16."""
    strides = ("x_batch", "x_stride", "y_batch", "y_stride")
    return Variant(
        name=name or f"dequantize {row_tile}x{column_tile} {dtype[1:]}",
        kernel=values_kernel,
        signature={"X": codes, "S": "*fp32", "Y": dtype}
        | dict.fromkeys(("M", "K", *strides, "s_batch", "s_row", "s_column"), "i32"),
        constants={"ROW_TILE": row_tile, "COLUMN_TILE": column_tile, "SOURCE": source, "BLOCK_M": ROW_BLOCK},
        aligned=("X", "S", "Y", "K", *strides),
        num_warps=WARPS[values_kernel],
    )
