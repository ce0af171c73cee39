"""Stages that sleep for what they cost and pass real tensors on, for our executor.

An F takes 1 unit, an I 1, a W 1, a B the 2 of I and W, a stage's check of what it was given included. Alone, an action
hands on what it makes at its end, as the simulator has it. In a pair F&B the steps of both programs alternate (3 units
in all), and dX leaves before the attention weight gradient, half a unit before the end.

Sleeps are relative: what an action starts late, it ends late. Only the timer's own lateness, measured before anything
runs, is taken off each, and what that makes too short is waited out: no sleep is shorter than asked for.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from parallel.expert.contract import Pending
from parallel.pipeline.contract import Program
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Op, Pair, Payload, Table
from parallel.schedule.boundary import Boundary, parts

ELEMENTS = 250_000  # of float32: 1 MB
LONGEST = 1 << 10  # chunks that can be told apart
JITTER = 0.1


@functools.cache
def _base(payload: Payload, direction: int, stage: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((list(Payload).index(payload) * 2 + direction) * 1000 + stage)
    return torch.rand(ELEMENTS + LONGEST, generator=generator)


def content(boundary: Boundary) -> torch.Tensor:
    """What crosses there, [ELEMENTS] float32: random numbers of payload, direction and stage, from number `chunk` on.

    Shares the memory of all chunks of a stage, so handing it out costs no time; no view in autograd's sense.
    """
    base = _base(*boundary[:3])
    return base.new_empty(0).set_(base.untyped_storage(), boundary.chunk, (ELEMENTS,), (1,))


@dataclass
class Clock:
    """One rank's sleeps. expected: tensors its stages receive in a step. unit: seconds. factors: of (op, direction,
    stage, chunk), 1 where there is none. first, last: when its first sleep began and its last one ended. asked:
    seconds of its `sleeps`. late: seconds beyond that. checking: seconds that the next sleep is shorter by.
    lateness: seconds by which this machine's timer always ends a sleep late."""

    expected: int
    lateness: float = 0.0
    unit: float = 0.0
    factors: dict[tuple[Op, int, int, int], float] = field(default_factory=dict)
    first: float | None = None
    last: float = 0.0
    asked: float = 0.0
    late: float = 0.0
    sleeps: int = 0
    checking: float = 0.0
    received: list[tuple[Boundary, torch.Tensor]] = field(default_factory=list)

    def start(self, unit: float, factors: dict[tuple[Op, int, int, int], float]) -> None:
        self.unit, self.factors, self.first, self.last = unit, factors, None, 0.0
        self.asked, self.late, self.sleeps, self.checking = 0.0, 0.0, 0, 0.0
        self.received.clear()

    def sleep(self, op: Op, direction: int, stage: int, chunk: int, share: float = 1.0) -> None:
        """`share` of the unit that an F, an I or a W takes."""
        start = time.perf_counter() - self.checking
        if self.first is None:
            self.first = start
        seconds = self.unit * share * self.factors.get((op, direction, stage, chunk), 1.0)
        if seconds > self.checking + self.lateness:
            time.sleep(seconds - self.checking - self.lateness)
            while self.lateness and time.perf_counter() < start + seconds:
                pass
        self.checking = 0.0
        self.last = time.perf_counter()
        self.asked += seconds
        self.late += self.last - start - seconds
        self.sleeps += 1

    def take(self, boundary: Boundary, tensor: torch.Tensor) -> None:
        """What a stage was given. Both ends must be right now, all of it by `check`, after the run."""
        start = time.perf_counter()
        expected = content(boundary)
        if tensor[0].item() != expected[0].item() or tensor[-1].item() != expected[-1].item():
            raise RuntimeError(f"{boundary}: arrived with the wrong content, or was used before it arrived")
        self.received.append((boundary, tensor))
        self.checking = time.perf_counter() - start

    def check(self) -> None:
        """After a step: every tensor that should have come has come, and every element of it is right."""
        for boundary, tensor in self.received:
            if not torch.equal(tensor, content(boundary)):
                raise RuntimeError(f"{boundary}: arrived with the wrong content")
        different = len({boundary for boundary, _ in self.received})
        if not different == len(self.received) == self.expected:
            raise RuntimeError(f"{len(self.received)} tensors arrived, {different} different ones, not {self.expected}")
        self.received.clear()


