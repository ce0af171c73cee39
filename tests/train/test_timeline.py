"""The pipeline of one step as measured, and as scheduled at the measured mean durations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel.pipeline.executor import Measured
from parallel.schedule.actions import Op, Pair, Table
from parallel.schedule.registry import build
from parallel.schedule.simulator import Costs, simulate
from train.timeline import timeline, write_timeline

Bar = tuple[str, int, int, int, float, float]


def bars(entries: list[dict], rank: int) -> list[Bar]:
    return [
        (e["op"], e["direction"], e["stage"], e["chunk"], e["start"], e["end"]) for e in entries if e["rank"] == rank
    ]


def test_one_rank_written_out() -> None:
    """F takes 1 and 3 seconds without its waits, B 3 and 5: scheduled at 2 and 4. A wait comes before its bar."""
    measured = [
        Measured(0, "F", 0, 0, 0, 100.0, 102.0, 1.0),
        Measured(0, "B", 0, 0, 0, 102.0, 105.0, 0.0),
        Measured(0, "F", 0, 0, 1, 106.0, 109.0, 0.0),
        Measured(0, "B", 0, 0, 1, 109.0, 116.0, 2.0),
    ]
    found = timeline(build("1f1b", 1, 2), measured)
    assert bars(found["scheduled"], 0) == [
        ("F", 0, 0, 0, 0.0, 2.0),
        ("B", 0, 0, 0, 2.0, 6.0),
        ("F", 0, 0, 1, 6.0, 8.0),
        ("B", 0, 0, 1, 8.0, 12.0),
    ]
    assert bars(found["measured"], 0) == [
        ("F", 0, 0, 0, 1.0, 2.0),
        ("B", 0, 0, 0, 2.0, 5.0),
        ("F", 0, 0, 1, 6.0, 9.0),
        ("B", 0, 0, 1, 11.0, 16.0),
    ]


def as_measured(table: Table, costs: Costs) -> list[Measured]:
    """A step that ran exactly as simulated, on a clock that began long ago, every action after a wait of 0.25 s."""
    found = []
    for timed in (t for row in simulate(table, costs).timed for t in row):
        parts = (timed.action.forward, timed.action.backward) if isinstance(timed.action, Pair) else (timed.action,)
        start, end = 2 * timed.start + 1000, 2 * timed.start + 1000.25 + timed.end - timed.start
        found += [Measured(timed.rank, str(p.op), p.direction, p.stage, p.chunk, start, end, 0.25) for p in parts]
    return found


@pytest.mark.parametrize("stages,micro_batches", [(2, 8), (4, 10)])
def test_dualpipe_is_scheduled_at_the_mean_durations(stages: int, micro_batches: int) -> None:
    table = build("dualpipe", stages, micro_batches)
    costs = Costs(forward=1.0, backward=2.5, input_grad=1.25, weight_grad=0.75, pair=3.125)
    found = timeline(table, as_measured(table, costs))
    expected: dict[int, list[Bar]] = {}
    for timed in (t for row in simulate(table, costs).timed for t in row):
        parts = (timed.action.forward, timed.action.backward) if isinstance(timed.action, Pair) else (timed.action,)
        expected.setdefault(timed.rank, []).extend(
            (str(p.op), p.direction, p.stage, p.chunk, timed.start, timed.end) for p in parts
        )
    assert {op for row in expected.values() for op, *_ in row} == {str(op) for op in Op}
    for rank, row in expected.items():
        scheduled = bars(found["scheduled"], rank)
        assert [bar[:4] for bar in scheduled] == [bar[:4] for bar in row]
        assert [bar[4:] for bar in scheduled] == [pytest.approx(bar[4:]) for bar in row]
        assert [bar[:4] for bar in bars(found["measured"], rank)] == [bar[:4] for bar in row]
    assert min(entry["start"] for entry in found["measured"]) == 0.25  # after the first action's wait


def test_the_file_is_whole(tmp_path: Path) -> None:
    table = build("dualpipe", 2, 4)
    measured = as_measured(table, Costs())
    path = tmp_path / "timeline.json"
    write_timeline(path, table, measured)
    assert json.loads(path.read_text()) == timeline(table, measured)
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]
