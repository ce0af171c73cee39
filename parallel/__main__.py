"""`python -m parallel schedule=dualpipe stages=8 micro_batches=20 [out=DIR]`: a schedule's table and its figures.

Costs are the unit costs: F 1, B 2, I 1, W 1, F&B 3, transfers nothing. With `out`, the timeline is drawn to
DIR/<schedule>_p<stages>_m<micro_batches>.png and .svg. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from parallel.schedule.actions import Post, Table
from parallel.schedule.boundary import parts
from parallel.schedule.checker import check
from parallel.schedule.registry import SCHEDULES, build
from parallel.schedule.simulator import simulate

USAGE = f"usage: python -m parallel schedule={{{'|'.join(SCHEDULES)}}} stages=N micro_batches=N [out=DIR]"
EXIT_USAGE, EXIT_CANNOT_WRITE = 64, 73


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if set(arguments) & {"-h", "--help", "help"}:
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    try:
        given = _parse(arguments)
        table = build(given["schedule"], _number(given, "stages"), _number(given, "micro_batches"))
    except ValueError as error:
        print(f"python -m parallel: {error}", file=sys.stderr)
        return EXIT_USAGE
    files: list[Path] = []
    if "out" in given:
        try:
            files = _draw(table, Path(given["out"]))
        except OSError as error:
            print(f"python -m parallel: out={given['out']}: cannot write: {error.strerror or error}", file=sys.stderr)
            return EXIT_CANNOT_WRITE
    _print(table, files)
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    allowed = ("schedule", "stages", "micro_batches", "out")
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in allowed or not equals or not value:
            raise ValueError(f"{argument!r}: must be KEY=VALUE with KEY one of {', '.join(allowed)}; {USAGE}")
        if key in given:
            raise ValueError(f"{key} is given twice: {given[key]} and {value}")
        given[key] = value
    missing = [key for key in allowed[:3] if key not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; {USAGE}")
    return given


def _number(given: dict[str, str], key: str) -> int:
    try:
        return int(given[key])
    except ValueError:
        raise ValueError(f"{key}={given[key]}: must be a whole number") from None


def _draw(table: Table, folder: Path) -> list[Path]:
    # matplotlib takes longer to import than everything else here takes to run
    from parallel.schedule.drawing import Panel, bars_of, draw_timelines

    title = f"{table.name}, {table.ranks} ranks, {table.micro_batches} micro-batches, as scheduled"
    panel = Panel(title, bars_of(simulate(table)), "F")
    return list(draw_timelines([panel], folder / f"{table.name}_p{table.stages}_m{table.micro_batches}"))


def _print(table: Table, files: list[Path]) -> None:
    report, simulation = check(table), simulate(table)
    bubbles = [simulation.bubble(rank) for rank in range(table.ranks)]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    grid = Grid(title=f"{table.name}: {table.stages} stages, {table.micro_batches} micro-batches", title_justify="left")
    columns = ("rank", "stages", "actions (direction after the letter)", "idle", "peak chunks", "W queue", "overlapped")
    for name in columns:
        grid.add_column(name, justify="left" if name.startswith(("stages", "actions")) else "right")
    for rank in range(table.ranks):
        held = " ".join(f"{direction}.{stage}" for direction, stage in table.stages_of(rank))
        grid.add_row(
            str(rank),
            held,
            compact(table, rank),
            f"{bubbles[rank]:g}",
            str(report.peak_chunks[rank]),
            str(report.queue_depth[rank]),
            f"{report.overlap_share[rank]:.0%}",
        )
    console.print(grid)
    share = sum(bubbles) / (table.ranks * simulation.makespan)
    overlap = sum(report.overlap_share) / table.ranks
    print(
        f"makespan {simulation.makespan:g} F, bubble {max(bubbles):g} F on the most idle rank, {share:.1%} of all time"
    )
    print(f"{overlap:.0%} of forwards run inside an F&B pair; legal, no deadlock in gloo and nccl mode")
    for file in files:
        print(f"timeline: {file}")
    figures = {
        "schedule": table.name,
        "stages": table.stages,
        "micro_batches": table.micro_batches,
        "makespan": simulation.makespan,
        "bubble": max(bubbles),
        "bubble_share": round(share, 6),
        "peak_chunks": max(report.peak_chunks),
        "queue_depth": max(report.queue_depth),
        "overlap_share": round(overlap, 6),
        "files": [str(file) for file in files],
    }
    print(json.dumps(figures))


def compact(table: Table, rank: int) -> str:
    """A rank's compute actions without chunks, repeated runs folded: `F0 x6  (F0 F1) x2  ...`."""
    actions = [action for action in table.actions[rank] if not isinstance(action, Post)]
    words = ["&".join(f"{part.op}{part.direction}" for part in parts(action)) for action in actions]
    out, i = [], 0
    while i < len(words):
        best = (1, 1)  # (length of the run, times it stands here)
        for length in range(1, 5):
            run, times = words[i : i + length], 1
            while words[i + times * length : i + (times + 1) * length] == run:
                times += 1
            if times > 1 and length * times > best[0] * best[1]:
                best = (length, times)
        length, times = best
        run_text = " ".join(words[i : i + length])
        out.append(run_text if times == 1 else f"{run_text} x{times}" if length == 1 else f"({run_text}) x{times}")
        i += length * times
    return "  ".join(out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
