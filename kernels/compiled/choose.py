"""Which tile a product runs with: the fastest by the cost model of those whose machine code passes the gates.

What the model needs was read from the compiled code and is committed (`properties.json`): nothing is compiled to
choose, and the same tile is chosen on a machine without a GPU. A table that `python -m kernels bench --write` measured
on a GPU comes before the model, for exactly the products it holds; no product takes its tile from a similar one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from kernels.compiled.cost import BF16_WRITTEN, FP32_ACCUMULATED, H800, Problem, TileCost, tile_cost
from kernels.compiled.expected import EXPECTED
from kernels.compiled.gates import check, held_against, variant_modules
from kernels.compiled.properties import (
    COMMITTED,
    Properties,
    Stored,
    load_properties,
    source_digest,
    write_properties,
    write_text,
)
from kernels.hopper.tile import GROUPED_WGRAD, TILES, WGRAD, TileConfig

MEMORY = 65536  # products remembered; a step's rows by expert are new every time


@dataclass(frozen=True)
class Entry:
    """One measured product. tile: a `TileConfig.name`, the fastest on this device."""

    device: str
    kind: str
    rows: int
    columns: int
    depth: int
    groups: int
    num_sms: int
    tile: str
    tflops: float

    @property
    def product(self) -> tuple[str, int, int, int, int, int]:
        return (self.kind, self.rows, self.columns, self.depth, self.groups, self.num_sms)


def choose(
    kind: str,
    rows: int,
    columns: int,
    depth: int,
    groups: int = 1,
    num_sms: int | None = None,
    measured: str | Path | None = None,
    cache: str | Path | None = None,
) -> TileConfig:
    """The tile for result [rows, columns] summed over `depth`, of all groups together.

    num_sms: SMs the kernel occupies, all of them by default. measured: a table written by `python -m kernels bench
    --write`. cache: a folder for what is read from kernels compiled again, if this Triton or these sources are not
    those of the committed properties; without it the committed ones hold. ValueError: an unknown kind, sizes that are
    not positive, no tile that passes the gates, a table that is none.
    """
    return _choose(kind, rows, columns, depth, groups, num_sms or H800.num_sms, measured, cache)


@lru_cache(MEMORY)
def _choose(
    kind: str,
    rows: int,
    columns: int,
    depth: int,
    groups: int,
    num_sms: int,
    measured: str | Path | None,
    cache: str | Path | None,
) -> TileConfig:
    problem = Problem(kind, rows, columns, depth, groups, output_bytes(kind))
    candidates = ranked(kind, num_sms, cache)
    if measured is not None:
        name = load_measured(measured, device_name()).get((kind, rows, columns, depth, groups, num_sms))
        if name is not None:
            found = [tile for tile, _ in candidates if tile.name == name]
            if not found:
                allowed = ", ".join(tile.name for tile, _ in candidates)
                raise ValueError(f"{measured}: tile {name!r} of a {kind} is not to be had; allowed is one of {allowed}")
            return found[0]
    return min(candidates, key=lambda each: each[1].seconds(problem))[0]


def output_bytes(kind: str) -> int:
    """Moved for an element of the result: weight gradients are added to FP32."""
    return FP32_ACCUMULATED if kind in (WGRAD, GROUPED_WGRAD) else BF16_WRITTEN


@lru_cache(64)
def ranked(kind: str, num_sms: int, cache: str | Path | None = None) -> tuple[tuple[TileConfig, TileCost], ...]:
    """The tiles of a kind whose every compiled form passes the gates, and what each costs."""
    stored = _committed() if cache is None else current_properties(Path(cache))
    found = []
    for tile in TILES[kind]:
        name = variant_name(kind, tile)
        if name in stored.variants and not gate_failures(name, stored.variants):
            cost = tile_cost(stored.variants[name], kind, output_bytes(kind), num_sms)
            found.append((tile, cost))
    if not found:
        raise ValueError(f"no tile of a {kind} passes the gates; `python -m kernels gates` says why")
    return tuple(found)


def variant_name(kind: str, tile: TileConfig) -> str:
    """Of the compiled form that stands for this product and tile: BF16 results, or FP32 that is added to."""
    return f"gemm {kind} {tile.name}" + (" accumulate" if kind in (WGRAD, GROUPED_WGRAD) else "")


def gate_failures(name: str, variants: dict[str, Properties]) -> list[str]:
    """Why a tile may not be chosen: of the form `name` and of all others of its product and tile."""
    base = name.removesuffix(" accumulate")
    rows = [row for row in EXPECTED if row.name == base or row.name.startswith(f"{base} ")]
    failures = [] if any(row.name == name for row in rows) else [f"{name}: no row in the expected list"]
    for row in rows:
        if row.name not in variants:
            failures.append(f"{row.name}: not compiled")
        else:
            failures += [str(failure) for failure in held_against(row, variants[row.name])]
    return failures


@lru_cache(1)
def _committed() -> Stored:
    return load_properties(COMMITTED)


@lru_cache(8)
def current_properties(cache: Path) -> Stored:
    """Of the kernels as this Triton compiles these sources: the committed ones if they are that, else those of `cache`,
    compiled now unless they are there. BuildError: nothing can be compiled in this process. OSError: `cache`."""
    from kernels.compiled.build import require_compiler, triton_version

    triton, digest = triton_version(), source_digest()
    committed = _committed()
    if (committed.triton, committed.digest) == (triton, digest):
        return committed
    path = cache / f"kernels-{triton}-{digest[:16]}.json"
    if not path.exists():
        require_compiler()
        modules = variant_modules()
        rows = [row for row in EXPECTED if row.name.startswith("gemm ")]
        report = check(modules, [row.name for row in rows], rows, triton, jobs=min(os.cpu_count() or 1, 8))
        cache.mkdir(parents=True, exist_ok=True)
        write_properties(path, list(report.read.values()), triton, digest)
    return load_properties(path)


@lru_cache(1)
def device_name() -> str:
    """What a measured table calls this machine."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@lru_cache(8)
def load_measured(path: str | Path, device: str) -> dict[tuple[str, int, int, int, int, int], str]:
    """Tile names by product, of one device. ValueError: unreadable, or not what `write_measured` wrote."""
    return {each.product: each.tile for each in read_entries(Path(path)) if each.device == device}


def read_entries(path: Path) -> list[Entry]:
    """ValueError: unreadable, or not what `write_measured` wrote."""
    try:
        return [Entry(**each) for each in json.loads(path.read_text(encoding="utf-8"))["entries"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no table of measured tiles: {type(error).__name__}: {error}") from None


def write_measured(path: Path, entries: list[Entry]) -> None:
    """Whole or not at all. Entries of the same product on the same device are replaced, others of the file kept.
    OSError: it cannot be written. ValueError: what is there is no such table."""
    kept = read_entries(path) if path.exists() else []
    found = {(each.device, *each.product): asdict(each) for each in [*kept, *entries]}
    write_text(path, json.dumps({"entries": list(found.values())}, indent=1) + "\n")
