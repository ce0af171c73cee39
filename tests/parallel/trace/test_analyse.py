"""The analysis of our own traces: against a count of cells, against the simulator, and of orders."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.contract import DEFAULT_ORDER, PUBLISHED_ORDER
from parallel.schedule.actions import Compute, Op, Pair
from parallel.schedule.drawing import Panel, bars_of
from parallel.schedule.registry import build
from parallel.schedule.simulator import simulate
from parallel.trace.analyse import figures, hidden, rounds, split_rounds, windows
from parallel.trace.chrome import merge, write_rank
from parallel.trace.clock import ClockOffset
from parallel.trace.intervals import both, intervals, total, union, where, without
from parallel.trace.lanes import Lanes, innermost, step_of
from parallel.trace.load import load_all
from parallel.trace.recorder import Channel, Kind, Recorder

PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: (min(p), max(p))), max_size=8)


def as_cells(pairs: list[tuple[int, int]]) -> np.ndarray:
    cells = np.zeros(30, dtype=bool)
    for start, end in pairs:
        cells[start:end] = True
    return cells


@given(PAIRS, PAIRS, PAIRS)
def test_interval_algebra(a: list[tuple[int, int]], b: list[tuple[int, int]], c: list[tuple[int, int]]) -> None:
    x, y, z = intervals(a), intervals(b), intervals(c)
    i, j, k = as_cells(a), as_cells(b), as_cells(c)
    for found, cells in (
        (x, i),
        (union(x, y, z), i | j | k),
        (both(x, y), i & j),
        (without(x, y), i & ~j),
        (where(lambda p, q, r: p & ~q & ~r, x, y, z), i & ~j & ~k),
    ):
        assert (as_cells([(int(s), int(e)) for s, e in found]) == cells).all() and total(found) == cells.sum()
        assert (found[1:, 0] > found[:-1, 1]).all() and (found[:, 1] > found[:, 0]).all()


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 10**6))
def test_innermost(points: list[int], seed: int) -> None:
    random, outer = Random(seed), list[tuple[int, int]]()

    def nest(start: int, end: int) -> None:
        while end - start > 1 and random.random() < 0.8:
            first = random.randint(start, end - 1)
            last = random.randint(first + 1, end)
            outer.append((first, last))
            nest(first, last)
            start = last

    nest(0, 30)
    random.shuffle(outer)
    for point, found in zip(points, innermost([p + 0.5 for p in points], outer), strict=True):
        around = [one for one in outer if one[0] < point + 0.5 < one[1]]
        if not around:
            assert found == -1
        else:
            assert outer[found] == min(around, key=lambda one: one[1] - one[0])


MS = 1_000_000


def overlapped(rank: int, at: int) -> Recorder:
    """A pair of 10 ms and a queued W of 3 ms, after 2 ms of waiting for another stage. Times in ns from `at`.

    Cells of 1 ms: W w w a a m m . . . a  + W W W, where w is the pipeline wait and . a wait for an all-to-all.
    """
    recorder = Recorder(rank)

    def ms(time: float) -> int:
        return at + round(time * MS)

    pair = Pair(Compute(Op.F, 0, rank, 1), Compute(Op.B, 1, 1 - rank, 0))
    recorder.action(pair, ms(0), ms(11))
    recorder.add(Kind.WAIT, "activation", ms(0), ms(2), channel=Channel.PIPELINE)
    recorder.add(Kind.STEP, "attn(F)", ms(0), ms(4))  # the wait is within its first step
    recorder.add(Kind.STEP, "mlp(B)", ms(4), ms(6))
    recorder.add(Kind.STEP, "dispatch(F)", ms(6), ms(9))
    recorder.add(Kind.STEP, "attn(B)", ms(9), ms(11))
    recorder.add(Kind.COMMUNICATION, "counts", ms(1), ms(8), channel=Channel.COUNTS)
    recorder.add(Kind.WAIT, "counts", ms(6), ms(8), channel=Channel.COUNTS)
    recorder.add(Kind.COMMUNICATION, "rows", ms(5), ms(7), channel=Channel.ALL_TO_ALL, step="dispatch(B)")
    recorder.add(Kind.WAIT, "rows", ms(8), ms(9), channel=Channel.ALL_TO_ALL)
    recorder.add(Kind.COMMUNICATION, "rows", ms(10), ms(10.5), channel=Channel.ALL_TO_ALL, step="dispatch(F)")
    recorder.action(Compute(Op.W, 0, rank, 0), ms(12), ms(15))
    return recorder


@pytest.mark.parametrize("merged", [False, True])
def test_waits_are_no_compute(tmp_path: Path, merged: bool) -> None:
    # rank 1 starts 1 ms later, on a clock that is 50 ms ahead
    files = [
        write_rank(overlapped(0, at=100 * MS), tmp_path),
        write_rank(overlapped(1, at=151 * MS), tmp_path, ClockOffset(-50 * MS, 10)),
    ]
    path = tmp_path
    if merged:
        path = tmp_path / "trace.json.gz"
        merge(files, path)
    lanes, skipped = load_all(path)
    assert skipped == 0
    window = windows(lanes)
    for rank in (0, 1):
        found = figures(lanes[rank], window[rank])
        # attn(F) 2..4, mlp(B) 4..6, attn(B) 9..11, W 12..15; all-to-all 5..7 and 10..10.5, waits 6..9
        measured = (found.span, found.compute, found.all_to_all, found.overlapped, found.exposed)
        assert measured == pytest.approx((16, 9, 4.5, 1.5, 3), abs=1e-6)
        assert found.idle == pytest.approx(16 - 9 - 3, abs=1e-6)
        assert found.bubble == pytest.approx(16 - (9 + 3), abs=1e-6)  # the action of 11, less 2, and W's 3
    first, second = hidden(lanes)
    assert (first.name, first.count, second.name, second.count) == ("dispatch(F)", 2, "dispatch(B)", 2)
    assert second.behind == pytest.approx({"mlp(B)": 1.0}) and first.behind == pytest.approx({"attn(B)": 0.5})
    assert [(one.order, one.equals, one.times) for one in rounds(lanes)] == [
        (("attn(F)", "mlp(B)", "dispatch(F)", "attn(B)"), ("published", "default"), 2)
    ]


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b"])
def test_bubble_is_the_simulators(tmp_path: Path, schedule: str) -> None:
    table = build(schedule, 4, 10)
    simulation = simulate(table)
    for rank, row in enumerate(simulation.timed):
        recorder = Recorder(rank)
        for timed in row:
            recorder.action(timed.action, round(timed.start * MS), round(timed.end * MS))
        write_rank(recorder, tmp_path)
    lanes, _ = load_all(tmp_path)
    panel = Panel("", bars_of(simulation), "ms")
    for lane in lanes:
        found = figures(lane, windows(lanes)[lane.rank])
        assert found.span == pytest.approx(simulation.makespan)
        assert found.bubble == pytest.approx(panel.bubble(lane.rank))
        assert found.compute + found.idle == pytest.approx(found.span) and found.exposed == 0


def test_time_between_runs_does_not_count(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(rank)
        for run in (0, 1):
            at = (run * 100 + rank) * MS
            recorder.add(Kind.RUN, "run", at, at + 10 * MS)
            recorder.action(Compute(Op.F, 0, rank, 0), at, at + 4 * MS)
        recorder.add(Kind.COMMUNICATION, "gradients", 50 * MS, 60 * MS, channel=Channel.REDUCTION)
        write_rank(recorder, tmp_path)
    lanes, _ = load_all(tmp_path)
    found = [figures(lane, windows(lanes)[lane.rank]) for lane in lanes]
    assert [(one.span, one.compute, one.bubble) for one in found] == [(22.0, 8.0, 14.0)] * 2


def laned(steps: list[list[str]]) -> Lanes:
    return Lanes(0, "", {}, {}, {}, steps)


def test_orders_are_recognised() -> None:
    for name, order in (("published", PUBLISHED_ORDER), ("default", DEFAULT_ORDER)):
        found = rounds([laned([["embed(F)", *order * 3], list(order)])])
        assert [(one.order, one.equals, one.times) for one in found] == [(order, (name,), 4)]
    swapped = ("attn(F)", "combine(B)", *PUBLISHED_ORDER[2:])
    assert [one.equals for one in rounds([laned([list(swapped)])])] == [()]


def test_rounds_of_uneven_and_dense_layers() -> None:
    dense = ["attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"]
    steps = [*dense, *DEFAULT_ORDER, "attn(F)", "dispatch(F)", "mlp(F)", "combine(F)"]
    assert split_rounds(steps) == [tuple(dense), DEFAULT_ORDER]  # the forward that is left has no partner
    assert split_rounds([*dense, *PUBLISHED_ORDER]) == [tuple(dense), PUBLISHED_ORDER]
    assert [one.equals for one in rounds([laned([dense])])] == [("published", "default")]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("attn(F)", "attn(F)"),
        ("layer 3: Combine (b)", "combine(B)"),
        ("attention(W)", "attn(W)"),
        ("premlp(F)", None),
        ("attn(F) then mlp(F)", None),
        ("attn", None),
        ("head(F)", None),
    ],
)
def test_steps_in_names(name: str, step: str | None) -> None:
    assert step_of(name) == step
