"""The launches of the GEMM kernels as variants to compile ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from kernels.hopper.gemm_kernels import columns_by_columns, rows_by_blocks
from kernels.hopper.launch import OUT_TYPES, constants
from kernels.hopper.tile import TILES, TileConfig, plain_twin
from kernels.hopper.variant import Variant
from kernels.tiles import TILE

POINTERS = ("a_ptr", "b_ptr", "out_ptr", "a_scale_ptr", "b_scale_ptr")


def row_variants(kind: str) -> list[Variant]:
    """Every form of `rows_by_blocks` for a kind of product: by tile, result (BF16, or ` fp32`), and for a tile that is
    warp-specialised also with a row's scales side by side, as they arrive over a network."""
    grouped = kind.startswith("grouped")
    # The transposed scales of a weight have their rows side by side.
    fixed = {"b_scale_row_stride" if kind.endswith("dgrad") else "b_scale_block_stride": 1}
    if not grouped:
        fixed |= {"b_scale_expert_stride": 0}
    forms = [(torch.bfloat16, "", {"a_scale_row_stride": 1}), (torch.float32, " fp32", {"a_scale_row_stride": 1})]
    variants = []
    for tile in TILES[kind]:
        for dtype, suffix, unit_stride in forms + [(torch.bfloat16, " row-major scales", {})] * tile.warp_specialised:
            twin = suffix if unit_stride else ""
            variants.append(
                _variant(
                    f"{kind} {tile.name}{suffix}",
                    rows_by_blocks,
                    tile,
                    fixed | unit_stride | constants(tile, grouped),
                    ("columns", "depth", "a_stride"),
                    dtype,
                    f"{kind} {plain_twin(tile).name}{twin}" if tile.warp_specialised else None,
                )
            )
    return variants


def column_variants(kind: str) -> list[Variant]:
    """`columns_by_columns` for a kind of product: by tile, the result written or added (` accumulate`)."""
    fixed = {"a_scale_row_stride": 1, "b_scale_row_stride": 1}
    return [
        _variant(
            f"{kind} {tile.name}{suffix}",
            columns_by_columns,
            tile,
            fixed | constants(tile, kind.startswith("grouped")) | {"ACCUMULATE": bool(suffix)},
            ("rows", "columns"),
            torch.float32,
            f"{kind} {plain_twin(tile).name}{suffix}" if tile.warp_specialised else None,
        )
        for tile in TILES[kind]
        for suffix in ("", " accumulate")
    ]


def _variant(
    name: str,
    kernel: Any,
    tile: TileConfig,
    known: dict[str, Any],
    aligned: tuple[str, ...],
    out_dtype: torch.dtype,
    twin: str | None,
) -> Variant:
    if not known["GROUPED"]:
        known = known | {"table_ptr": None, "experts": 1}
    types = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "out_ptr": OUT_TYPES[out_dtype], "table_ptr": "*i32"}
    types |= {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    return Variant(
        name=f"gemm {name}",
        kernel=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names if name not in known},
        constants=known,
        aligned=POINTERS + aligned + (("table_ptr",) if known["GROUPED"] else ()),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tile=(tile.rows, tile.columns, TILE),
        warp_specialised=tile.warp_specialised,
        plain_twin=f"gemm {twin}" if twin else None,
    )
