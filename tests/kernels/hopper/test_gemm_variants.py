"""The variants that are compiled ahead of time are what the products launch, and every tile has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.hopper import gemm, grouped, launch
from kernels.hopper import quantize as ours
from kernels.hopper.tile import TILES, TileConfig
from kernels.hopper.variant import Variant
from kernels.quantize import Quantized
from tests.kernels.hopper.gemm_cases import random

VARIANTS = {variant.name: variant for variant in [*gemm.variants(), *grouped.variants()]}
COUNTS = (130, 0, 170)
CASES = [(kind, tile) for kind, tiles in TILES.items() for tile in tiles]


def test_every_tile_has_variants_and_every_specialised_one_a_twin() -> None:
    assert len(VARIANTS) == len(gemm.variants()) + len(grouped.variants())
    for kind, tile in CASES:
        assert f"gemm {kind} {tile.name}" in VARIANTS
    for variant in VARIANTS.values():
        assert variant.warp_specialised == (" ws " in variant.name) == variant.constants["WARP_SPECIALIZED"]
        assert (variant.plain_twin is not None) == variant.warp_specialised
        if variant.plain_twin is not None:
            twin = VARIANTS[variant.plain_twin]
            assert twin.kernel is variant.kernel and twin.tile == variant.tile and not twin.warp_specialised
    assert VARIANTS["gemm wgrad plain 128x128 accumulate"].constants["ACCUMULATE"]
    assert VARIANTS["gemm grouped fprop ws 128x192"].signature["out_ptr"] == "*bf16"
    assert VARIANTS["gemm dgrad plain 64x128 fp32"].signature["out_ptr"] == "*fp32"


@pytest.mark.parametrize(("kind", "tile"), CASES, ids=lambda each: getattr(each, "name", each))
def test_a_launch_is_the_variant(kind: str, tile: TileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []
    for name in ("rows_by_blocks", "columns_by_columns"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name).arg_names, launches))
    for suffix in (" accumulate", "") if "wgrad" in kind else (" fp32", " row-major scales", ""):
        run(kind, tile, suffix)
        variant = VARIANTS.get(f"gemm {kind} {tile.name}{suffix}")
        if variant is not None:
            check_same(variant, launches[-1])
    if "wgrad" not in kind:
        assert launches[-1]["a_scale_row_stride"] == 1


class Recorder:
    """Takes the place of a kernel."""

    def __init__(self, names: list[str], launches: list[dict[str, Any]]) -> None:
        self.names, self.launches = names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            self.launches.append(dict(zip(self.names, arguments, strict=False)) | constants)

        return run


def run(kind: str, tile: TileConfig, suffix: str) -> None:
    """One product of operands as our quantisers store them; its numbers do not matter."""
    is_grouped = kind.startswith("grouped")
    n, k, m = 144, 208, sum(COUNTS)
    module: Any = grouped if is_grouped else gemm
    groups: tuple[Any, ...] = (COUNTS,) if is_grouped else ()
    function = getattr(module, kind.split()[-1])
    if "wgrad" in kind:
        counts = COUNTS if is_grouped else None
        dy, x = (ours.quantize_columns(random(m, width), counts=counts) for width in (n, k))
        into = torch.zeros(3, n, k) if is_grouped else torch.zeros(n, k)
        function(dy, x, *groups, tile=tile, into=into if suffix else None)
        return
    rows = ours.quantize_rows(random(m, n if "dgrad" in kind else k))
    if suffix == " row-major scales":
        rows = Quantized(rows.data, rows.scale.contiguous())
    weight = ours.quantize_blocks(random(3, n, k) if is_grouped else random(n, k))
    function(rows, weight, *groups, torch.float32 if suffix == " fp32" else torch.bfloat16, tile=tile)


def check_same(variant: Variant, launched: dict[str, Any]) -> None:
    pointers = {"*fp8e4nv": torch.float8_e4m3fn, "*fp32": torch.float32, "*bf16": torch.bfloat16, "*i32": torch.int32}
    assert {name: launched[name] for name in variant.constants} == variant.constants
    for name, kind in variant.signature.items():
        value = launched[name]
        if isinstance(value, Tensor):
            assert value.dtype == pointers[kind]
        else:
            assert kind == "i32" and -(2**31) <= value < 2**31
    for name in variant.aligned:
        value = launched[name]
        assert (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0, name
    assert (launched["num_warps"], launched["num_stages"]) == (variant.num_warps, variant.num_stages)
    assert variant.tile == (launched["TILE_ROWS"], launched["TILE_COLUMNS"], 128)
