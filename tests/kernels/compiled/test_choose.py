"""The chooser: candidates, gates, the model's ranking, measured tables, and what a call costs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.compiled import choose as module
from kernels.compiled.build import BuildError
from kernels.compiled.choose import Entry, choose, ranked, variant_name, write_measured
from kernels.compiled.cost import Problem, estimate
from kernels.compiled.expected import EXPECTED
from kernels.compiled.gates import variant_modules, variants_of
from kernels.compiled.modelled import model, modelled_shapes, training_bounds
from kernels.compiled.properties import COMMITTED, Properties, load_properties
from kernels.compiled.shapes import TRAINING_BOUNDS
from kernels.hopper.tile import (
    DGRAD,
    FPROP,
    GROUPED_DGRAD,
    GROUPED_FPROP,
    GROUPED_WGRAD,
    PLAIN_192,
    TILES,
    WGRAD,
    WS_128,
    WS_192,
)
from tests.kernels.compiled.by_hand import forget, install

KINDS = (FPROP, DGRAD, WGRAD, GROUPED_FPROP, GROUPED_DGRAD, GROUPED_WGRAD)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Properties]]:
    yield install(monkeypatch)
    forget()


def slowed(found: Properties) -> Properties:
    return replace(found, hot_loop={**found.hot_loop, "STS": 400})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16384, 7168, 16384), (4096, 24576, 1536), (1, 576, 7168), (131, 4096, 128)])
@pytest.mark.parametrize("num_sms", [132, 112, 1])
def test_choice_is_the_fastest_by_the_model(stored, kind: str, size: tuple[int, int, int], num_sms: int) -> None:
    problem = Problem(kind, *size, 4, module.output_bytes(kind))
    seconds = {tile: estimate(stored[variant_name(kind, tile)], problem, num_sms).seconds for tile in TILES[kind]}
    assert seconds[choose(kind, *size, 4, num_sms)] == min(seconds.values())


def test_kernels_that_fail_a_gate_are_not_chosen(stored) -> None:
    best = choose(FPROP, 16384, 7168, 16384)
    assert best == WS_192
    name = variant_name(FPROP, best)
    stored[name] = replace(stored[name], spill_bytes=8)
    forget()
    assert choose(FPROP, 16384, 7168, 16384) != best
    del stored[name]  # it did not compile
    forget()
    assert choose(FPROP, 16384, 7168, 16384) != best
    for tile in TILES[FPROP]:
        stored.pop(variant_name(FPROP, tile), None)
    forget()
    with pytest.raises(ValueError, match="no tile of a fprop passes the gates; `python -m kernels gates` says why"):
        choose(FPROP, 16384, 7168, 16384)


def test_a_tile_needs_all_its_forms() -> None:
    """Results in FP32, scales in another order: a product may run any of them."""
    (row, *_) = [row for row in EXPECTED if row.name == variant_name(FPROP, WS_192)]
    committed = load_properties(COMMITTED).variants
    assert not module.gate_failures(row.name, committed)
    forms = [name for name in committed if name.startswith(f"{row.name} ")]
    assert len(forms) >= 2
    for name in [row.name, *forms]:
        spilling = {**committed, name: replace(committed[name], spill_bytes=8)}
        assert module.gate_failures(row.name, spilling) == [f"{name}: spills: 8 bytes; allowed: 0"]
        missing = {other: found for other, found in committed.items() if other != name}
        assert module.gate_failures(row.name, missing) == [f"{name}: not compiled"]
    assert module.gate_failures("gemm fprop ws 64x64", committed) == [
        "gemm fprop ws 64x64: no row in the expected list"
    ]
    accumulating = variant_name(WGRAD, WS_128)
    spilling = {**committed, accumulating: replace(committed[accumulating], spill_bytes=8)}
    assert len(module.gate_failures(accumulating, spilling)) == 1


def test_slower_code_changes_the_choice(stored) -> None:
    """The ranking follows what was read of the code, not the tile's size."""
    for tile in (WS_192, PLAIN_192):
        name = variant_name(FPROP, tile)
        stored[name] = slowed(stored[name])
    forget()
    assert choose(FPROP, 16384, 7168, 16384) == WS_128


def entry(tile: str, device: str = "cpu", num_sms: int = 132, groups: int = 1, rows: int = 16384) -> Entry:
    return Entry(device, FPROP, rows, 7168, 16384, groups, num_sms, tile, 900.0)


