"""`python -m launch.ledger model=v3 pipeline=16 expert=64 ranks=2048 micro_batches=24,30,60,120 [key=value ...]`: what
every rank holds in memory, by kind, at its fullest moment over the simulated schedule, and what makes it fit.

model: a file of conf/model; model.KEY=VALUE changes one of its numbers. ranks: of the whole run, a multiple of
pipeline x expert. Also: schedule (dualpipe), sequences (1) and length (4096) of a micro-batch, layout (balanced),
budget (80e9 bytes of a card) and reserve (2e9 of them for CUDA context, communicators and rounding: an assumption),
out=DIR for the pictures and the tables as Markdown.
Choices, the code's own value first:
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from launch.ledger.choices import EFFECTS, choose
from launch.ledger.ledger import BUDGET, RESERVE, Plan
from launch.ledger.report import Grid, Ledger, figures, make_ledger, tables
from model.named import named_config
from parallel.arguments import pairs, whole_number

REQUIRED = ("model", "pipeline", "expert", "ranks", "micro_batches")
OPTIONAL = ("schedule", "sequences", "length", "layout", "budget", "reserve", "out")
USAGE = "usage: python -m launch.ledger model=NAME pipeline=N expert=N ranks=N micro_batches=N,N [key=value ...]"
EXIT_USAGE, EXIT_CANNOT_WRITE = 64, 73


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if set(arguments) & {"-h", "--help", "help"}:
        choices = "\n".join(f"  {k}={v}: {what}" for k, values in EFFECTS.items() for v, what in values.items())
        print(f"{USAGE}\n\n{__doc__}\n{choices}")
        return 0
    try:
        changed = [argument.partition("=")[0] for argument in arguments if argument.startswith("model.")]
        given = pairs(arguments, (*REQUIRED, *OPTIONAL, *EFFECTS, *changed), REQUIRED, USAGE)
        ledger = _ledger(given)
    except ValueError as error:
        print(f"python -m launch.ledger: {error}", file=sys.stderr)
        return EXIT_USAGE
    grids = tables(ledger)
    files: list[Path] = []
    if "out" in given:
        try:
            files = _write(ledger, grids, Path(given["out"]))
        except OSError as error:
            why = error.strerror or error
            print(f"python -m launch.ledger: out={given['out']}: cannot write: {why}", file=sys.stderr)
            return EXIT_CANNOT_WRITE
    _print(grids)
    for file in files:
        print(f"written: {file}")
    print(json.dumps(figures(ledger, [str(file) for file in files])))
    return 0


def _ledger(given: dict[str, str]) -> Ledger:
    model = named_config(given["model"], {key.removeprefix("model."): given[key] for key in given if "." in key})
    pipeline, expert, ranks = (whole_number(key, given[key]) for key in ("pipeline", "expert", "ranks"))
    if ranks % (pipeline * expert):
        raise ValueError(f"ranks={ranks}: must be a multiple of pipeline x expert = {pipeline * expert}")
    if model.num_routed_experts % expert or (not model.has_experts and expert > 1):
        raise ValueError(f"expert={expert}: must divide the model's {model.num_routed_experts} experts")
    plan = Plan(
        model,
        given.get("schedule", "dualpipe"),
        pipeline,
        expert,
        ranks // (pipeline * expert),
        whole_number("sequences", given.get("sequences", "1")),
        whole_number("length", given.get("length", "4096")),
        given.get("layout", ""),
        whole_number("reserve", given.get("reserve", str(RESERVE)), 0),
    )
    micro_batches = [whole_number("micro_batches", text) for text in given["micro_batches"].split(",")]
    budget = whole_number("budget", given.get("budget", str(BUDGET)))
    return make_ledger(plan, choose({k: v for k, v in given.items() if k in EFFECTS}), micro_batches, budget)


def _write(ledger: Ledger, grids: Sequence[Grid], folder: Path) -> list[Path]:
    # matplotlib takes longer to import than everything else here takes to run
    from launch.ledger.drawing import draw_classes, draw_timeline
    from parallel.schedule.drawing import publish

    classes, timeline, text = folder / "memory.png", folder / "memory_timeline.png", folder / "memory_tables.md"
    draw_classes(ledger, classes)
    middle = ledger.plan.pipeline // 2 - 1
    draw_timeline(ledger, sorted({0, max(middle, 0)}), timeline)
    publish(("\n\n".join(grid.markdown() for grid in grids) + "\n").encode(), text)
    return [classes, timeline, text]


def _print(grids: Sequence[Grid]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    for grid in grids:
        shown = RichTable(title=grid.title, title_justify="left")
        for i, column in enumerate(grid.columns):
            shown.add_column(column, justify="left" if i == 0 or column in grid.text else "right")
        for row in grid.rows:
            shown.add_row(*row)
        console.print(shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
