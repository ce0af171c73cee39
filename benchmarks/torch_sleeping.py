"""The same sleeping stages for the schedules of `torch.distributed.pipelining`.

A module sleeps 1 unit in its forward and 1 in its autograd backward (the input gradient); the weight gradient, 1 unit,
is the stage's `dw_builder`, which torch runs behind the backward of a whole B and later for a split one. What arrives
is checked as ours is. The last stage's output is one number, its own loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.distributed import pipelining

from benchmarks.sleeping import ELEMENTS, Clock, content
from parallel.schedule.actions import Op, Payload, Table
from parallel.schedule.boundary import Boundary

# our name -> the class of torch's
SCHEDULES: dict[str, Any] = {
    "1f1b": pipelining.Schedule1F1B,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, stage: SleepingModule, chunk: int) -> torch.Tensor:
        ctx.stage, ctx.chunk = stage, chunk
        if stage.index:
            stage.clock.take(Boundary(Payload.ACTIVATION, 0, stage.index, chunk), x.detach())
        stage.clock.sleep(Op.F, 0, stage.index, chunk)
        return torch.zeros(1) if stage.last else content(Boundary(Payload.ACTIVATION, 0, stage.index + 1, chunk))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        stage, chunk = ctx.stage, ctx.chunk
        if not stage.last:
            stage.clock.take(Boundary(Payload.GRADIENT, 0, stage.index, chunk), grads[0])
        stage.clock.sleep(Op.I, 0, stage.index, chunk)
        stage.backward_chunk = chunk
        return content(Boundary(Payload.GRADIENT, 0, stage.index - 1, chunk)) if stage.index else None, None, None, None


class SleepingModule(nn.Module):
    """Stage `index` of `stages`. Chunks come forward in order, so they are counted."""

    def __init__(self, index: int, stages: int, clock: Clock) -> None:
        super().__init__()
        self.index, self.last, self.clock = index, index == stages - 1, clock
        self.anchor = nn.Parameter(torch.zeros(1))
        self.forward_chunk = self.backward_chunk = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunk, self.forward_chunk = self.forward_chunk, self.forward_chunk + 1
        return _Sleep.apply(x, self.anchor, self, chunk)

    def weights(self) -> Callable[[], None]:
        """torch calls this right after a chunk's input gradient; the result is that chunk's weight gradient."""
        chunk = self.backward_chunk
        return lambda: self.clock.sleep(Op.W, 0, self.index, chunk)


class TorchPipeline:
    """One rank of torch's schedule of the same name as `table`."""

    def __init__(self, table: Table, rank: int, clock: Clock) -> None:
        self.table = table
        self.modules = [SleepingModule(stage, table.stages, clock) for _, stage in table.stages_of(rank)]
        stages = [self._stage(module) for module in self.modules]
        kind = SCHEDULES[table.name]
        alone = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        self.schedule = kind(
            stages[0] if alone else stages,
            n_microbatches=table.micro_batches,
            loss_fn=lambda output, target: output.sum(),
            scale_grads=False,
        )

    def _stage(self, module: SleepingModule) -> pipelining.PipelineStage:
        return pipelining.PipelineStage(
            module,
            module.index,
            self.table.stages,
            torch.device("cpu"),
            input_args=torch.empty(ELEMENTS, requires_grad=True) if module.index else torch.empty(1),
            output_args=torch.empty(1 if module.last else ELEMENTS, requires_grad=True),
            dw_builder=module.weights,
        )

    def run(self) -> None:
        """One step."""
        for module in self.modules:
            module.forward_chunk = 0
        first = any(module.index == 0 for module in self.modules)
        last = any(module.last for module in self.modules)
        numbers = torch.zeros(self.table.micro_batches)
        self.schedule.step(*((numbers,) if first else ()), target=numbers if last else None, return_outputs=False)
