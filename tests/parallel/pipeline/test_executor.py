"""The executor with toy stages (y = w x) on two processes, and with a pretended network where one is enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import parallel.pipeline.executor as executor_module
from parallel.device import HostDevice, PointToPoint, Ticket
from parallel.expert.contract import Pending
from parallel.pipeline.contract import DEFAULT_ORDER, Program
from parallel.pipeline.executor import Executor, PeerLost
from parallel.pipeline.store import Bag, WeightGradStore
from parallel.schedule.actions import Action, Compute, Op, Pair, Payload, Post, Table, Transfer, flatten
from parallel.schedule.boundary import parts
from parallel.schedule.registry import build
from tests.distributed_helper import run_distributed

TABLES = [("dualpipe", 2), ("dualpipe", 4), ("dualpipe", 8), ("1f1b", 1), ("1f1b", 4)]
WEIGHTS = (1.25, -0.5)  # of stage 0 and stage 1
Event = tuple[Any, ...]


def entering(direction: int, chunk: int) -> torch.Tensor:
    """What stage 0 reads; its length depends on the chunk, so that shapes must be asked of the stage."""
    generator = torch.Generator().manual_seed(10 * direction + chunk)
    return torch.randn(chunk + 2, generator=generator, dtype=torch.float64)


class Sink:
    """Sums gradients by parameter."""

    def __init__(self) -> None:
        self.grads: dict[nn.Parameter, float] = {}

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        self.grads[parameter] = self.grads.get(parameter, 0.0) + grad.item()


class Scale:
    """A pipeline stage y = w x; the last one's loss is the sum of y squared / 2, so that its dy is y."""

    def __init__(self, key: tuple[int, int], stages: int, store: WeightGradStore, events: list[Event]) -> None:
        self.key, self.last, self.store, self.events = key, key[1] == stages - 1, store, events
        self.weight = nn.Parameter(torch.tensor(WEIGHTS[key[1]], dtype=torch.float64))
        self.live: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.input_grads: dict[int, torch.Tensor] = {}

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return (chunk + 2,)

    def output_shape(self, chunk: int) -> tuple[int, ...]:
        return (chunk + 2,)

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        yield "attn(F)"
        x = entering(self.key[0], chunk) if received is None else received.wait()
        self.live[chunk] = x
        yield "mlp(F)"
        self.outputs[chunk] = y = self.weight.detach() * x
        return None if self.last else y

    def backward_program(
        self, chunk: int, received: Pending[torch.Tensor] | None, split: bool, emit: Callable[[torch.Tensor], None]
    ) -> Program:
        yield "attn(B)"
        dy = self.outputs[chunk] if received is None else received.wait()
        x = self.live.pop(chunk)
        self.input_grads[chunk] = dx = self.weight.detach() * dy
        bag: Bag = []

        def grad() -> torch.Tensor:
            self.events.append(("W", *self.key, chunk))
            return (dy * x).sum()

        with self.store.collecting(bag):
            self.store.put(self.weight, grad)
        emit(dx)
        yield "attn(W)"
        if split:
            self.store.defer((*self.key, chunk), [bag])
        else:
            self.store.run(bag)


def make(
    table: Table, rank: int, peer: Callable[[int], int] = lambda rank: rank
) -> tuple[Executor, dict[tuple[int, int], Scale], list[Event]]:
    events: list[Event] = []
    store = WeightGradStore(Sink())
    stages = {key: Scale(key, table.stages, store, events) for key in table.stages_of(rank)}
    device = executor_module.HOST
    executor = Executor(table, rank, dict(stages), store, torch.float64, DEFAULT_ORDER, peer, device)
    return executor, stages, events


def step(table: Table, rank: int, reverse: bool) -> dict[str, Any]:
    """One step of `table` on this process; reverse: pipeline rank r is process 1 - r."""
    pipeline_rank = 1 - rank if reverse else rank
    executor, stages, events = make(table, pipeline_rank, (lambda r: 1 - r) if reverse else lambda r: r)
    works: list[Ticket] = []
    posted, transfer = executor._post, executor.device.transfer

    def post(given: Any) -> None:
        events.extend(("post", t) for t in given.post.transfers)
        posted(given)

    class Watched(HostDevice):
        def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
            found = transfer(operations)
            works.extend(work for work, operation in zip(found, operations, strict=True) if operation.send)
            return found

    executor._post = post  # type: ignore[method-assign]
    executor.device = Watched()
    executor.run()
    return {
        "outputs": {key: stage.outputs for key, stage in stages.items()},
        "input_grads": {key: stage.input_grads for key, stage in stages.items()},
        "weight_grads": {key: executor.store.sink.grads[stage.weight] for key, stage in stages.items()},
        "live": sum(len(stage.live) for stage in stages.values()),
        "sends": (len(works), all(work.is_completed() for work in works), len(executor._sending)),
        "events": events,
        "measured": executor.measured,
    }