def timer_lateness(sleeps: int = 40, seconds: float = 0.005) -> float:
    """Median seconds by which a sleep ends late on this machine."""
    late = []
    for _ in range(sleeps):
        start = time.perf_counter()
        time.sleep(seconds)
        late.append(time.perf_counter() - start - seconds)
    return statistics.median(late)


def draws(table: Table, seed: int) -> dict[tuple[Op, int, int, int], float]:
    """Uniform factors from [0.9, 1.1] for every F, I and W of a table, the same on every rank."""
    generator = random.Random(seed)
    chunks = range(table.micro_batches)
    keys = [(op, d, s, c) for d in range(table.directions) for s in range(table.stages) for c in chunks for op in "FIW"]
    return {(Op(op), d, s, c): generator.uniform(1 - JITTER, 1 + JITTER) for op, d, s, c in keys}


class SleepingStage:
    """One stage of the executor's. paired: the chunks whose forward or backward runs beside another chunk's."""

    def __init__(self, key: tuple[int, int], table: Table, rank: int, clock: Clock, store: WeightGradStore) -> None:
        self.direction, self.stage = key
        self.last = self.stage == table.stages - 1
        self.clock, self.store = clock, store
        self.weight = nn.Parameter(torch.zeros(1))
        halves = [part for action in table.actions[rank] if isinstance(action, Pair) for part in parts(action)]
        self.paired = {(half.op, half.chunk) for half in halves if (half.direction, half.stage) == key}

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return (ELEMENTS,)

    output_shape = boundary_shape

    def _take(self, payload: Payload, chunk: int, received: Pending[torch.Tensor] | None) -> None:
        if received is not None:
            self.clock.take(Boundary(payload, self.direction, self.stage, chunk), received.wait())

    def _sleep(self, op: Op, chunk: int, share: float) -> None:
        self.clock.sleep(op, self.direction, self.stage, chunk, share)

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        paired = (Op.F, chunk) in self.paired
        yield "attn(F)"
        self._take(Payload.ACTIVATION, chunk, received)
        self._sleep(Op.F, chunk, 0.5 if paired else 1.0)
        if paired:
            yield "mlp(F)"
            self._sleep(Op.F, chunk, 0.5)
        return None if self.last else content(Boundary(Payload.ACTIVATION, self.direction, self.stage + 1, chunk))

    def backward_program(
        self, chunk: int, received: Pending[torch.Tensor] | None, split: bool, emit: Callable[[torch.Tensor], None]
    ) -> Program:
        paired = (Op.B, chunk) in self.paired
        yield "mlp(B)"
        self._take(Payload.GRADIENT, chunk, received)
        self._sleep(Op.I, chunk, 0.5 if paired else 1.0)
        if not split:
            yield "mlp(W)"
            self._sleep(Op.W, chunk, 0.5 if paired else 1.0)
        if paired:
            yield "attn(B)"
            self._sleep(Op.I, chunk, 0.5)
        emit(content(Boundary(Payload.GRADIENT, self.direction, self.stage - 1, chunk)))
        if split:
            self.store.defer((self.direction, self.stage, chunk), [[(self.weight, lambda: self._weights(chunk))]])
        if paired:
            yield "attn(W)"
            self._sleep(Op.W, chunk, 0.5)

    def _weights(self, chunk: int) -> torch.Tensor:
        self._sleep(Op.W, chunk, 1.0)
        return self.weight.detach()


class Forget:
    """A gradient sink for stages whose gradients are nothing."""

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        pass
