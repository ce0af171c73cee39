"""Chrome traces of recorded runs: one file per rank, written by the rank; one file of all ranks, merged from those.

Trace Event Format, as Perfetto and chrome://tracing open it: process = global rank, thread = kind of span. Spans that
overlap in time get threads of their own, since a thread's spans must nest. An arrow (flow) leads from each send to its
receive. Ranks never send spans to one another: each writes `trace/rank-N.json` in the run directory, and the merge
happens later, in one pass over the files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import TextIOBase
from pathlib import Path
from typing import Any

from parallel.schedule.actions import Compute, Pair, Transfer
from parallel.trace.clock import SAME_CLOCK, ClockOffset
from parallel.trace.files import published_text
from parallel.trace.reader import TraceError, TraceFile
from parallel.trace.recorder import Channel, Event, Kind, Recorder

FORMAT = "bireme trace"
# Threads of a rank from top to bottom. Lanes of one thread are numbered from its base.
THREADS = {
    "run": 1000,
    "actions": 2000,
    "compute": 3000,
    "pipeline communication": 4000,
    "all-to-all": 5000,
    "receive counts": 6000,
    "gradient reduction": 7000,
    "other communication": 8000,
    "waits": 9000,
}
_OF_KIND = {Kind.RUN: "run", Kind.ACTION: "actions", Kind.STEP: "compute", Kind.WAIT: "waits"}
_OF_CHANNEL = {
    Channel.PIPELINE: "pipeline communication",
    Channel.ALL_TO_ALL: "all-to-all",
    Channel.COUNTS: "receive counts",
    Channel.REDUCTION: "gradient reduction",
}
# Names of chrome://tracing's own palette; Perfetto colours by name.
_COLOUR = {
    "run": "grey",
    "compute": "rail_response",
    "pipeline communication": "rail_load",
    "all-to-all": "rail_animation",
    "receive counts": "yellow",
    "gradient reduction": "olive",
    "other communication": "generic_work",
    "waits": "terrible",
}
_COLOUR_OF_OP = {"F": "thread_state_runnable", "B": "thread_state_running", "I": "good", "W": "thread_state_unknown"}


def rank_file(directory: Path, rank: int) -> Path:
    """Where `rank` writes its spans: `directory` is the run directory."""
    return directory / "trace" / f"rank-{rank}.json"


def write_rank(recorder: Recorder, directory: Path, clock: ClockOffset = SAME_CLOCK) -> Path:
    """Write one rank's spans to `rank_file`, a Chrome trace of its own; raises OSError where that fails.

    Times stay those of the rank's clock; `clock` is written beside them and applied by whoever reads.
    """
    events = recorder.events
    latest = max((event.end or event.start for event in events), default=0)
    spans = [span for event in events for span in _spans(event, latest)]
    about = {
        "format": FORMAT,
        "rank": recorder.rank,
        "offset_ns": clock.offset_ns,
        "round_trip_ns": clock.round_trip_ns,
        "start_ns": min((start for _, start, _, _ in spans), default=None),
    }
    path = rank_file(directory, recorder.rank)
    with published_text(path) as file, _Writer(file, about) as write:
        for event in _chrome_events(spans, recorder.rank):
            write(event)
    return path


def merge(files: Sequence[Path], out: Path) -> int:
    """Merge rank files into `out` (gzip if it ends in .gz); returns the number of spans.

    Times become microseconds since the earliest span of any rank, on rank 0's clock. Raises TraceError for a file that
    is none of ours, or two of one rank; OSError where `out` cannot be written.
    """
    headers = {path: _header(path) for path in files}
    by_rank: dict[int, Path] = {}
    for path, header in headers.items():
        other = by_rank.setdefault(header["rank"], path)
        if other is not path:
            raise TraceError(f"{path}: rank {header['rank']} again, after {other}")
    starts = [h["start_ns"] + h["offset_ns"] for h in headers.values() if h["start_ns"] is not None]
    origin = min(starts, default=0)
    clocks = {str(h["rank"]): {name: h[name] for name in ("offset_ns", "round_trip_ns")} for h in headers.values()}
    about = {"format": FORMAT, "merged": len(files), "clocks": clocks}
    count, flows = 0, _Flows()
    with published_text(out) as file, _Writer(file, about) as write:
        for rank in sorted(by_rank):
            path = by_rank[rank]
            for event in TraceFile(path).events():
                if event.get("ph") == "X":
                    shift = headers[path]["offset_ns"] - origin
                    event["ts"] = _microseconds(round(event["ts"] * 1000) + shift)
                    flows.see(rank, event)
                    count += 1
                write(event)
        for event in flows.events():
            write(event)
    return count


def _header(path: Path) -> dict[str, Any]:
    trace = TraceFile(path)
    for _ in trace.events():
        break  # what was written before the first event
    header = trace.about.get("otherData")
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("rank"), int):
        raise TraceError(f"{path}: not one rank's trace as written by parallel.trace")
    return header


_Spans = tuple[str, int, int, dict[str, Any]]  # thread, start, end (ns), the event's name, cat, cname and args


def _spans(event: Event, latest: int) -> Iterator[_Spans]:
    end = event.end if event.end is not None else max(latest, event.start)
    args = {key: _plain(value) for key, value in event.args.items()}
    if event.end is None:
        args["unfinished"] = True
    name = event.name
    if event.kind is Kind.ACTION and isinstance(name, Compute | Pair):
        for part in (name.forward, name.backward) if isinstance(name, Pair) else (name,):
            of_part = {"op": str(part.op), "direction": part.direction, "stage": part.stage, "chunk": part.chunk}
            colour = _COLOUR_OF_OP[str(part.op)]
            yield "actions", event.start, end, _content(str(part), event.kind, colour, {**of_part, **args})
        return
    if isinstance(name, Transfer):
        of_transfer = {
            "channel": str(Channel.PIPELINE),
            "send": name.send,
            "payload": str(name.payload),
            "direction": name.direction,
            "stage": name.stage,
            "chunk": name.chunk,
        }
        args = {**of_transfer, **args}
    thread = _OF_KIND.get(event.kind) or _OF_CHANNEL.get(args.get("channel"), "other communication")  # type: ignore[call-overload]
    colour = _COLOUR.get(thread, _COLOUR_OF_OP["F"])
    yield thread, event.start, end, _content(str(name), event.kind, colour, args)


def _content(name: str, kind: Kind, colour: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "cat": str(kind), "cname": colour, "args": args}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _chrome_events(spans: Iterable[_Spans], rank: int) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", rank, 0, name=f"rank {rank}")
    yield _metadata("process_sort_index", rank, 0, sort_index=rank)
    of_thread: dict[str, list[_Spans]] = defaultdict(list)
    for span in spans:
        of_thread[span[0]].append(span)
    for thread, base in THREADS.items():
        lanes: list[list[int]] = []
        nests = thread in ("run", "actions", "compute")
        for _, start, end, content in sorted(of_thread[thread], key=lambda span: (span[1], -span[2])):
            lane = _lane(lanes, start, end, nests)
            if lane == len(lanes):
                lanes.append([])
                yield _metadata("thread_name", rank, base + lane, name=f"{thread} {lane + 1}" if lane else thread)
                yield _metadata("thread_sort_index", rank, base + lane, sort_index=base + lane)
            lanes[lane].append(end)
            times = {"ts": _microseconds(start), "dur": _microseconds(end - start)}
            yield {"ph": "X", "pid": rank, "tid": base + lane, **times, **content}


def _lane(lanes: list[list[int]], start: int, end: int, nests: bool) -> int:
    """The first lane free at `start`, or, where spans may nest, with room inside the span that is open there."""
    for lane, open_ends in enumerate(lanes):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if not open_ends or (nests and end <= open_ends[-1]):
            return lane
    return len(lanes)


def _metadata(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _microseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1000, 3)


class _Flows:
    """Arrows from sends to receives. The n-th send of a tensor belongs to the n-th receive of it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], int] = defaultdict(int)
        self._ends: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = defaultdict(dict)

    def see(self, rank: int, event: dict[str, Any]) -> None:
        args = event.get("args", {})
        if event.get("cat") != Kind.COMMUNICATION or "send" not in args or "peer" not in args:
            return
        send, peer = bool(args["send"]), args["peer"]
        ranks = (rank, peer) if send else (peer, rank)
        key = (*ranks, *(args.get(name) for name in ("payload", "direction", "stage", "chunk", "tag")))
        occurrence = self._seen[send, key]
        self._seen[send, key] += 1
        # The arrow starts where the send is issued and ends inside the receive, a nanosecond before it is over.
        at = event["ts"] if send else max(event["ts"], round(event["ts"] + event["dur"] - 0.001, 3))
        self._ends[*key, occurrence][send] = {"pid": rank, "tid": event["tid"], "ts": at}

    def events(self) -> Iterator[dict[str, Any]]:
        pairs = (ends for ends in self._ends.values() if len(ends) == 2)
        for number, ends in enumerate(pairs, 1):
            common = {"cat": "transfer", "name": "transfer", "id": number}
            yield {"ph": "s", **common, **ends[True]}
            yield {"ph": "f", "bp": "e", **common, **ends[False]}


class _Writer:
    """Writes a trace object event by event."""

    def __init__(self, file: TextIOBase, about: dict[str, Any]) -> None:
        self._file, self._about, self._separator = file, about, "\n"

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(self._about)},"traceEvents":[')
        return self._write

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"

    def __exit__(self, kind: object, error: object, stack: object) -> None:
        if kind is None:
            self._file.write("\n]}\n")
