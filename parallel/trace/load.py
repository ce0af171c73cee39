"""From a file or directory of traces to the lanes of its ranks."""

from __future__ import annotations

from pathlib import Path

from parallel.trace.chrome import FORMAT
from parallel.trace.lanes import Lanes
from parallel.trace.own_trace import CATEGORIES, own_lanes
from parallel.trace.reader import Span, TraceError, TraceFile
from parallel.trace.torch_trace import TorchEvents, torch_lanes


def trace_files(path: Path) -> list[Path]:
    """The trace files at `path`: itself; or, in a directory, the rank files (also of a run directory's `trace`), or
    else every .json and .json.gz. Raises TraceError where there are none."""
    if not path.exists():
        raise TraceError(f"{path}: no such file or directory")
    if not path.is_dir():
        return [path]
    for directory in (path / "trace", path):
        found = list(directory.glob("rank-*.json"))
        if found:
            return sorted(found, key=lambda file: (len(file.name), file.name))
    found = sorted([*path.glob("*.json"), *path.glob("*.json.gz")])
    if not found:
        raise TraceError(f"{path}: no trace in it: looked for trace/rank-*.json, rank-*.json, *.json and *.json.gz")
    return found


def load(path: Path, first_rank: int = 0) -> tuple[list[Lanes], int]:
    """Lanes of one trace file of either format, and how many of its events were unusable.

    first_rank: the rank of a torch.profiler trace that does not name its own. Raises TraceError.
    """
    trace = TraceFile(path)
    own: list[Span] = []
    torch_events, categories, known = TorchEvents(), set[str](), False
    for span in trace.spans():
        if span.category in CATEGORIES:
            own.append(span)
        elif torch_events.keep(span):
            known = True
        elif len(categories) < 5:
            categories.add(span.category)
    other = trace.about.get("otherData")
    about = other if isinstance(other, dict) and other.get("format") == FORMAT else {}
    if own and (about or not known):
        if not all(isinstance(span.pid, int) for span in own):
            raise TraceError(f"{path}: a span's process is not a rank")
        return own_lanes(own, _number(about.get("offset_ns", 0)) / 1000), trace.skipped
    if about:
        return [], trace.skipped  # a rank that recorded nothing
    lanes = torch_lanes(torch_events, _rank(trace, first_rank))
    if not lanes:
        seen = ", ".join(repr(category) for category in sorted(categories)) or "none"
        raise TraceError(
            f"{path}: neither a trace of ours nor of torch.profiler: no kernels, operators or steps in it "
            f"(categories of its spans: {seen}; {trace.skipped} events unusable)"
        )
    return lanes, trace.skipped


def load_all(path: Path) -> tuple[list[Lanes], int]:
    """`load` over `trace_files(path)`. Raises TraceError, also where two files are the same rank."""
    found: dict[int, Lanes] = {}
    skipped = 0
    for file in trace_files(path):
        lanes, unusable = load(file, first_rank=len(found))
        skipped += unusable
        for lane in lanes:
            if lane.rank in found:
                raise TraceError(f"{file}: rank {lane.rank} was already read from another file")
            found[lane.rank] = lane
    if not found:
        raise TraceError(f"{path}: nothing was recorded")
    return [found[rank] for rank in sorted(found)], skipped


def _rank(trace: TraceFile, otherwise: int) -> int:
    described = trace.about.get("distributedInfo")
    rank = described.get("rank") if isinstance(described, dict) else None
    return rank if isinstance(rank, int) else otherwise


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
