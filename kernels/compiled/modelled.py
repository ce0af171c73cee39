"""The modelled figures: what `python -m kernels bench` prints without a GPU, and the document made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernels.compiled.calibration import (
    FORWARD,
    H20_SERIAL_CLOCKS,
    MULTICAST,
    OUT_OF_SAMPLE,
    WEIGHT_GRADIENT,
    deep_gemm,
    modelled,
    residuals,
    serial_clocks,
)
from kernels.compiled.choose import choose, ranked
from kernels.compiled.cost import H800, KernelCost, estimate
from kernels.compiled.shapes import (
    TRAINING_BOUNDS,
    Shape,
    dense_dgrad,
    dense_forward,
    dense_wgrad,
    grouped_dgrad,
    grouped_forward,
    grouped_wgrad,
)
from kernels.hopper.tile import FPROP, GROUPED_WGRAD, WGRAD, TileConfig

# All SMs, and what V3 leaves to computation beside its communication (section 3.2.2).
ALL_SMS, COMPUTING_SMS = 132, 112
# Of DeepGEMM; groups are aligned to 128 rows.
FORWARD_TILES = ((128, 128), (128, 160), (256, 128))
GROUPED_TILES = ((128, 128), (128, 160))
WEIGHT_GRADIENT_TILES = ((128, 152),)


@dataclass(frozen=True)
class Modelled:
    """A product with the tile that is chosen for it. deep_gemm: TFLOPS by the same model, on all SMs."""

    shape: Shape
    tiles: dict[int, TileConfig]
    costs: dict[int, KernelCost]
    deep_gemm: float

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.shape.name,
            "product": self.shape.label,
            "tile": {sms: tile.name for sms, tile in self.tiles.items()},
            "modelled_tflops": {sms: round(cost.tflops, 1) for sms, cost in self.costs.items()},
            "bound": {sms: cost.bound for sms, cost in self.costs.items()},
            "deep_gemm_modelled_tflops": round(self.deep_gemm, 1),
            "deep_gemm_published_tflops": self.shape.published,
        }


def modelled_shapes() -> list[Shape]:
    """Those large enough for the model, which is fitted to 4,096 rows."""
    return [
        *dense_forward((16384, 4096)),
        *dense_dgrad(),
        *dense_wgrad(),
        *grouped_forward(),
        *grouped_dgrad(),
        *(shape for shape in grouped_wgrad() if 0 not in shape.counts),
    ]


def model(shape: Shape, sms: Sequence[int] = (ALL_SMS, COMPUTING_SMS)) -> Modelled:
    """The chooser's tile for a product and its modelled cost, on each number of SMs."""
    problem = shape.problem
    tiles, costs = {}, {}
    for count in sms:
        tile = choose(problem.kind, problem.rows, problem.columns, problem.depth, problem.groups, count)
        tiles[count] = tile
        costs[count] = dict(ranked(problem.kind, count))[tile].of(problem)
    gradient = problem.kind in (WGRAD, GROUPED_WGRAD)
    forward = GROUPED_TILES if shape.counts else FORWARD_TILES
    theirs = max(
        estimate(deep_gemm(tile, gradient), problem, multicast=MULTICAST).tflops
        for tile in (WEIGHT_GRADIENT_TILES if gradient else forward)
    )
    return Modelled(shape, tiles, costs, theirs)


COLUMNS = ("product", "weight", "tile", "132 SMs", "bound", "tile", "112 SMs", "DeepGEMM", "published")
TEXT_COLUMNS = ("product", "weight", "tile", "bound", "point", "tile of DeepGEMM")


def cells(found: Modelled) -> tuple[str, ...]:
    every, some = ALL_SMS, COMPUTING_SMS
    return (
        found.shape.label,
        found.shape.name,
        found.tiles[every].name,
        f"{found.costs[every].tflops:.0f}",
        found.costs[every].bound,
        found.tiles[some].name,
        f"{found.costs[some].tflops:.0f}",
        f"{found.deep_gemm:.0f}",
        "" if found.shape.published is None else f"{found.shape.published:.0f}",
    )


def training_bounds() -> list[tuple[str, float, float]]:
    """(product, modelled TFLOPS on all SMs, the least it must be)."""
    found = {}
    for shape in modelled_shapes():
        problem = shape.problem
        found[(problem.kind, problem.rows, problem.columns, problem.depth, problem.groups)] = shape
    return [
        (found[key].label, model(found[key], (ALL_SMS,)).costs[ALL_SMS].tflops, bound)
        for key, bound in TRAINING_BOUNDS.items()
    ]


BLOCK_COLUMNS = ("product", "tile", "tensor", "promote", "l2", "latency", "instructions")


def block_cells() -> list[tuple[str, ...]]:
    """What a K block takes with every dense tile."""
    found = []
    for kind in (FPROP, WGRAD):
        for tile, cost in ranked(kind, ALL_SMS):
            times = (f"{1e3 * cost.block_us[bound]:.0f}" for bound in ("tensor", "promote", "l2", "latency"))
            found.append((kind, tile.name, *times, f"{cost.instructions}"))
    return found


CALIBRATION_COLUMNS = ("point", "tile of DeepGEMM", "published", "model", "ratio")


def calibration_cells() -> list[tuple[str, ...]]:
    """Every point of the fit."""
    return [
        (
            f"{point.problem.kind} {point.problem.rows}x{point.problem.columns}x{point.problem.depth}"
            + (f" in {point.problem.groups} groups" if point.problem.groups > 1 else ""),
            f"{point.tile[0]}x{point.tile[1]}",
            f"{point.tflops:.0f}",
            f"{modelled(point):.0f}",
            f"{modelled(point) / point.tflops:.2f}",
        )
        for point in [*FORWARD, *WEIGHT_GRADIENT]
    ]


