"""The virtual clock against times worked out by hand, and against the longest path through every constraint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.clock.contract import COMPUTE, HOST, Record
from parallel.clock.dispatcher import TimedDispatcher
from parallel.clock.virtual import VirtualClock
from parallel.device import EXPERT, PIPELINE


def started(**given: float) -> VirtualClock:
    clock = VirtualClock(**given)
    clock.start()
    return clock


def times(record: Record) -> dict[str, tuple[float, float]]:
    return {interval.name: (interval.start, interval.end) for interval in record.intervals if interval.lane != HOST}


def test_a_transfer_runs_beside_what_does_not_wait_for_it() -> None:
    clock = started()
    clock.compute("a", 3)
    made = clock.mark()
    clock.compute("b", 4)
    moving = clock.transfer("x", 5, [made])
    moving.wait()
    clock.compute("c", 1)
    record = clock.record()
    assert times(record) == {"a": (0, 3), "b": (3, 7), "x": (3, 8), "c": (8, 9)}
    assert (record.span, record.compute_busy, record.transfer_time, record.exposed_share) == (9, 8, 5, 0.2)
    assert record.issued == ("a", "b", "x", "c") and record.waited == ("x",)


def test_the_host_pays_for_every_step() -> None:
    clock = started(launch_cost=2)
    clock.step("a")
    clock.compute("a", 3)
    made = clock.mark()
    clock.step("x")
    moving = clock.transfer("x", 5, [made])
    clock.step("b")
    clock.compute("b", 4)
    moving.wait()
    clock.step("c")
    clock.compute("c", 1)
    record = clock.record()
    assert times(record) == {"a": (2, 5), "x": (5, 10), "b": (6, 10), "c": (10, 11)}
    assert [(i.name, i.start, i.end) for i in record.lane(HOST)] == [("a", 0, 2), ("x", 2, 4), ("b", 4, 6), ("c", 6, 8)]


def test_late_counts_hold_the_host_and_nothing_that_was_issued() -> None:
    clock = started(counts_late=4)
    clock.compute("a", 3)
    counts = clock.counts([clock.mark()])
    clock.compute("b", 1)
    counts.block()
    clock.transfer("x", 2, [])
    clock.compute("c", 1)
    record = clock.record()
    assert times(record) == {"a": (0, 3), "b": (3, 4), "x": (7, 9), "c": (7, 8)}
    assert [(i.name, i.start, i.end) for i in record.lane(HOST)] == [("counts", 0, 7)]


def test_counts_come_after_earlier_transfers_of_their_channel() -> None:
    clock = started()
    clock.transfer("x", 5, [])
    clock.counts([]).block()
    assert clock.host == 5


def test_a_link_takes_one_transfer_at_a_time_and_channels_have_links_of_their_own() -> None:
    clock = started()
    clock.transfer("x", 5, [])
    late = clock.transfer("y", 2, [])
    clock.transfer("z", 3, [], PIPELINE)
    assert times(clock.record()) == {"x": (0, 5), "y": (5, 7), "z": (0, 3)}
    assert not late.is_completed()
    clock.block(7)
    assert late.is_completed()


def test_nothing_takes_time_before_the_start() -> None:
    clock = VirtualClock(launch_cost=1, counts_late=1)
    clock.step("a")
    clock.compute("a", 3)
    clock.transfer("x", 3, []).wait()
    clock.counts([]).block()
    record = clock.record()
    assert record == Record((), 0.0, (), ()) and record.exposed_share == 0.0


@pytest.mark.parametrize(("wait_for_all", "start"), [(False, 3), (True, 7)])
def test_a_movement_waits_for_its_marks_or_for_all_compute(wait_for_all: bool, start: float) -> None:
    clock = started()
    dispatcher = TimedDispatcher(clock, {"dispatch(F)": 2, "combine(F)": 1}, wait_for_all)
    clock.compute("a", 3)
    made = (dispatcher.mark(),)
    route = dispatcher.plan(torch.zeros(2, 1, dtype=torch.int64), made)
    clock.compute("b", 4)
    rows = torch.arange(4.0).view(2, 2)
    received = dispatcher.scatter(route, rows, torch.ones(2, 1), made).wait()
    assert times(clock.record())["dispatch(F)"] == (start, start + 2)
    assert received.rows is rows and received.counts == [2]
    back, grads = dispatcher.gather(route, dispatcher.reduce(route, rows), made).wait()
    assert back is rows and grads is None
    assert clock.record().waited == ("dispatch(F)", "combine(F)")


# A program is a list of (kind, number, picks): what the number means is the kind's affair, picks choose among earlier
# marks. The oracle knows no streams: it relaxes every "not before" until nothing moves.
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["step", "compute", "mark", "transfer", "transfer elsewhere", "wait", "counts", "block"]),
        st.integers(0, 9),
        st.lists(st.integers(0, 20), max_size=2),
    ),
    max_size=25,
)


def chosen(things: list[Any], picks: list[int]) -> list[Any]:
    return [things[pick % len(things)] for pick in picks] if things else []


def run_on_clock(program: list[Any], launch: int, late: int) -> list[tuple[str, float, float]]:
    clock = started(launch_cost=launch, counts_late=late)
    marks: list[float] = []
    tickets: list[Any] = []
    counts: list[Any] = []
    for k, (kind, number, picks) in enumerate(program):
        if kind == "step":
            clock.step(f"{k}")
        elif kind == "compute":
            clock.compute(f"{k}", number + 1)
        elif kind == "mark":
            marks.append(clock.mark())
        elif kind.startswith("transfer"):
            channel = EXPERT if kind == "transfer" else PIPELINE
            tickets.append(clock.transfer(f"{k}", number + 1, chosen(marks, picks), channel))
        elif kind == "counts":
            counts.append(clock.counts(chosen(marks, picks)))
        elif kind == "wait":
            for ticket in chosen(tickets, [number]):
                ticket.wait()
        else:
            for each in chosen(counts, [number]):
                each.block()
    return sorted((i.name, i.start, i.end) for i in clock.record().intervals if i.lane != HOST)


def run_by_constraints(program: list[Any], launch: int, late: int) -> list[tuple[str, float, float]]:
    after: list[tuple[str, str, float]] = []  # (node, earlier node, delay): end(node) >= end(earlier) + delay
    host = "origin"
    last = {COMPUTE: [], EXPERT: [], PIPELINE: []}  # type: dict[str, list[str]]
    marks: list[str] = []
    tickets: list[str] = []
    counts: list[str] = []
    lengths: dict[str, int] = {}
    for k, (kind, number, picks) in enumerate(program):
        node = f"{k}"
        if kind == "step":
            after.append((node, host, launch))
            host = node
        elif kind == "compute":
            lengths[node] = number + 1
            after += [(node, earlier, number + 1) for earlier in [host, *last[COMPUTE]]]
            last[COMPUTE] = [node]
        elif kind == "mark":
            after += [(node, earlier, 0) for earlier in ["origin", *last[COMPUTE]]]
            marks.append(node)
        elif kind.startswith("transfer"):
            channel = EXPERT if kind == "transfer" else PIPELINE
            lengths[node] = number + 1
            after += [(node, earlier, number + 1) for earlier in [host, *last[channel], *chosen(marks, picks)]]
            last[channel] = [node]
            tickets.append(node)
        elif kind == "counts":
            after += [(node, earlier, late) for earlier in [host, *last[EXPERT], *chosen(marks, picks)]]
            counts.append(node)
        elif kind == "wait":
            last[COMPUTE] += chosen(tickets, [number])
        else:
            after += [(node, earlier, 0) for earlier in [host, *chosen(counts, [number])]]
            host = node
    end = dict.fromkeys(["origin", *(node for node, _, _ in after)], 0.0)
    moved = True
    while moved:
        moved = False
        for node, earlier, delay in after:
            if end[node] < end[earlier] + delay:
                end[node], moved = end[earlier] + delay, True
    return sorted((node, end[node] - length, end[node]) for node, length in lengths.items())


@given(OPERATIONS, st.integers(0, 3), st.integers(0, 5))
def test_every_start_is_the_longest_path_to_it(program: list[Any], launch: int, late: int) -> None:
    assert run_on_clock(program, launch, late) == run_by_constraints(program, launch, late)
