"""Stages that break at a chosen action, for processes of tests; apart from the tests, since every rank imports it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from parallel.expert.contract import Pending
from parallel.pipeline.contract import DEFAULT_ORDER, Program
from parallel.pipeline.executor import Executor
from parallel.pipeline.store import Bag, WeightGradStore
from parallel.schedule.actions import Compute, Op
from parallel.schedule.registry import build

RANKS, MICRO_BATCHES, FAULTY = 4, 16, 2
STEPS, BAD_STEP = 3, 1
# Values of what crosses stages: some that leave in many pieces, some that a socket takes whole.
SIZES = {"dualpipe": 1 << 18, "zbv": 256}


@dataclass(frozen=True)
class Fault:
    """What happens on rank FAULTY in the middle of `action`, in the second of three steps."""

    kind: str
    action: Compute
    slow: bool = False  # the others are in the middle of an action for a while, and then post to a rank that is gone

    def strike(self, folder: str) -> None:
        Path(folder, "struck").write_text(repr(time.monotonic()))
        if self.kind == "raise":
            raise ValueError("broken on purpose")
        os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)


class Sink:
    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        pass


class Scale:
    """y = w x; `watch` is told of every action as it runs."""

    def __init__(
        self, key: tuple[int, int], last: bool, size: int, store: WeightGradStore, watch: Callable[[Compute], None]
    ) -> None:
        self.key, self.last, self.size, self.store, self.watch = key, last, size, store, watch
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.live: dict[int, torch.Tensor] = {}

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return (self.size,)

    def output_shape(self, chunk: int) -> tuple[int, ...]:
        return (self.size,)

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        yield "attn(F)"
        x = torch.ones(self.size) if received is None else received.wait()
        self.live[chunk] = x
        yield "mlp(F)"
        time.sleep(0.005)
        self.watch(Compute(Op.F, *self.key, chunk))
        return None if self.last else self.weight.detach() * x

    def backward_program(
        self, chunk: int, received: Pending[torch.Tensor] | None, split: bool, emit: Callable[[torch.Tensor], None]
    ) -> Program:
        yield "attn(B)"
        x = self.live.pop(chunk)
        dy = x if received is None else received.wait()
        bag: Bag = []

        def grad() -> torch.Tensor:
            time.sleep(0.005)
            self.watch(Compute(Op.W, *self.key, chunk))
            return (dy * x).sum()

        with self.store.collecting(bag):
            self.store.put(self.weight, grad)
        emit(self.weight.detach() * dy)
        yield "attn(W)"
        if split:
            self.store.defer((*self.key, chunk), [bag])
        else:
            self.store.run(bag)


def steps(rank: int, world_size: int, schedule: str, fault: Fault, folder: str) -> None:
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    table = build(schedule, RANKS, MICRO_BATCHES)
    armed = False

    def watch(action: Compute) -> None:
        if armed and rank == FAULTY and action == fault.action:
            fault.strike(folder)
        elif armed and fault.slow and Path(folder, "struck").exists():
            time.sleep(0.5)

    store = WeightGradStore(Sink())
    keys = table.stages_of(rank)
    stages = {key: Scale(key, key[1] == table.stages - 1, SIZES[schedule], store, watch) for key in keys}
    executor = Executor(table, rank, dict(stages), store, torch.float32, DEFAULT_ORDER)
    for step in range(STEPS):
        armed = step == BAD_STEP
        executor.run()


def break_stage(rank: int) -> None:
    """On rank 1, the second micro-batch of the first step breaks at the end of its forward."""
    from model.stage import TransformerStage

    whole = TransformerStage.forward_program

    def broken(self: TransformerStage, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        output = yield from whole(self, chunk, received)
        if chunk == 1:
            raise ValueError("broken on purpose\nin two lines")
        return output

    if rank == 1:
        TransformerStage.forward_program = broken  # type: ignore[method-assign]