def left_behind(rank: int) -> str:
    """A receive that no action uses: rank 0 sends its output to rank 1, whose list is that receive alone."""
    table = build("1f1b", 2, 1)
    transfer = Transfer(rank == 0, Payload.ACTIVATION, 0, 1, 0, 1 - rank)
    actions: tuple[Action, ...] = (Compute(Op.F, 0, 0, 0), Post((transfer,))) if rank == 0 else (Post((transfer,)),)
    executor, _, _ = make(replace(table, actions=(actions, actions)), rank)
    try:
        executor.run()
    except RuntimeError as error:
        return str(error)
    return ""


def all_steps(rank: int, world_size: int) -> tuple[dict[tuple[str, int, bool], dict[str, Any]], str]:
    found = {(name, count, False): step(build(name, 2, count), rank, False) for name, count in TABLES}
    found["1f1b", 4, True] = step(build("1f1b", 2, 4), rank, True)
    return found, left_behind(rank)


@pytest.fixture(scope="module")
def ran() -> list[tuple[dict[tuple[str, int, bool], dict[str, Any]], str]]:
    return run_distributed(all_steps, 2)


CASES = [(name, count, False) for name, count in TABLES] + [("1f1b", 4, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(ran: list[Any], case: tuple[str, int, bool]) -> None:
    table = build(case[0], 2, case[1])
    seen = set()
    for found, _ in ran:
        got = found[case]
        assert got["live"] == 0
        for (direction, stage), outputs in got["outputs"].items():
            seen.add((direction, stage))
            total, weights = 0.0, [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in WEIGHTS]
            assert sorted(outputs) == list(range(case[1] // table.directions))
            for chunk, output in outputs.items():
                x = entering(direction, chunk).requires_grad_()
                hidden = x * weights[0]
                final = hidden * weights[1]
                loss, inputs = final.square().sum() / 2, (x, hidden)
                into, dweight = torch.autograd.grad(loss, (inputs[stage], weights[stage]))
                torch.testing.assert_close(output, (hidden, final)[stage].detach())
                torch.testing.assert_close(got["input_grads"][direction, stage][chunk], into)
                total += dweight.item()
            assert got["weight_grads"][direction, stage] == pytest.approx(total, rel=1e-12)
    assert seen == {(d, s) for d in range(table.directions) for s in range(2)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_send_is_complete_at_the_end(ran: list[Any], case: tuple[str, int, bool]) -> None:
    """Each chunk crosses once each way; after the step nothing is under way."""
    count = sum(found[case]["sends"][0] for found, _ in ran)
    assert count == 2 * case[1]
    assert all(found[case]["sends"][1:] == (True, 0) for found, _ in ran)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_are_posted_in_the_order_of_the_table(ran: list[Any], case: tuple[str, int, bool]) -> None:
    table = build(case[0], 2, case[1])
    for rank, (found, _) in enumerate(ran):
        listed = table.actions[1 - rank if case[2] else rank]
        expected = [t for action in listed if isinstance(action, Post) for t in action.transfers]
        assert [event[1] for event in found[case]["events"] if event[0] == "post"] == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradients_leave_before_the_weight_gradients_run(ran: list[Any], case: tuple[str, int, bool]) -> None:
    """Of every full backward, alone or in a pair."""
    table, seen, pairs = build(case[0], 2, case[1]), 0, 0
    for rank, (found, _) in enumerate(ran):
        events = found[case]["events"]
        for action in table.actions[1 - rank if case[2] else rank]:
            for part in () if isinstance(action, Post) else parts(action):
                if part.op is Op.B and part.stage == 1:
                    d, chunk = part.direction, part.chunk
                    sent = events.index(("post", Transfer(True, Payload.GRADIENT, d, 0, chunk, table.rank_of[d][0])))
                    assert sent < events.index(("W", d, 1, chunk)), part
                    seen += 1
                    pairs += isinstance(action, Pair)
    assert seen >= 1
    assert pairs > 0 or case[:2] != ("dualpipe", 8)


def test_what_was_measured(ran: list[Any]) -> None:
    for rank, (found, _) in enumerate(ran):
        measured = found["dualpipe", 8, False]["measured"]
        expected = [(str(a.op), a.direction, a.stage, a.chunk) for a in flatten(build("dualpipe", 2, 8).actions[rank])]
        assert [(m.op, m.direction, m.stage, m.chunk) for m in measured] == expected
        assert {m.rank for m in measured} == {rank}
        assert all(0 <= m.waited <= m.end - m.start for m in measured)
        starts = [m.start for m in measured]
        assert starts == sorted(starts)
        assert len(set(starts)) < len(starts)  # the halves of a pair carry the pair's interval


def test_a_receive_nobody_uses(ran: list[Any]) -> None:
    assert ran[0][1] == ""
    assert "left behind 1 receives, 0 outputs and 0 weight-gradient entries" in ran[1][1]


# One process: a network that is asked but never moves anything. ------------------------------------------------------


class Silent:
    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return False


class Broken(Silent):
    def wait(self) -> None:
        raise RuntimeError("Connection closed by peer [10.0.0.7]:1234\nmore")


class Network(HostDevice):
    """Takes every batch and moves nothing."""

    def __init__(self, work: Silent) -> None:
        self.work = work

    def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
        return [self.work for _ in operations]


def pretend(monkeypatch: pytest.MonkeyPatch, work: Silent) -> None:
    monkeypatch.setattr(executor_module, "HOST", Network(work))


def alone(*actions: Action) -> Executor:
    """Rank 0 of two, with a list of its own."""
    table = build("1f1b", 2, 2)
    return make(replace(table, actions=(actions, ())), 0)[0]


F0, B0, I0 = (Compute(op, 0, 0, 0) for op in (Op.F, Op.B, Op.I))
SEND = Post((Transfer(True, Payload.ACTIVATION, 0, 1, 0, 1),))
RECEIVE = Post((Transfer(False, Payload.GRADIENT, 0, 0, 0, 1),))


def test_a_post_before_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    with pytest.raises(RuntimeError, match=r"rank 0: \[a0.0@1->1\] is posted before its data exists"):
        alone(SEND, F0).run()


def test_an_output_nobody_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    with pytest.raises(RuntimeError, match="left behind 0 receives, 1 outputs and 0 weight-gradient"):
        alone(F0).run()


def test_weight_gradients_nobody_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    with pytest.raises(RuntimeError, match="left behind 0 receives, 0 outputs and 1 weight-gradient"):
        alone(F0, SEND, RECEIVE, I0).run()
    executor = alone(F0, SEND, RECEIVE, I0, Compute(Op.W, 0, 0, 0))
    executor.run()
    assert executor.store.depth == 0


def test_weight_gradients_of_another_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    with pytest.raises(RuntimeError, match="queue's head is"):
        alone(F0, SEND, RECEIVE, I0, Compute(Op.W, 0, 0, 1)).run()


@pytest.mark.parametrize(
    "actions,what",
    [
        ((F0, SEND), r"a0.0@1->1 .stage 1, chunk 0, peer 1"),
        ((F0, SEND, RECEIVE, B0), r"g0.0@0<-1 .stage 0, chunk 0, peer 1"),
    ],
)
def test_a_lost_peer_is_named(monkeypatch: pytest.MonkeyPatch, actions: tuple[Action, ...], what: str) -> None:
    pretend(monkeypatch, Broken())
    with pytest.raises(PeerLost, match=what) as failure:
        alone(*actions).run()
    assert "\n" not in str(failure.value) and "Connection closed by peer" in str(failure.value)


def test_a_compute_fault_is_no_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    executor = alone(F0, SEND)

    def broken(chunk: int, received: Any) -> Program:
        yield "attn(F)"
        raise RuntimeError("the timeout of this connection is not a number")

    executor.stages[0, 0].forward_program = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not a number") as failure:
        executor.run()
    assert not isinstance(failure.value, PeerLost)


def test_a_step_after_a_failed_one_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Silent())
    executor = alone(F0)
    with pytest.raises(RuntimeError, match="0 receives, 1 outputs"):
        executor.run()
    executor._list = []
    executor.run()
