"""GPipe and 1F1B, the registry, and the simulator against an independent longest path."""

from __future__ import annotations

from functools import cache

import pytest

from parallel.schedule.actions import Compute, Op, Payload, Post, Table, Transfer
from parallel.schedule.boundary import consumed, parts, produced
from parallel.schedule.checker import check
from parallel.schedule.registry import SCHEDULES, build, stages_per_rank
from parallel.schedule.simulator import Costs, simulate

UNEVEN = Costs(forward=1.3, backward=2.9, input_grad=1.7, weight_grad=0.9, pair=3.6, send=0.25)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_one_way_schedules(name: str, stages: int) -> None:
    for micro_batches in range(1, 2 * stages + 3):
        table = build(name, stages, micro_batches)
        report = check(table)
        deepest = [micro_batches if name == "gpipe" else min(stages - s, micro_batches) for s in range(stages)]
        assert list(report.peak_chunks) == deepest
        for mode in ("dependencies", "gloo", "nccl"):
            run = simulate(table, mode=mode)
            assert run.makespan == 3 * (stages - 1 + micro_batches)
            assert run.bubble(0) == 3 * (stages - 1)


def test_one_stage_sends_nothing() -> None:
    assert [str(a) for a in build("1f1b", 1, 2).actions[0]] == ["F0.0@0", "B0.0@0", "F0.1@0", "B0.1@0"]


def test_order_of_one_f_one_b() -> None:
    row = [str(a) for a in build("1f1b", 3, 4).actions[1] if not isinstance(a, Post)]
    assert row == "F0.0@1 F0.1@1 B0.0@1 F0.2@1 B0.1@1 F0.3@1 B0.2@1 B0.3@1".split()


def longest_path(table: Table, costs: Costs) -> float:
    """Makespan by recursion over (previous action of the rank, makers of the inputs)."""
    rows = [[a for a in row if not isinstance(a, Post)] for row in table.actions]
    maker = {
        produced(part, table.stages): (rank, i)
        for rank, row in enumerate(rows)
        for i, action in enumerate(row)
        for part in parts(action)
    }

    @cache
    def end(rank: int, i: int) -> float:
        start = end(rank, i - 1) if i else 0.0
        for part in parts(rows[rank][i]):
            needed = consumed(part, table.stages)
            if needed:
                source = maker[needed]
                start = max(start, end(*source) + (costs.send if source[0] != rank else 0.0))
        return start + costs.of(rows[rank][i])

    return max(end(rank, i) for rank, row in enumerate(rows) for i in range(len(row)))


@pytest.mark.parametrize(("name", "stages", "micro_batches"), [("dualpipe", 4, 10), ("1f1b", 4, 6), ("dualpipe", 6, 4)])
def test_simulator_is_the_longest_path(name: str, stages: int, micro_batches: int) -> None:
    table = build(name, stages, micro_batches)
    span = longest_path(table, UNEVEN)
    assert simulate(table, UNEVEN, "dependencies").makespan == pytest.approx(span)
    assert simulate(table, UNEVEN, "gloo").makespan >= span - 1e-9
    assert simulate(table, UNEVEN, "nccl").makespan >= simulate(table, UNEVEN, "gloo").makespan - 1e-9


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_held_over_time_has_the_peaks_of_the_report(name: str) -> None:
    table = build(name, 8, 20)
    report, run = check(table), simulate(table)
    for rank in range(8):
        held = run.held(rank)
        assert max(entry.live for entry in held) == report.peak_chunks[rank]
        assert max(entry.queued for entry in held) == report.queue_depth[rank]
        assert (held[-1].live, held[-1].queued) == (0, 0)
        busy = sum(t.end - t.start for t in run.timed[rank])
        assert busy == 60 * stages_per_rank(name) and Op.F in {p.op for t in run.timed[rank] for p in parts(t.action)}


def test_unknown_schedule_and_bad_numbers_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"schedule=dualpip: unknown; allowed: dualpipe, dualpipev, zbv, zb1p, interleaved, 1f1b, gpipe",
    ):
        build("dualpip", 2, 2)
    with pytest.raises(ValueError, match=r"1f1b: micro_batches=0: must be at least 1"):
        build("1f1b", 2, 0)
    with pytest.raises(ValueError, match=r"gpipe: ranks=0: must be at least 1"):
        build("gpipe", 0, 2)


def test_batches_of_a_rank_follow_one_another_in_nccl_mode_only() -> None:
    """Two sends of 5 each, posted at 1 and 2: side by side by name, one after the other on one communicator."""
    f = lambda stage, chunk: Compute(Op.F, 0, stage, chunk)  # noqa: E731
    a = lambda send, chunk: Post((Transfer(send, Payload.ACTIVATION, 0, 1, chunk, int(send)),))  # noqa: E731
    zero = (f(0, 0), a(True, 0), f(0, 1), a(True, 1))
    one = (a(False, 0), a(False, 1), f(1, 0), f(1, 1))
    table = Table("two sends", 2, 2, 2, ((0, 1),), (zero, one))
    check(table, forward_only=True)
    starts = {mode: [t.start for t in simulate(table, Costs(send=5), mode).timed[1]] for mode in ("gloo", "nccl")}
    assert starts == {"gloo": [6, 7], "nccl": [6, 11]}
