"""SwiGLU on Hopper: the functions of `kernels.swiglu`, which defines the numbers; equal to it up to FP32 rounding.

BF16 and FP32 are computed here; other float types, float64 above all, by the definition itself. Where 128 does not
divide F the tiles of gate_up lie across its halves: then the gradients and the cache are quantised by a second kernel.
Shapes: M rows, F features, P padded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import swiglu as definition
from kernels.hopper import layout
from kernels.hopper.partial_sums import sum_partials
from kernels.hopper.quantize import FLOATS, TRITON_FLOATS, quantize_both, quantize_rows
from kernels.hopper.swiglu_kernels import columns_kernel, gradient_kernel, gradient_tiles_kernel, rows_kernel
from kernels.hopper.variant import Variant
from kernels.quantize import WIDTH_MULTIPLE, Quantized, check_counts, check_row_tiles, padded_rows
from kernels.tiles import TILE, tile_count

ROW_BLOCK = 32
# With 8 warps the last one has no register left, and with some arguments spills.
WARPS = {rows_kernel: 4, columns_kernel: 8, gradient_kernel: 4, gradient_tiles_kernel: 16}
E4M3 = torch.float8_e4m3fn


def swiglu(gate_up: Tensor, row_weight_M: Tensor | None = None) -> Tensor:
    """[M, 2F] -> [M, F] in gate_up's dtype."""
    if gate_up.dtype not in FLOATS:
        return definition.swiglu(gate_up, row_weight_M)
    rows, features = _shape(gate_up, row_weight_M, "swiglu")
    hidden = layout.empty((rows, features), gate_up.dtype, gate_up.device)
    _launch_rows(gate_up, row_weight_M, hidden=hidden)
    return hidden


