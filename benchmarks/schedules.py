"""Measured over simulated makespan of every schedule: real processes whose stages sleep, driven by the real executor.

    python benchmarks/schedules.py [--unit 0.04] [--ranks 4 8] [--repeats 3] [--schedules dualpipe 1f1b ...]

One gloo process for each pipeline rank. Costs of a *stage* are F 1, B 2, I 1, W 1, F&B 3 units for every schedule, also
where a rank holds two stages of a model that other schedules cut into half as many: the simulation has the same costs.
Each tensor that crosses is 1 MB and is checked by the stage that takes it (`sleeping.py`). M = 2P, and at P = 8 also
20. Makespan: from the first stage's first sleep to the end of the last sleep on any rank. Figures are medians over the
repeats. *jittered*: every sleep is multiplied by a seeded draw from [0.9, 1.1], against the simulation without.

Beside ours, turn about in the same processes, torch's Schedule1F1B, ScheduleZBVZeroBubble and ScheduleDualPipeV run
stages of the same costs (`torch_sleeping.py`), against the same simulation. torch's DualPipeV runs the two halves of a
pair one after the other, which takes the same 3 units here.

The control, in which every sleep is 5 % longer, must exceed the bound on the makespan. The timer's own lateness,
measured at the start, is taken off every sleep; `late_ms` is by how much a sleep then ended later than asked for, on
average over a step: what the machine and its other users add of their own.

The last line is one JSON object. Exit code 1 when a bound is missed: 1.03 (`worst_makespan_ratio`), 1.10
(`worst_jittered_ratio`); 69 when a rank fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import torch_sleeping
from benchmarks.processes import ProcessFailed, Report, gathered, gloo, start_together
from benchmarks.sleeping import Clock, Forget, SleepingStage, draws, timer_lateness
from parallel.pipeline.contract import DEFAULT_ORDER
from parallel.pipeline.executor import Executor
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Table, flatten
from parallel.schedule.boundary import consumed
from parallel.schedule.registry import SCHEDULES, build
from parallel.schedule.simulator import Costs, simulate

COSTS = Costs(forward=1, backward=2, input_grad=1, weight_grad=1, pair=3)
MAKESPAN_BOUND, JITTERED_BOUND = 1.03, 1.10
OURS, TORCH, CONTROL = "ours", "torch", "control"
CONTROLLED, CONTROL_FACTOR = "1f1b", 1.05
SILENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One schedule at one size. schedule: of the registry. engine: ours, torch's own of that name, or the control."""

    schedule: str
    engine: str
    ranks: int
    micro_batches: int

    @property
    def title(self) -> str:
        return self.schedule if self.engine == OURS else f"{self.schedule} ({self.engine})"


@dataclass(frozen=True)
class Run:
    """One step of one case. seconds: its makespan. late: seconds by which its sleeps ended late, on average.
    refused: why torch's schedule would not be built, or None."""

    case: Case
    jittered: bool
    seconds: float
    late: float
    refused: str | None = None


def cases(ranks: int, schedules: list[str]) -> list[list[Case]]:
    """Lists of cases that take turns."""
    out = []
    for micro_batches in [2 * ranks] + [20] * (ranks == 8):
        for name in schedules:
            engines = [OURS] + [TORCH] * (name in torch_sleeping.SCHEDULES)
            engines += [CONTROL] * (name == CONTROLLED and micro_batches == 2 * ranks)
            out.append([Case(name, engine, ranks, micro_batches) for engine in engines])
    return out


def body(rank: int, size: int, report: Report, schedules: list[str], unit: float, repeats: int) -> None:
    """One rank of every case of its size; rank 0 reports a `Run` for each step."""
    lateness = timer_lateness()
    for together in cases(size, schedules):
        table = build(together[0].schedule, size, together[0].micro_batches)
        units = sum(COSTS.of(compute) for compute in flatten(table.actions[rank]))
        arrivals = sum(consumed(compute, table.stages) is not None for compute in flatten(table.actions[rank]))
        clock = Clock(arrivals, lateness)
        pipelines: dict[Case, Any] = {}
        for case in together:
            try:
                pipelines[case] = make(case, table, rank, clock)
            except ValueError as error:  # torch's schedules refuse some sizes, on every rank alike
                if case.engine != TORCH:
                    raise
                if rank == 0:
                    report(Run(case, False, float("nan"), 0.0, str(error)))
                continue
            clock.start(0.0, {})
            pipelines[case].run()  # connections, buffers, torch's exchange of shapes
            clock.check()
        for repeat in range(repeats):
            for jittered in (False, True):
                for case, pipeline in pipelines.items():
                    if jittered and case.engine == CONTROL:
                        continue
                    asked = unit * CONTROL_FACTOR if case.engine == CONTROL else unit
                    clock.start(asked, draws(table, repeat) if jittered else {})
                    start_together()
                    pipeline.run()
                    spans = gathered((clock.first, clock.last, clock.late / clock.sleeps), size)
                    clock.check()
                    if not jittered and abs(clock.asked - units * asked) > 1e-6:
                        raise RuntimeError(f"{case.title}: slept for {clock.asked} s, not {units} units of {asked} s")
                    if rank == 0:
                        first, last, late = zip(*spans, strict=True)
                        report(Run(case, jittered, max(last) - min(first), statistics.mean(late)))


def make(case: Case, table: Table, rank: int, clock: Clock) -> Any:
    """Something with `run()`: one step."""
    if case.engine == TORCH:
        return torch_sleeping.TorchPipeline(table, rank, clock)
    store = WeightGradStore(Forget())
    stages = {key: SleepingStage(key, table, rank, clock, store) for key in table.stages_of(rank)}
    return Executor(table, rank, dict(stages), store, torch.float32, DEFAULT_ORDER)


