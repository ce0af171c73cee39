"""Pipeline schedules: one table with its figures, or all of them side by side.

    python -m parallel schedule=dualpipe stages=8 micro_batches=20 [stages_per_rank=V] [out=DIR|none]
    python -m parallel compare ranks=8 micro_batches=20 [out=DIR|none] [F=1 B=2 W=1 pair=3 send=0 all_to_all_F=.. ...]

The first prints a schedule's table at unit costs: F 1, B 2, I 1, W 1, F&B 3, transfers nothing. `stages` are the
pipeline stages of a direction, on as many ranks except for zbv and dualpipev (two on a rank) and interleaved
(stages_per_rank, 2 if not given); `ranks` may be given instead. The timeline is drawn to
DIR/<schedule>_p<stages>_m<micro_batches>.png and .svg.

The second puts all schedules beside one another at equal costs of a rank's layers: F, B (whole), W, pair (F + B if not
given), send, and dispatch and combine of the experts, all_to_all_F and all_to_all_B (DeepSeek's measured share of F and
B if not given), of which a pair leaves exposed_share. It writes DIR/compare_p<ranks>_m<micro_batches>.html, and its
pictures without and with all-to-all as .png and .svg.

DIR is runs/schedules if not given; out=none draws nothing. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from parallel.arguments import pairs
from parallel.schedule.actions import Post, Table
from parallel.schedule.boundary import parts
from parallel.schedule.checker import check
from parallel.schedule.comparison import HEADINGS, Row, cells, compare, measured_all_to_all, page
from parallel.schedule.registry import SCHEDULES, build, stages_per_rank
from parallel.schedule.simulator import Costs, simulate

USAGE = (
    f"usage: python -m parallel schedule={{{'|'.join(SCHEDULES)}}} stages=N micro_batches=N [stages_per_rank=V] "
    "[out=DIR|none], or python -m parallel compare ranks=N micro_batches=N [out=DIR|none] [F= B= W= pair= send= "
    "all_to_all_F= all_to_all_B= exposed_share=]"
)
EXIT_USAGE, EXIT_CANNOT_WRITE = 64, 73
OUT, NOTHING = "runs/schedules", "none"
ONE = ("schedule", "stages", "ranks", "micro_batches", "stages_per_rank", "out")
COSTS = ("F", "B", "W", "pair", "send", "all_to_all_F", "all_to_all_B", "exposed_share")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if set(arguments) & {"-h", "--help", "help"}:
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    given: dict[str, str] = {}
    try:
        if list(arguments[:1]) == ["compare"]:
            given = pairs(arguments[1:], ("ranks", "micro_batches", "out", *COSTS), ("ranks", "micro_batches"), USAGE)
            return _compare(given)
        given = pairs(arguments, ONE, ("schedule", "micro_batches"), USAGE)
        return _one(given)
    except ValueError as error:
        print(f"python -m parallel: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        out = given.get("out", OUT)
        print(f"python -m parallel: out={out}: cannot write: {error.strerror or error}", file=sys.stderr)
        return EXIT_CANNOT_WRITE


def _number(given: dict[str, str], key: str) -> int:
    try:
        return int(given[key])
    except ValueError:
        raise ValueError(f"{key}={given[key]}: must be a whole number") from None


def _folder(given: dict[str, str]) -> Path | None:
    out = given.get("out", OUT)
    return None if out == NOTHING else Path(out)


def _one(given: dict[str, str]) -> int:
    name = given["schedule"]
    wanted = _number(given, "stages_per_rank") if "stages_per_rank" in given else None
    held = stages_per_rank(name, wanted)
    if ("stages" in given) == ("ranks" in given):
        raise ValueError(f"exactly one of stages and ranks must be given; {USAGE}")
    if "ranks" in given:
        ranks = _number(given, "ranks")
    else:
        ranks, rest = divmod(_number(given, "stages"), held)
        if rest:
            raise ValueError(f"stages={given['stages']}: must be a multiple of {held}: {name} has {held} on every rank")
    table = build(name, ranks, _number(given, "micro_batches"), wanted)
    folder = _folder(given)
    files = _draw(table, folder) if folder else []
    _print(table, files)
    return 0


def _draw(table: Table, folder: Path) -> list[Path]:
    # matplotlib takes longer to import than everything else here takes to run
    from parallel.schedule.drawing import Panel, bars_of, draw_timelines

    title = f"{table.name}, {table.ranks} ranks, {table.micro_batches} micro-batches, as scheduled"
    panel = Panel(title, bars_of(simulate(table)), "F")
    return list(draw_timelines([panel], folder / f"{table.name}_p{table.stages}_m{table.micro_batches}"))


def _compare(given: dict[str, str]) -> int:
    ranks, micro_batches, costs = _number(given, "ranks"), _number(given, "micro_batches"), _costs(given)
    rows = compare(ranks, micro_batches, costs)
    subtitle = (
        f"{ranks} ranks, {micro_batches} micro-batches; F {costs.forward:g}, B {costs.backward:g}, "
        f"W {costs.weight_grad:g}, F&B {costs.pair:g}, transfer {costs.send:g}, all-to-all "
        f"F {costs.all_to_all_forward:.3g} and B {costs.all_to_all_backward:.3g}, of which a pair leaves "
        f"{costs.exposed_share:.1%}"
    )
    folder = _folder(given)
    files = _draw_comparison(rows, subtitle, folder) if folder else []
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    grid = Grid(title=subtitle, title_justify="left")
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in rows:
        grid.add_row(*cells(row))
    console.print(grid)
    for file in files:
        print(f"written: {file}")
    figures = {"ranks": ranks, "micro_batches": micro_batches, "schedules": [row.figures() for row in rows]}
    print(json.dumps({**figures, "files": [str(file) for file in files]}))
    return 0


def _costs(given: dict[str, str]) -> Costs:
    def cost(key: str, default: float) -> float:
        try:
            value = float(given.get(key, default))
        except ValueError:
            raise ValueError(f"{key}={given[key]}: must be a number") from None
        if not 0 <= value < float("inf"):
            raise ValueError(f"{key}={given[key]}: must be at least 0 and finite")
        return value

    forward, backward, weight = cost("F", 1), cost("B", 2), cost("W", 1)
    if not 0 < weight < backward or not forward:
        raise ValueError(f"F={forward:g} B={backward:g} W={weight:g}: F and W must be above 0, and B above W")
    costs = Costs(
        forward,
        backward,
        input_grad=backward - weight,
        weight_grad=weight,
        pair=cost("pair", forward + backward),
        send=cost("send", 0),
        exposed_share=cost("exposed_share", Costs.exposed_share),
    )
    costs = measured_all_to_all(costs)
    return replace(
        costs,
        all_to_all_forward=cost("all_to_all_F", costs.all_to_all_forward),
        all_to_all_backward=cost("all_to_all_B", costs.all_to_all_backward),
    )


def _draw_comparison(rows: Sequence[Row], subtitle: str, folder: Path) -> list[Path]:
    from parallel.schedule.drawing import Panel, bars_of, draw_timelines, publish

    stem = f"compare_p{rows[0].table.ranks}_m{rows[0].table.micro_batches}"
    files, pictures = [], []
    for suffix, caption in (("", "Without all-to-all"), ("_all_to_all", "With all-to-all")):
        runs = [row.run_all_to_all if suffix else row.run for row in rows]
        panels = [
            Panel(
                f"{row.table.name}{' with all-to-all' if suffix else ''} ({row.parameters}x parameters, "
                f"peak {row.peak:g} chunks)",
                bars_of(run),
                "F",
            )
            for row, run in zip(rows, runs, strict=True)
        ]
        png, svg = draw_timelines(panels, folder / f"{stem}{suffix}", one_axis=True, row_in=0.24)
        files += [png, svg]
        pictures.append((caption, svg.read_text()))
    html = folder / f"{stem}.html"
    publish(page(rows, subtitle, pictures).encode(), html)
    return [html, *files]


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
        "ranks": table.ranks,
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
