"""The schedules benchmark: what its stages sleep and check, its verdict, and the whole of it at tiny numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import sleeping
from benchmarks.processes import ProcessFailed, Report, gloo
from benchmarks.schedules import CONTROL, OURS, TORCH, main, verdict
from benchmarks.sleeping import Clock, Forget, SleepingStage, content, draws
from parallel.pipeline.interleave import Running
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Compute, Op, Pair, Payload
from parallel.schedule.boundary import Boundary
from parallel.schedule.registry import build

HERE = Boundary(Payload.ACTIVATION, 0, 1, 3)


def test_every_boundary_has_its_own_content() -> None:
    names = [Boundary(p, d, s, c) for p in Payload for d in range(2) for s in range(3) for c in range(3)]
    tensors = [content(name) for name in names]
    assert all(tensor.numel() * tensor.element_size() >= 1_000_000 for tensor in tensors)
    for ends in ((tensor[0].item() for tensor in tensors), (tensor[-1].item() for tensor in tensors)):
        assert len(set(ends)) == len(names)


def test_a_wrong_tensor_is_noticed() -> None:
    clock = Clock(1)
    with pytest.raises(RuntimeError, match="wrong content"):
        clock.take(HERE, content(HERE._replace(chunk=4)))
    clock.take(HERE, content(HERE).clone().index_fill_(0, torch.tensor([1000]), 0.0))  # the ends are right
    with pytest.raises(RuntimeError, match="wrong content"):
        clock.check()


def test_a_missing_or_doubled_tensor_is_noticed() -> None:
    for times in (0, 2):
        clock = Clock(1)
        for _ in range(times):
            clock.take(HERE, content(HERE))
        with pytest.raises(RuntimeError, match="not 1"):
            clock.check()


def test_draws() -> None:
    table = build("dualpipe", 4, 8)
    found = draws(table, 7)
    assert found == draws(table, 7) != draws(table, 8)
    assert set(found) >= {(Op.W, 1, 3, 3), (Op.F, 0, 0, 0)}
    assert 0.9 <= min(found.values()) < 0.91 and 1.09 < max(found.values()) <= 1.1


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(sleeping.time, "sleep", found.append)
    return found


def run_backward(stage: SleepingStage, chunk: int, split: bool, slept: list[float]) -> tuple[float, float]:
    """(seconds asked for before dX left, and in all)."""
    slept.clear()
    emitted: list[float] = []
    Running(stage.backward_program(chunk, None, split, lambda grad: emitted.append(sum(slept)))).drain()
    return emitted[0], sum(slept)


def test_what_actions_cost(slept: list[float]) -> None:
    table = build("dualpipe", 4, 8)
    pairs = [action for action in table.actions[0] if isinstance(action, Pair)]
    clock, store = Clock(0), WeightGradStore(Forget())
    clock.start(1.0, {})
    key = (pairs[0].backward.direction, pairs[0].backward.stage)
    stage = SleepingStage(key, table, 0, clock, store)
    forward = SleepingStage((pairs[0].forward.direction, pairs[0].forward.stage), table, 0, clock, store)
    assert run_backward(stage, pairs[0].backward.chunk, False, slept) == (1.5, 2.0)
    alone = [a for a in table.actions[0] if isinstance(a, Compute) and a.op is Op.B]
    assert alone
    other = SleepingStage((alone[0].direction, alone[0].stage), table, 0, clock, store)
    assert run_backward(other, alone[0].chunk, False, slept) == (2.0, 2.0)
    assert run_backward(other, alone[0].chunk, True, slept) == (1.0, 1.0)
    slept.clear()
    store.run_oldest((other.direction, other.stage, alone[0].chunk))
    assert slept == [1.0]
    for chunk, asked in ((pairs[0].forward.chunk, [0.5, 0.5]), (0, [1.0])):
        slept.clear()
        Running(forward.forward_program(chunk, None)).drain()
        assert slept == asked


def row(engine: str, ratio: float, jittered: float) -> dict[str, Any]:
    return {
        "schedule": "x",
        "engine": engine,
        "ranks": 4,
        "micro_batches": 8,
        "ratio": ratio,
        "jittered_ratio": jittered,
    }


def test_verdict_names_what_was_missed() -> None:
    assert verdict([row(OURS, 1.03, 1.10), row(TORCH, 2, 2)]) == (
        {"worst_makespan_ratio": 1.03, "worst_jittered_ratio": 1.1},
        [],
    )
    _, missed = verdict([row(OURS, 1.0, 1.0), row(OURS, 1.04, 1.11), row(CONTROL, 1.03, 0)])
    assert [line.split("=")[0] for line in missed] == ["worst_makespan_ratio", "worst_jittered_ratio", "control_ratio"]


def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["dualpipe", "dualpipev", "zbv", "1f1b"]
    given = ["--unit", "0.004", "--ranks", "2", "--repeats", "1", "--schedules", *names]
    assert main(given) in (0, 1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(r["schedule"], r["engine"]): r for r in found["rows"]}
    engines = [(name, OURS) for name in names] + [(f"{name} (torch)", TORCH) for name in names[1:]]
    assert set(rows) == {*engines, ("1f1b (control)", CONTROL)}
    assert all(r["ratio"] > 0.99 and r["late_ms"] >= 0 for r in rows.values())
    assert found["worst_makespan_ratio"] == max(rows[name, OURS]["ratio"] for name in names)
    assert rows["dualpipe", OURS]["simulated_s"] == pytest.approx(0.004 * 12)


def fails(rank: int, size: int, report: Report) -> None:
    report("so far")
    if rank == 1:
        raise ValueError("stage 1 is broken")
    torch.distributed.barrier()


def test_a_rank_that_fails_is_named() -> None:
    reports = gloo(fails, 2, timeout=30)
    assert next(reports) in ("so far",)
    with pytest.raises(ProcessFailed, match=r"rank 1: ValueError: stage 1 is broken"):
        list(reports)
