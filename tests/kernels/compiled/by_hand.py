"""Properties of every choosable tile, made by hand, in place of the committed ones."""

from __future__ import annotations

import pytest

from kernels.compiled import choose as module
from kernels.compiled.choose import load_measured, ranked, variant_name
from kernels.compiled.properties import Properties, Stored
from kernels.hopper.tile import TILES, TileConfig


def properties(kind: str, tile: TileConfig) -> Properties:
    """Of a kernel with as many promoting instructions as accumulators, and 60 others."""
    consumers = 2 if tile.rows == 128 else 1
    accumulators = tile.rows * tile.columns // (128 * consumers)
    return Properties(
        name=variant_name(kind, tile),
        triton="3.9.0",
        tile=(tile.rows, tile.columns, 128),
        warps=12 if tile.warp_specialised else tile.num_warps,
        num_stages=tile.num_stages,
        shared_bytes=160000,
        registers=168,
        spill_bytes=0,
        tensor_core="QGMMA.64x128x32.F32.E4M3.E4M3",
        consumers=consumers,
        accumulators=accumulators,
        setmaxnreg=tile.warp_specialised,
        hot_loop={"QGMMA": 4, "FFMA": accumulators, "IMAD": 60},
    )


def forget() -> None:
    """What the chooser remembers."""
    for each in (module._choose, ranked, load_measured, module.current_properties, module.device_name):
        each.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Properties]:
    """As if committed, with gates that refuse spills alone. The result may be changed; `forget` before and after."""
    variants = {
        found.name: found for kind, tiles in TILES.items() for found in (properties(kind, tile) for tile in tiles)
    }
    monkeypatch.setattr(module, "_committed", lambda: Stored("3.9.0", "digest", variants))
    monkeypatch.setattr(module, "gate_failures", lambda name, known: ["spills"] if known[name].spill_bytes else [])
    forget()
    return variants