def test_a_measured_product_comes_before_the_model(stored, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_measured(path, [entry("plain 128x128")])
    assert choose(FPROP, 16384, 7168, 16384, measured=path).name == "plain 128x128"
    assert choose(FPROP, 16384, 7168, 16384, measured=str(path)).name == "plain 128x128"
    # Neither other sizes, SMs, groups and kinds nor a near one.
    assert choose(FPROP, 16385, 7168, 16384, measured=path) == choose(FPROP, 16385, 7168, 16384)
    assert choose(FPROP, 16384, 7168, 16384, num_sms=112, measured=path) == WS_192
    assert choose(FPROP, 16384, 7168, 16384, 2, measured=path) == WS_192
    assert choose(DGRAD, 16384, 7168, 16384, measured=path) == WS_192


def test_another_device_s_table_is_not_taken(stored, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_measured(path, [entry("plain 128x128", device="NVIDIA H800")])
    assert choose(FPROP, 16384, 7168, 16384, measured=path) == WS_192


def test_a_table_is_added_to(stored, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_measured(path, [entry("plain 128x128"), entry("plain 64x128", num_sms=112)])
    write_measured(path, [entry("ws 128x128"), entry("ws 128x192", device="NVIDIA H800")])
    found = [(each["device"], each["num_sms"], each["tile"]) for each in json.loads(path.read_text())["entries"]]
    assert found == [("cpu", 132, "ws 128x128"), ("cpu", 112, "plain 64x128"), ("NVIDIA H800", 132, "ws 128x192")]
    assert [each.name for each in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"device": "cpu"}]}', '{"tiles": []}', "{"])
def test_a_table_that_is_none_is_refused(stored, tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles.json: no table of measured tiles: "):
        choose(FPROP, 16384, 7168, 16384, measured=path)
    with pytest.raises(ValueError, match=r"none.json: no table of measured tiles: FileNotFoundError"):
        choose(FPROP, 16384, 7168, 16384, measured=tmp_path / "none.json")


def test_a_measured_tile_that_may_not_run_is_refused(stored, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_measured(path, [entry("ws 256x256")])
    with pytest.raises(ValueError, match="tile 'ws 256x256' of a fprop is not to be had; allowed is one of ws 1"):
        choose(FPROP, 16384, 7168, 16384, measured=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("forward", 1, 1, 1), "kind 'forward'"), ((FPROP, -1, 16, 16), "must be positive")],
)
def test_refused(stored, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*arguments)
    with pytest.raises(ValueError, match="num_sms 133"):
        choose(FPROP, 1, 16, 16, num_sms=133)


def test_other_sources_are_compiled_into_the_cache_and_read_from_there(
    stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.compiled.build.triton_version", lambda: "3.9.0")
    monkeypatch.setattr(module, "source_digest", lambda: "digest")
    # The committed properties are of this Triton and these sources.
    assert choose(FPROP, 16384, 7168, 16384, cache=tmp_path) == WS_192
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "source_digest", lambda: "0123456789abcdefg")
    forget()
    # Interpreted kernels cannot be compiled, which is said.
    with pytest.raises(BuildError, match="TRITON_INTERPRET=1"):
        choose(FPROP, 16384, 7168, 16384, cache=tmp_path)
    asked: list[str] = []

    def check(modules, names, rows, triton, jobs):
        asked.extend(names)
        slow = {name: slowed(stored[name]) for name in (variant_name(FPROP, each) for each in (WS_192, PLAIN_192))}
        return type("Report", (), {"read": {**stored, **slow}})()

    monkeypatch.setattr(module, "check", check)
    monkeypatch.setattr("kernels.compiled.build.require_compiler", lambda: None)
    assert choose(FPROP, 16384, 7168, 16384, cache=tmp_path) == WS_128
    assert asked == [row.name for row in EXPECTED if row.name.startswith("gemm ")]
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-3.9.0-0123456789abcdef.json"]
    forget()
    asked.clear()
    assert choose(FPROP, 16384, 7168, 16384, cache=tmp_path) == WS_128
    assert not asked
    # Without a cache nothing is compiled.
    assert choose(FPROP, 16384, 7168, 16384) == WS_192


def test_a_choice_costs_microseconds(stored) -> None:
    """A product seen before, as in every step of a dense layer, and one of new rows, as experts have."""
    choose(FPROP, 16384, 7168, 16384)

    def per_call(rows: list[int]) -> float:
        best = float("inf")
        for attempt in range(5):
            started = time.perf_counter()
            for row in rows:
                choose(FPROP, row + (attempt if row != rows[0] else 0) * 100000, 7168, 2048)
            best = min(best, (time.perf_counter() - started) / len(rows))
        return best

    assert per_call([4096] * 500) < 20e-6
    assert per_call(list(range(1, 501))) < 200e-6


def test_every_choosable_tile_is_a_variant_and_passes_the_gates() -> None:
    committed = load_properties(COMMITTED)
    known = variants_of(variant_modules())
    for kind, tiles in TILES.items():
        for tile in tiles:
            name = variant_name(kind, tile)
            assert name in known and known[name].tile == (tile.rows, tile.columns, 128), name
            assert name in committed.variants, name
        assert {tile for tile, _ in ranked(kind, 132)} == set(tiles)


def test_modelled_rates_reach_the_bounds() -> None:
    for name, found, least in training_bounds():
        assert found >= least, name


def test_bounds_are_of_the_products_that_are_asked_for() -> None:
    assert TRAINING_BOUNDS == {
        (GROUPED_FPROP, 32768, 4096, 7168, 4): 1150,
        (GROUPED_FPROP, 32768, 7168, 2048, 4): 1000,
        (FPROP, 16384, 7168, 16384, 1): 1200,
    }
    assert len(training_bounds()) == 3


def test_every_listed_product_has_a_tile_on_both_numbers_of_sms() -> None:
    for shape in modelled_shapes():
        found = model(shape)
        assert set(found.tiles) == {132, 112}
        assert 0 < found.costs[112].tflops <= found.costs[132].tflops * 1.01
