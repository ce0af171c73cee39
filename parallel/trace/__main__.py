"""`python -m parallel.trace FILE_OR_DIR [out=DIR]`: bubble, exposed all-to-all and order of steps of a recorded run.

FILE_OR_DIR: a run directory or its `trace` directory, a merged trace, or a torch.profiler trace such as DeepSeek's
published one (.json or .json.gz), or a directory of those. With `out`, DIR/timeline.png is drawn, and the files of
several ranks of a run are merged into DIR/trace.json.gz for Perfetto. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from parallel.trace.analyse import Figures, Hidden, Round, figures, hidden, rounds, summary, windows
from parallel.trace.chrome import merge
from parallel.trace.intervals import Intervals, union
from parallel.trace.lanes import Lanes
from parallel.trace.load import load_all, trace_files
from parallel.trace.reader import TraceError

USAGE = "usage: python -m parallel.trace FILE_OR_DIR [out=DIR]"
EXIT_USAGE, EXIT_BAD_DATA, EXIT_CANNOT_WRITE = 64, 65, 73
ROWS = 64  # of the table by rank; the last line holds all ranks


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if set(arguments) & {"-h", "--help", "help"}:
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    try:
        path, out = _parse(arguments)
    except ValueError as error:
        print(f"python -m parallel.trace: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        ranks, skipped = _load(path)
        spans = windows(ranks)
        found = [figures(lanes, spans[lanes.rank]) for lanes in ranks]
        if not sum(one.span for one in found):
            raise TraceError(f"{path}: nothing in it takes any time")
        files = [] if out is None else _write(path, ranks, found, spans, out)
    except TraceError as error:
        print(f"python -m parallel.trace: {error}".replace("\n", " "), file=sys.stderr)
        return EXIT_BAD_DATA
    except OSError as error:
        print(f"python -m parallel.trace: out={out}: cannot write: {error.strerror or error}", file=sys.stderr)
        return EXIT_CANNOT_WRITE
    hides, orders = hidden(ranks), rounds(ranks)
    _print(found, hides, orders, skipped)
    for file in files:
        print(f"written: {file}")
    report = {"path": str(path), **summary(found, hides, orders, skipped), "files": [str(file) for file in files]}
    print(json.dumps(report, ensure_ascii=False))
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Path, Path | None]:
    paths = [one for one in arguments if not one.startswith("out=")]
    outs = [one.removeprefix("out=") for one in arguments if one.startswith("out=")]
    for one in paths:
        if "=" in one and not Path(one).exists():
            raise ValueError(f"{one!r}: the only key is out; {USAGE}")
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} paths given, one is needed; {USAGE}")
    if len(outs) > 1 or "" in outs:
        raise ValueError(f"out must be given at most once, and name a directory; {USAGE}")
    return Path(paths[0]), Path(outs[0]) if outs else None


def _load(path: Path) -> tuple[list[Lanes], int]:
    console = Console(stderr=True)
    if not console.is_terminal:
        return load_all(path)
    with console.status(f"reading {path}"):
        return load_all(path)


def _write(path: Path, ranks: list[Lanes], found: list[Figures], spans: dict[int, Intervals], out: Path) -> list[Path]:
    # matplotlib takes longer to import than most traces take to read
    from parallel.trace.drawing import draw_lanes

    written = [draw_lanes(ranks, found, union(*spans.values()), out / "timeline.png")]
    files = trace_files(path)
    if path.is_dir() and files[0].name.startswith("rank-") and all(lanes.source == "recorder" for lanes in ranks):
        merge(files, out / "trace.json.gz")
        written.append(out / "trace.json.gz")
    return written


def _print(found: list[Figures], hides: list[Hidden], orders: list[Round], skipped: int) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_by_rank(found))
    if len(found) > ROWS:
        console.print(f"and {len(found) - ROWS} ranks more; the last line holds them all")
    if hides:
        console.print(_hidden(hides))
    for one in orders:
        equal = f"equals the {' and the '.join(one.equals)} order" if one.equals else "equals no declared order"
        console.print(f"{one.times} x {' '.join(one.order)}: {equal}", soft_wrap=True)
    if skipped:
        console.print(f"{skipped} events could not be used: a time is missing, or a begin has no end")


def _by_rank(found: list[Figures]) -> Grid:
    title = "times in ms; exposed: an all-to-all runs or is waited for and nothing computes"
    grid = Grid(title=title, title_justify="left")
    columns = ("rank", "span", "compute", "all-to-all", "overlapped", "exposed", "of all-to-all", "of span", "idle")
    for name in (*columns, "bubble"):
        grid.add_column(name, justify="right")
    for one in found[:ROWS]:
        times = (one.span, one.compute, one.all_to_all, one.overlapped, one.exposed)
        grid.add_row(
            str(one.rank),
            *(f"{time:,.3f}" for time in times),
            f"{one.exposed_of_all_to_all:.1%}",
            f"{one.exposed_of_span:.1%}",
            f"{one.idle:,.3f}",
            "-" if one.bubble is None else f"{one.bubble:,.3f} ({one.bubble / one.span:.1%})",
        )
    return grid


def _hidden(hides: list[Hidden]) -> Grid:
    grid = Grid(title="what hides what: means per all-to-all, ms", title_justify="left")
    for name in ("all-to-all", "times", "busy", "exposed"):
        grid.add_column(name, justify="left" if name == "all-to-all" else "right")
    grid.add_column("runs while")
    for one in hides:
        behind = ", ".join(f"{step} {time:.3f}" for step, time in one.behind.items())
        grid.add_row(one.name, str(one.count), f"{one.busy:.3f}", f"{one.exposed:.3f}", behind or "nothing computes")
    return grid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
