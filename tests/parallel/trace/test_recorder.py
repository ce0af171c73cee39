"""The recorder, and what becomes of its spans: rank files, the merged trace, clocks."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from parallel.schedule.actions import Compute, Op, Pair, Payload, Transfer
from parallel.trace import clock
from parallel.trace.chrome import merge, rank_file, write_rank
from parallel.trace.clock import SAME_CLOCK, ClockOffset, clock_offset
from parallel.trace.files import published_text
from parallel.trace.reader import TraceError
from parallel.trace.recorder import NO_RECORDER, Channel, Kind, Recorder
from tests.distributed_helper import run_distributed


def recorded(rank: int, base: int) -> Recorder:
    """Two ranks that exchange the same tensor twice, with two sends and an all-to-all under way at once."""
    recorder = Recorder(rank)
    peer = 1 - rank
    forward, backward = Compute(Op.F, 0, rank, 3), Compute(Op.B, 1, 1 - rank, 2)
    for run in range(2):
        at = base + run * 10_000
        recorder.add(Kind.RUN, "run", at, at + 9_000)
        recorder.action(Pair(forward, backward), at, at + 5_000)
        recorder.add(Kind.STEP, "attn(F)", at, at + 2_000, action=forward)
        recorder.add(Kind.STEP, "mlp(B)", at + 2_000, at + 5_000, action=backward)
        sent = Transfer(rank == 0, Payload.ACTIVATION, 0, 1, 3, peer)
        recorder.add(Kind.COMMUNICATION, sent, at + 100, at + 4_100, peer=peer, bytes=64)
        other = Transfer(rank == 1, Payload.GRADIENT, 1, 0, 2, peer)
        recorder.add(Kind.COMMUNICATION, other, at + 200, at + 6_200, peer=peer, bytes=32)
        recorder.add(Kind.COMMUNICATION, "rows", at + 300, at + 400, channel=Channel.ALL_TO_ALL, step="dispatch(F)")
        recorder.add(Kind.WAIT, sent, at + 5_000, at + 6_000, channel=Channel.PIPELINE)
    return recorder


def test_disabled_is_none() -> None:
    assert NO_RECORDER is None


def test_issue_and_complete() -> None:
    recorder = Recorder(4)
    recorder.step = "dispatch(F)"
    before = Recorder.now()
    rows = recorder.issue(Kind.COMMUNICATION, "rows", channel=Channel.ALL_TO_ALL, bytes=12)
    recorder.step = None
    transfer = recorder.transfer(Transfer(True, Payload.GRADIENT, 0, 1, 2, 1), peer=5, size=8)
    recorder.complete(rows)
    known = rows.end
    recorder.complete(rows)
    assert before <= rows.start <= transfer.start and rows.end == known and known is not None
    assert rows.args == {"channel": Channel.ALL_TO_ALL, "bytes": 12, "step": "dispatch(F)"}
    assert transfer.end is None and transfer.args == {"peer": 5, "bytes": 8}
    recorder.clear()
    assert recorder.events == [] and recorder.step is None


def test_a_rank_file_is_a_trace_of_its_own(tmp_path: Path) -> None:
    recorder = recorded(1, base=5_000)
    never = recorder.issue(Kind.COMMUNICATION, "lost", channel=Channel.REDUCTION, group=object)
    never.start = 5_500
    path = write_rank(recorder, tmp_path, ClockOffset(-7, 3))
    assert path == rank_file(tmp_path, 1) == tmp_path / "trace" / "rank-1.json"
    written = json.loads(path.read_text())
    assert written["otherData"] == {
        "format": "bireme trace",
        "rank": 1,
        "offset_ns": -7,
        "round_trip_ns": 3,
        "start_ns": 5_000,
    }
    spans = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {1} and len(spans) == 2 * 9 + 1
    halves = [event for event in spans if event["cat"] == "action"][:2]
    assert [half["args"]["op"] for half in halves] == ["F", "B"]
    assert len({(half["ts"], half["dur"], half["tid"]) for half in halves}) == 1
    [lost] = [event for event in spans if event["name"] == "lost"]
    assert lost["args"]["unfinished"] is True and lost["dur"] == 18.5  # up to the last moment known
    assert list((tmp_path / "trace").iterdir()) == [path]


def check_nesting(events: list[dict[str, Any]]) -> None:
    """What viewers ask for: the spans of one thread lie one inside another or apart."""
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        for i, (start, end) in enumerate(spans):
            for other_start, other_end in spans[i + 1 :]:
                apart = other_end <= start + 1e-6 or end <= other_start + 1e-6
                inside = (start <= other_start and other_end <= end + 1e-6) or (
                    other_start <= start and end <= other_end + 1e-6
                )
                assert apart or inside


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_merge(tmp_path: Path, name: str) -> None:
    # rank 1's clock reads 1 ms less than rank 0's; it begins 2 us later
    files = [
        write_rank(recorded(0, base=9_000_000), tmp_path),
        write_rank(recorded(1, base=8_002_000), tmp_path, ClockOffset(1_000_000, 50)),
    ]
    out = tmp_path / name
    assert merge(files, out) == 2 * 18
    packed = out.read_bytes()
    assert packed.startswith(b"\x1f\x8b") is name.endswith(".gz")
    events = json.loads(gzip.decompress(packed) if name.endswith(".gz") else packed)["traceEvents"]
    starts = {rank: min(e["ts"] for e in events if e["ph"] == "X" and e["pid"] == rank) for rank in (0, 1)}
    assert starts == {0: 0.0, 1: 2.0}
    check_nesting(events)
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")}
    threads = ("actions", "compute", "pipeline communication", "pipeline communication 2", "all-to-all", "waits", "run")
    assert {(rank, thread) for rank in (0, 1) for thread in (f"rank {rank}", *threads)} == names
    arrows = [event for event in events if event["ph"] in "sf"]
    assert len(arrows) == 2 * 4
    for number in range(1, 5):
        tail, head = (next(e for e in arrows if e["id"] == number and e["ph"] == phase) for phase in "sf")
        assert {tail["pid"], head["pid"]} == {0, 1} and head["bp"] == "e" and tail["ts"] < head["ts"]
        ends = {}
        for end in (tail, head):
            around = [
                e
                for e in events
                if e["ph"] == "X"
                and (e["pid"], e["tid"]) == (end["pid"], end["tid"])
                and e["ts"] <= end["ts"] < e["ts"] + e["dur"]
            ]
            assert len(around) == 1  # the viewer ties an arrow to the span around its end
            ends[end["ph"]] = around[0]["args"]
        assert ends["s"]["send"] is True and ends["f"]["send"] is False
        assert all(ends["s"][key] == ends["f"][key] for key in ("payload", "direction", "stage", "chunk"))
    colours = {(e["cat"], e["tid"] // 1000, e["cname"]) for e in events if e["ph"] == "X" and e["cat"] != "action"}
    assert len(colours) == len({(kind, thread) for kind, thread, _ in colours})


def test_merge_refuses_what_is_not_a_rank_file(tmp_path: Path) -> None:
    path = write_rank(recorded(0, base=0), tmp_path)
    again = tmp_path / "rank-1.json"
    again.write_bytes(path.read_bytes())
    with pytest.raises(TraceError, match="rank 0 again"):
        merge([path, again], tmp_path / "out.json")
    again.write_text("[]")
    with pytest.raises(TraceError, match="not one rank's trace"):
        merge([path, again], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    for text in ("old", None):
        try:
            with published_text(path) as file:
                file.write(text or "half of the new o")
                if text is None:
                    raise KeyError("stop")
        except KeyError:
            pass
    assert gzip.decompress(path.read_bytes()) == b"old" and list(tmp_path.iterdir()) == [path]


def offsets(rank: int, world_size: int, apart: bool) -> ClockOffset:
    """Rank r's clock is r seconds ahead, if `apart`."""
    if apart:
        true_clock = clock.perf_counter_ns
        clock.perf_counter_ns = lambda: true_clock() + rank * 10**9
        clock._machine = lambda: [1, rank]
    return clock_offset()


def test_clock_offsets() -> None:
    assert [found.offset_ns for found in run_distributed(offsets, 2, False)] == [0, 0]
    found = run_distributed(offsets, 3, True)
    assert found[0] == SAME_CLOCK
    for rank in (1, 2):
        error = abs(found[rank].offset_ns + rank * 10**9)
        assert 0 < found[rank].round_trip_ns < 10**9 and error < 50_000_000
