"""Orders of `torch.distributed.pipelining`, an independent implementation, against ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.schedule.actions import Compute, Op, Pair, Post, Table
from parallel.schedule.boundary import parts
from parallel.schedule.placement import v_shape
from parallel.schedule.registry import build
from parallel.schedule.simulator import simulate
from parallel.schedule.transfers import with_transfers

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

CLASSES = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb1p": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}

# (ranks, micro-batches) -> whether torch has an order there, the published one
COMPARABLE: dict[str, Callable[[int, int], bool]] = {
    "1f1b": lambda p, m: m >= p,
    "gpipe": lambda p, m: True,
    "interleaved": lambda p, m: m % max(1, m // p) == 0,
    "zb1p": lambda p, m: True,
    "zbv": lambda p, m: m >= 2 * p - 1,
    "dualpipev": lambda p, m: m >= 2 * p - 1,
}


def torch_order(name: str, ranks: int, micro_batches: int, held: int) -> list[list[Compute | Pair]]:
    """Torch's compute actions of every rank; no process group, the schedule's own generator is called directly."""
    schedule: Any = object.__new__(getattr(torch_schedules, CLASSES[name]))
    schedule.pp_group_size, schedule.n_local_stages = ranks, held
    schedule._n_microbatches, schedule._num_stages = micro_batches, ranks * held
    schedule.num_stages = ranks * held
    schedule.number_of_rounds = max(1, micro_batches // ranks)
    schedule.microbatches_per_round = micro_batches // schedule.number_of_rounds
    if name in ("1f1b", "gpipe"):
        order = schedule._get_pipeline_order()
        rows = [order[rank] for rank in range(ranks)]
    else:
        rows = [schedule._calculate_single_rank_operations(rank) for rank in range(ranks)]
    reduce = torch_schedules.REDUCE_GRAD
    return [[_ours(a) for a in row if a is not None and a.computation_type is not reduce] for row in rows]


def _ours(action: Any) -> Compute | Pair:
    if action.sub_actions:
        forward, backward = (_ours(part) for part in action.sub_actions)
        assert isinstance(forward, Compute) and isinstance(backward, Compute)
        return Pair(forward, backward)
    return Compute(Op(action.computation_type.value), 0, action.stage_index, action.microbatch_index)


def computes(table: Table) -> list[list[Compute | Pair]]:
    return [[action for action in row if not isinstance(action, Post)] for row in table.actions]


def nameless(rows: list[list[Compute | Pair]]) -> list[list[str]]:
    """W without its chunk, everything else in full."""
    return [["W" if isinstance(a, Compute) and a.op is Op.W else str(a) for a in row] for row in rows]


@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8])
@pytest.mark.parametrize(
    ("name", "held"),
    [("1f1b", 1), ("gpipe", 1), ("zb1p", 1), ("interleaved", 2), ("interleaved", 3), ("dualpipev", 2), ("zbv", 2)],
)
def test_same_order(name: str, held: int, ranks: int) -> None:
    """Action by action, at every size at which both follow the publication.

    ZBV's W are compared by place: torch picks them by stage, our queue gives the oldest.
    """
    for micro_batches in range(2, 4 * ranks + 1, 2):
        if not COMPARABLE[name](ranks, micro_batches):
            continue
        table = build(name, ranks, micro_batches, held if name == "interleaved" else None)
        ours, theirs = computes(table), torch_order(name, ranks, micro_batches, held)
        if name == "zbv":
            assert nameless(ours) == nameless(theirs), micro_batches
        elif name == "1f1b":
            assert ours[:-1] == theirs[:-1], micro_batches
            # torch's list for its picture numbers the forwards of the last rank from 1
            assert [str(a)[0] for a in ours[-1]] == [str(a)[0] for a in theirs[-1]], micro_batches
        else:
            assert ours == theirs, micro_batches


def without_weights(rows: list[list[Compute | Pair]]) -> list[list[Compute | Pair]]:
    return [[a for a in row if not (isinstance(a, Compute) and a.op is Op.W)] for row in rows]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zbv_below_its_full_size(ranks: int) -> None:
    """The short rule keeps the chunks torch keeps; only the places of W differ, by at most one W in the makespan."""
    for micro_batches in range(2, 2 * ranks - 1, 2):
        theirs = torch_order("zbv", ranks, micro_batches, 2)
        ours = build("zbv", ranks, micro_batches)
        assert without_weights(computes(ours)) == without_weights(theirs)
        span = simulate(with_transfers("torch", micro_batches, v_shape(ranks), theirs)).makespan
        assert abs(simulate(ours).makespan - span) <= 1


def test_every_action_is_compared() -> None:
    for row in torch_order("dualpipev", 4, 10, 2):
        assert len({str(part) for action in row for part in parts(action)}) == sum(len(parts(a)) for a in row) >= 40