def figures(case: Case, runs: list[Run], unit: float) -> dict[str, Any]:
    """What is shown of one case: medians of its runs beside the simulation at nominal costs (in units)."""
    simulation = simulate(build(case.schedule, case.ranks, case.micro_batches), COSTS)
    out: dict[str, Any] = {
        "schedule": case.title,
        "engine": case.engine,
        "ranks": case.ranks,
        "micro_batches": case.micro_batches,
        "simulated_s": round(simulation.makespan * unit, 6),
        "bubble_units": max(simulation.bubble(rank) for rank in range(case.ranks)),
    }
    refused = [run.refused for run in runs if run.refused is not None]
    if refused:
        return out | {"refused": refused[0]}
    for name, jittered in (("", False), ("jittered_", True)):
        seconds = [run.seconds for run in runs if run.jittered == jittered]
        if seconds:
            median = statistics.median(seconds)
            out |= {f"{name}measured_s": round(median, 4), f"{name}ratio": median / (simulation.makespan * unit)}
    return out | {"late_ms": round(statistics.mean(run.late for run in runs) * 1e3, 3)}


def show(console: Console, rows: list[dict[str, Any]], unit: float) -> None:
    grid = Grid(title=f"Makespans at F {unit * 1e3:g} ms, B 2, I 1, W 1, F&B 3 of it, for each stage")
    grid.add_column("schedule", no_wrap=True)
    for name in ("P", "M", "bubble", "simulated s", "measured s", "ratio", "jittered ratio", "late ms"):
        grid.add_column(name, justify="right")
    for row in rows:
        known = [str(row["ranks"]), str(row["micro_batches"]), f"{row['bubble_units']:g}", f"{row['simulated_s']:.3f}"]
        if "refused" in row:
            measured = ["refused", "", "", ""]
        else:
            jittered = f"{row['jittered_ratio']:.3f}" if "jittered_ratio" in row else ""
            measured = [f"{row['measured_s']:.3f}", f"{row['ratio']:.3f}", jittered, f"{row['late_ms']:.2f}"]
        grid.add_row(row["schedule"], *known, *measured)
    console.print(grid)
    for row in rows:
        if "refused" in row:
            console.print(f"{row['schedule']} P={row['ranks']} M={row['micro_batches']} did not run: {row['refused']}")


def verdict(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """(the figures of merit, the bounds that were missed)."""
    ours = [row for row in rows if row["engine"] == OURS]
    worst, jittered = (max(ours, key=lambda row: row[name]) for name in ("ratio", "jittered_ratio"))
    merits = {
        "worst_makespan_ratio": round(worst["ratio"], 4),
        "worst_jittered_ratio": round(jittered["jittered_ratio"], 4),
    }
    missed = [
        f"{name}={found[key]:.3f} ({found['schedule']} P={found['ranks']} M={found['micro_batches']}): at most {bound}"
        for name, found, key, bound in (
            ("worst_makespan_ratio", worst, "ratio", MAKESPAN_BOUND),
            ("worst_jittered_ratio", jittered, "jittered_ratio", JITTERED_BOUND),
        )
        if found[key] > bound
    ]
    controls = [row["ratio"] for row in rows if row["engine"] == CONTROL]
    if controls:
        merits["control_ratio"] = round(min(controls), 4)
        if min(controls) <= MAKESPAN_BOUND:
            missed.append(f"control_ratio={min(controls):.3f}: sleeps 5 % longer must exceed {MAKESPAN_BOUND}")
    return merits, missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measured over simulated makespan of every schedule.")
    parser.add_argument("--unit", type=float, default=0.04, help="seconds of one F")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="pipeline ranks, even")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES), metavar="NAME")
    arguments = parser.parse_args(argv)
    if arguments.unit <= 0 or arguments.repeats < 1 or any(ranks < 2 or ranks % 2 for ranks in arguments.ranks):
        parser.exit(64, "schedules: --unit must be positive, --repeats at least 1, --ranks even numbers from 2\n")
    console = Console()
    load = os.getloadavg()[0]
    runs: dict[Case, list[Run]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for ranks in arguments.ranks:
            every = [case for together in cases(ranks, arguments.schedules) for case in together]
            steps = sum(arguments.repeats * (1 if case.engine == CONTROL else 2) for case in every)
            bar = progress.add_task(f"P={ranks}", total=steps)
            given = (arguments.schedules, arguments.unit, arguments.repeats)
            try:
                for run in gloo(body, ranks, *given, timeout=SILENCE_SECONDS):
                    runs.setdefault(run.case, []).append(run)
                    done = 1 if run.refused is None else 2 * arguments.repeats
                    progress.update(
                        bar, advance=done, description=f"P={ranks} M={run.case.micro_batches} {run.case.title}"
                    )
            except ProcessFailed as error:
                progress.stop()
                print(f"schedules: P={ranks}: {error}", file=sys.stderr)
                return 69
    rows = [figures(case, found, arguments.unit) for case, found in runs.items()]
    show(console, rows, arguments.unit)
    merits, missed = verdict(rows)
    for line in missed:
        console.print(f"missed: {line}")
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    for row in rows:
        row.update({key: round(value, 4) for key, value in row.items() if key.endswith("ratio")})
    print(json.dumps({**merits, "unit_s": arguments.unit, "repeats": arguments.repeats, **loads, "rows": rows}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