def swiglu_tiles(gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """gate_up [M, 2F] -> (its 1x128 tiles, those of the result [M, F]), of one read where 128 divides F, else of
    two."""
    if gate_up.dtype not in FLOATS:
        return definition.swiglu_tiles(gate_up, row_weight_M)
    rows, features = _shape(gate_up, row_weight_M, "swiglu_tiles")
    tiles, kept = _row_tiles(rows, features, gate_up.device), None
    if features % TILE == 0:
        kept = _row_tiles(rows, 2 * features, gate_up.device)
    _launch_rows(gate_up, row_weight_M, tiles=tiles, kept=kept)
    return kept or quantize_rows(gate_up), tiles


def swiglu_columns(
    kept: Quantized,
    row_weight_M: Tensor | None = None,
    counts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """The result computed again from the FP8 cache, rounded to `dtype`, quantised along tokens: [F, M] or [F, P]."""
    if dtype not in FLOATS:
        return definition.swiglu_columns(kept, row_weight_M, counts, dtype)
    rows, features = _shape(kept, row_weight_M, "swiglu_columns")
    codes, table, groups, padded = layout.readable(kept.data), *_groups(counts, rows, kept.device)
    data, scale = layout.column_tiles(features, padded, kept.device)
    grid = padded // TILE * tile_count(features, TILE)
    if grid:
        columns_kernel[(grid,)](
            codes, kept.scale, _dense(row_weight_M), data, scale, table,
            rows, features, codes.stride(0), *kept.scale.stride(), padded,
            WHOLE=features % TILE == 0, ROUND=TRITON_FLOATS[dtype], num_warps=WARPS[columns_kernel],
        )  # fmt: skip
    return Quantized(data if groups is not None else data[:, :rows], scale, groups)


def swiglu_backward(dy: Tensor, gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dy [M, F] -> (dgate_up [M, 2F] in gate_up's dtype, drow_weight [M] in FP32, None without weights)."""
    if gate_up.dtype not in FLOATS or dy.dtype != gate_up.dtype:
        return definition.swiglu_backward(dy, gate_up, row_weight_M)
    _shape(gate_up, row_weight_M, "swiglu_backward", dy)
    return _plain_gradients(dy, gate_up, None, row_weight_M)


def swiglu_backward_tiles(
    dy: Tensor, kept: Quantized, row_weight_M: Tensor | None = None, counts: Sequence[int] | None = None
) -> tuple[Quantized, Quantized, Tensor | None]:
    """dy [M, F] -> (dgate_up's 1x128 tiles [M, 2F], the same along tokens [2F, M] or [2F, P], drow_weight [M]), of one
    read of dy and the FP8 cache where 128 divides F (dgate and dup take turns at what is then in L2)."""
    if dy.dtype not in FLOATS:
        return definition.swiglu_backward_tiles(dy, kept, row_weight_M, counts)
    rows, features = _shape(kept, row_weight_M, "swiglu_backward_tiles", dy)
    if features % TILE:
        dgate_up, drow_weight_M = _plain_gradients(dy, kept.data, kept.scale, row_weight_M)
        return *quantize_both(dgate_up, counts=counts), drow_weight_M
    device = dy.device
    codes, dy, (table, groups, padded) = layout.readable(kept.data), layout.readable(dy), _groups(counts, rows, device)
    tiles = _row_tiles(rows, 2 * features, device)
    data, scale = layout.column_tiles(2 * features, padded, device)
    partial = _partial(rows, features, row_weight_M)
    grid = padded // TILE * (features // TILE) * 2
    if grid:
        gradient_tiles_kernel[(grid,)](
            dy, codes, kept.scale, _dense(row_weight_M), tiles.data, tiles.scale, data, scale, partial, table,
            rows, features, dy.stride(0), codes.stride(0), *kept.scale.stride(), tiles.scale.stride(1), padded,
            num_warps=WARPS[gradient_tiles_kernel],
        )  # fmt: skip
    columns = Quantized(data if groups is not None else data[:, :rows], scale, groups)
    return tiles, columns, None if partial is None else sum_partials(partial)


def variants() -> list[Variant]:
    """Every form that these functions launch for BF16, with FP32 router weights and without."""
    found = []

    def add(name: str, kernel: Any, integers: str, pointers: dict[str, str | None], constants: dict[str, Any]) -> None:
        given = {name: pointer for name, pointer in pointers.items() if pointer is not None}
        missing = {name: None for name in pointers if name not in given}
        # One tile of a row lies beside the same of the next row.
        fixed = {**constants, **missing, **({"s_row": 1} if "s_row" in integers else {})}
        sizes = ["M", "F", *(size for size in integers.split() if size not in fixed)]
        aligned = (*given, *(size for size in sizes if size not in ("M", "s_tile")))
        signature = given | dict.fromkeys(sizes, "i32")
        found.append(Variant(name, kernel, signature, fixed, aligned, num_warps=WARPS[kernel]))

    fp8, scale = "*fp8e4nv", "*fp32"
    for weight in (None, "*fp32"):
        w, partial = {"W": weight}, {"PARTIAL": weight and "*fp32"}
        weighted = " weighted" if weight else ""
        for kind, hidden, codes, kept in (("", 1, 0, 0), (" tiles", 0, 1, 1), (" tiles of any width", 0, 1, 0)):
            outputs = {"HIDDEN": "*bf16" if hidden else None, "CODES": fp8 if codes else None}
            outputs |= {"S": scale if codes else None, "KEPT": fp8 if kept else None, "KEPT_S": scale if kept else None}
            constants = {"BLOCK_M": ROW_BLOCK} | ({} if codes else {"s_stride": 1})
            add(f"swiglu{kind}{weighted}", rows_kernel, "x_stride s_stride", {"X": "*bf16"} | w | outputs, constants)
        tiles = {"X": fp8, "S": scale} | w
        for table in (None, "*i64"):
            grouped = weighted + (" grouped" if table else "")
            columns = {"YT": fp8, "YTS": scale, "TABLE": table}
            for kind, whole in (("", True), (" of any width", False)):
                constants = {"WHOLE": whole, "ROUND": TRITON_FLOATS[torch.bfloat16]}
                integers = "x_stride s_row s_tile padded"
                add(f"swiglu columns{kind}{grouped}", columns_kernel, integers, tiles | columns, constants)
            pointers = {"DY": "*bf16"} | tiles | {"Y": fp8, "YS": scale} | columns | partial
            integers = "dy_stride x_stride s_row s_tile ys_stride padded"
            add(f"swiglu backward tiles{grouped}", gradient_tiles_kernel, integers, pointers, {})
        for kind, given in (("", {"X": "*bf16", "S": None}), (" tiles of any width", {"X": fp8, "S": scale})):
            pointers = {"DY": "*bf16"} | given | w | {"DX": "*bf16"} | partial
            constants = {"BLOCK_M": ROW_BLOCK, "WHOLE": not given["S"]}
            integers = "dy_stride x_stride s_row s_tile"
            add(f"swiglu backward{kind}{weighted}", gradient_kernel, integers, pointers, constants)
    return found


def _launch_rows(
    gate_up: Tensor,
    row_weight_M: Tensor | None,
    hidden: Tensor | None = None,
    tiles: Quantized | None = None,
    kept: Quantized | None = None,
) -> None:
    x = layout.readable(gate_up)
    rows, features = x.shape[0], x.shape[1] // 2
    s_stride = tiles.scale.stride(1) if tiles else 1
    grid = tile_count(max(rows, s_stride if tiles else 0), ROW_BLOCK) * tile_count(features, TILE)
    if rows:
        rows_kernel[(grid,)](
            x, _dense(row_weight_M), hidden,
            tiles.data if tiles else None, tiles.scale if tiles else None,
            kept.data if kept else None, kept.scale if kept else None,
            rows, features, x.stride(0), s_stride, BLOCK_M=ROW_BLOCK, num_warps=WARPS[rows_kernel],
        )  # fmt: skip


def _plain_gradients(
    dy: Tensor, gate_up: Tensor, scale: Tensor | None, row_weight_M: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """gate_up as values, or as codes with their scales -> (dgate_up in dy's dtype, drow_weight)."""
    x, dy = layout.readable(gate_up), layout.readable(dy)
    rows, features = dy.shape
    dgate_up = layout.empty((rows, 2 * features), dy.dtype, dy.device)
    partial = _partial(rows, features, row_weight_M)
    if rows:
        gradient_kernel[(tile_count(rows, ROW_BLOCK) * tile_count(features, TILE),)](
            dy, x, scale, _dense(row_weight_M), dgate_up, partial,
            rows, features, dy.stride(0), x.stride(0), *((1, 1) if scale is None else scale.stride()),
            BLOCK_M=ROW_BLOCK, WHOLE=scale is None or features % TILE == 0, num_warps=WARPS[gradient_kernel],
        )  # fmt: skip
    return dgate_up, None if partial is None else sum_partials(partial)


def _dense(row_weight_M: Tensor | None) -> Tensor | None:
    """Kernels read the weights side by side."""
    return None if row_weight_M is None else row_weight_M.contiguous()


def _row_tiles(rows: int, columns: int, device: torch.device) -> Quantized:
    return Quantized(layout.empty((rows, columns), E4M3, device), layout.row_scales(rows, columns, device))


def _partial(rows: int, features: int, row_weight_M: Tensor | None) -> Tensor | None:
    """Where the programs leave their shares of drow_weight, [F/128, M]."""
    if row_weight_M is None:
        return None
    return layout.empty((tile_count(features, TILE), rows), torch.float32, row_weight_M.device)


def _groups(
    counts: Sequence[int] | None, rows: int, device: torch.device
) -> tuple[Tensor | None, tuple[int, ...] | None, int]:
    """(table of token tiles, counts, padded rows)."""
    if counts is None:
        return None, None, padded_rows(rows)
    groups = tuple(int(count) for count in counts)
    check_counts(groups, rows)
    return layout.tile_table(groups, device), groups, layout.padded_total(groups)


def _shape(
    gate_up: Tensor | Quantized, row_weight_M: Tensor | None, name: str, dy: Tensor | None = None
) -> tuple[int, int]:
    """(M, F), after a look at all that is given. What is or becomes FP8 has a width F that is a multiple of 16."""
    quantized = isinstance(gate_up, Quantized) or name == "swiglu_tiles"
    if isinstance(gate_up, Quantized):
        check_row_tiles(gate_up)
        gate_up = gate_up.data
    multiple = 2 * (WIDTH_MULTIPLE if quantized else 1)
    if gate_up.ndim != 2 or gate_up.shape[1] % multiple:
        raise ValueError(
            f"{name}: gate_up {tuple(gate_up.shape)}; allowed is a matrix [rows, columns], columns a multiple of "
            f"{multiple}: choose such a width or leave this layer unquantised"
        )
    rows, width = gate_up.shape
    others = {"dy": (dy, (rows, width // 2)), "row weights": (row_weight_M, (rows,))}
    for what, (tensor, shape) in others.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != gate_up.device):
            raise ValueError(
                f"{name}: {what} {tuple(tensor.shape)} on {tensor.device} for gate_up {tuple(gate_up.shape)} on "
                f"{gate_up.device}; allowed is {shape} on the same device"
            )
    return rows, width // 2
