"""The executor on the sanitizer's device: the real one, which also says which action and step is running."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from parallel.expert.contract import Pending
from parallel.pipeline.contract import PipelineStage, Program
from parallel.pipeline.executor import Executor, _Batch, _describe, _Part
from parallel.pipeline.store import WeightGradStore
from parallel.sanitizer.device import SanitizerDevice
from parallel.schedule.actions import Compute, Op, Table


class NamedStage:
    """A stage whose programs say which step they run."""

    def __init__(self, key: tuple[int, int], stage: PipelineStage, device: SanitizerDevice) -> None:
        self.key, self.stage, self.device = key, stage, device

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return self.stage.boundary_shape(chunk)

    def output_shape(self, chunk: int) -> tuple[int, ...]:
        return self.stage.output_shape(chunk)

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        name = _describe(Compute(Op.F, *self.key, chunk))
        return self._named(name, self.stage.forward_program(chunk, received))

    def backward_program(
        self, chunk: int, received: Pending[torch.Tensor] | None, split: bool, emit: Callable[[torch.Tensor], None]
    ) -> Program:
        name = _describe(Compute(Op.I if split else Op.B, *self.key, chunk))
        return self._named(name, self.stage.backward_program(chunk, received, split, emit))

    def _named(self, name: str, program: Program) -> Generator[str, None, Any]:
        step = "start"
        while True:
            self.device.at = f"{name} {step}"
            try:
                step = next(program)
            except StopIteration as stop:
                return stop.value
            yield step


class WatchedExecutor(Executor):
    """`Executor` whose `device` is a `SanitizerDevice`; each `run` is one watched step."""

    device: SanitizerDevice

    def __init__(
        self,
        table: Table,
        rank: int,
        stages: dict[tuple[int, int], PipelineStage],
        store: WeightGradStore,
        dtype: torch.dtype,
        order: Sequence[str],
        global_rank: Callable[[int], int],
        device: SanitizerDevice,
    ) -> None:
        named: dict[tuple[int, int], PipelineStage] = {k: NamedStage(k, stage, device) for k, stage in stages.items()}
        super().__init__(table, rank, named, store, dtype, order, global_rank, device)

    def run(self) -> None:
        with self.device.watch():
            super().run()

    def _post(self, batch: _Batch) -> None:
        device, before = self.device, self.device.at
        device.transfers = [
            f"{'send' if m.transfer.send else 'receive'} of {m.boundary} {'to' if m.transfer.send else 'from'} rank "
            f"{m.peer}"
            for m in batch.moves
        ]
        device.at = f"post {batch.post} after {before}"
        super()._post(batch)
        device.at, device.transfers = before, ()

    def _compute(self, part_list: tuple[_Part, ...]) -> None:
        self.device.at = " beside ".join(_describe(part.compute) for part in part_list)
        super()._compute(part_list)