def out_of_sample_cells() -> list[tuple[str, ...]]:
    return [
        (check.name, f"{check.tflops:.0f}", f"{check.modelled:.0f}", f"{check.modelled / check.tflops:.2f}")
        for check in OUT_OF_SAMPLE
    ]


def markdown() -> str:
    """`docs/kernel-speed.md`."""
    forward, gradient = residuals(FORWARD), residuals(WEIGHT_GRADIENT)
    return DOCUMENT.format(
        machine=H800,
        forward_rms=100 * math.sqrt(sum(each**2 for each in forward) / len(forward)),
        forward_worst=100 * max(map(abs, forward)),
        gradient_worst=100 * max(map(abs, gradient)),
        forward_points=len(forward),
        gradient_points=len(gradient),
        products=_table(COLUMNS, [cells(model(shape)) for shape in modelled_shapes()]),
        bounds=_table(
            ("product", "modelled", "at least"),
            [(name, f"{found:.0f}", f"{bound:.0f}") for name, found, bound in training_bounds()],
        ),
        blocks=_table(BLOCK_COLUMNS, block_cells()),
        calibration=_table(CALIBRATION_COLUMNS, calibration_cells()),
        others=_table(("point", "published", "model", "ratio"), out_of_sample_cells()),
        h20=H20_SERIAL_CLOCKS,
        serial=serial_clocks(),
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align: Callable[[str], str] = lambda name: "---" if name in TEXT_COLUMNS else "---:"  # noqa: E731
    lines = [columns, [align(name) for name in columns], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


DOCUMENT = """# Speed of the FP8 products

**Nothing here was measured: no GPU has run these kernels.** Every rate of ours is modelled from their machine code.
This page is written by

```
python -m kernels bench --document docs/kernel-speed.md
```

and on a GPU `python -m kernels bench` compares every kernel with its definition, then times it beside cuBLAS in BF16
and FP8 and DeepGEMM; `--write PATH` makes the table of measured tiles that `kernels.measured` takes in place of the
model.

## Modelled rates

TFLOPS on an H800 SXM, on all 132 SMs and on the 112 that V3 leaves to computation. `tile` is the one chosen; `bound`
is what a K block waits for: the tensor cores, promotion, L2, or the bytes through HBM. `DeepGEMM` is its rate by the
same model (best of its tiles, all SMs), `published` what it reports on H800. A product is rows x columns x depth; rows
of a grouped product, or the depth of a grouped weight gradient, are those of all groups.

{products}

Bounds that the choice is tested against:

{bounds}

Nanoseconds of a K block of 128 by each bound, dense products on all SMs; the largest decides:

{blocks}

How to read it. The wide specialised tile is bound by promotion and by L2 about equally: its consumers wait for a scale
in the middle of a block, and Triton emits no multicast, by which two SMs of DeepGEMM share a read. Weight gradients are
bound by the instructions of their consumers: a product and a sum for every accumulator, the loads of a scale for every
row and column, and the check of each against the edge. On fewer SMs each gets more of L2, which helps only where L2
decides. Communication beside the products takes L2 and HBM too, which is not modelled.

## The model

`kernels/compiled/cost.py`. A persistent kernel walks over tiles; the time is that of the SM with the most of them,

```
launch + tiles of an SM * (tile overhead + K blocks * block + bytes of the result / its share of L2)
```

and at least the bytes of operands and results over HBM's {machine.hbm_tb_s} TB/s. A weight gradient moves 8 bytes for
each element of its result: FP32 is read, added to and written. A K block (128 of the depth) takes the longest of

- `tensor`: rows * columns * 128 / {machine.products_per_clock} clocks;
- `promote`, specialised: a consumer's own products, its instructions * {machine.issue_clocks}, and where the scales
  make one factor its wait for them, {machine.l2_clocks:.0f} clocks less what it promotes between two products; at least
  one clock an instruction for all consumers together;
- `promote`, plain: all products, then instructions * {machine.issue_clocks}, less what a second product covers of the
  first one's promotion;
- `l2`: the bytes of both tiles and of their scales over {machine.l2_tb_s} TB/s / SMs, at most
  {machine.l2_bytes_per_clock} bytes a clock;
- `latency`: {machine.memory_clocks:.0f} clocks / stages.

Tile, warps, stages, consumers and the instructions of the hot loop come from the compiled code
(`kernels/compiled/properties.json`). What the model cannot see: the order of instructions, conflicts for L2 between
SMs, clocks that fall under power, rows that are spread unevenly over experts.

## Calibration

Clock {machine.clock_ghz} GHz, L2 {machine.l2_tb_s} TB/s, launch {machine.launch_us} us, tile {machine.tile_us} us and
{machine.issue_clocks} clocks an instruction are the least squares over {forward_points} forward and {gradient_points}
weight-gradient points that DeepGEMM published for H800 (`kernels/compiled/calibration.py`; the test repeats the fit).
Forward: {forward_rms:.1f} % rms, worst {forward_worst:.1f} %; weight gradients: worst {gradient_worst:.1f} %.
DeepGEMM's instruction counts are not read but assumed: its promotion and 60 others, what our specialised kernel has.

{calibration}

Points that took no part:

{others}

vLLM's Triton kernel on H20 spends {h20:.0f} clocks a K block beside its products (its tile is assumed); the model
gives our plain kernel {serial:.0f}.
"""
