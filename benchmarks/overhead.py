"""Host overhead per action of the executor and of torch's `_PipelineScheduleRuntime`, over the same table.

    python benchmarks/overhead.py [--schedules 1f1b interleaved zbv] [--ranks 4] [--micro-batches 16] [--steps 20]

One gloo process for each pipeline rank. Both sides run the same lists: the compute actions of our table in their order,
and its sends and receives in theirs (torch's list is translated from ours). Both sides' stage is y = x w, on tensors of
8 numbers, so that what is left is overhead; the last stage adds a sum, its loss.

- Ours: F is a generator of one step that runs a `Segment` (autograd graph of its own); dX is that segment's backward;
  w's gradient is a closure in the pipeline's store, run by B or W, added to a float32 sum.
- torch: F is the module called by `PipelineStage`, B its `stage_backward`; I and W are its `stage_backward_input` and
  `stage_backward_weight`, over the same product under autograd.

The weight gradients of both sides are compared after the first step. A repeat is `steps` steps of ours, then as many of
torch's, from a common start to the last rank's end; the figures are medians over the repeats. `overhead_ratio`: ours
over torch's, wall clock per action, for the worst schedule; `processor_ratio`: the same for processor time of all
ranks. An action is a compute action, a send or a receive.

The last line is one JSON object. Exit code 1 when `overhead_ratio` exceeds 1.1; 69 when a rank fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from torch import nn
from torch.autograd import Function
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules as torch_schedules

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import ProcessFailed, Report, gathered, gloo, start_together
from parallel.expert.contract import Pending
from parallel.pipeline.contract import DEFAULT_ORDER, Program
from parallel.pipeline.executor import Executor
from parallel.pipeline.segment import Segment
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Compute, Op, Payload, Post, Table
from parallel.schedule.registry import build

WIDTH = 8
BOUND = 1.1
OURS, TORCH = "ours", "torch"
SCHEDULES = [
    "1f1b",
    "interleaved",
    "zb1p",
    "zbv",
]  # one direction and no pairs: what torch's lists can say and run alike
SILENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """`steps` steps of one side. wall: seconds to the last rank's end. processor: seconds of all ranks together."""

    schedule: str
    side: str
    wall: float
    processor: float


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


class _Product(Function):
    """x w. The gradient of w goes to the store."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, store: WeightGradStore) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.rest = weight, store
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,), (weight, store), dy = ctx.saved_tensors, ctx.rest, grads[0]
        store.put(weight, lambda: dy * x)
        return dy * weight, None, None


class Stage:
    """Ours."""

    def __init__(self, stage: int, stages: int, inputs: torch.Tensor, store: WeightGradStore) -> None:
        self.stage, self.last, self.store = stage, stage == stages - 1, store
        self.weight = nn.Parameter(numbers(1, WIDTH, seed=stage))
        self.inputs = list(inputs)
        self.live: dict[int, Segment] = {}
        self.one = torch.ones(())

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return (1, WIDTH)

    output_shape = boundary_shape

    def _function(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = _Product.apply(x, self.weight, self.store)
        return (y.sum() if self.last else y,)

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        yield "attn(F)"
        x = self.inputs[chunk] if received is None else received.wait()
        self.live[chunk] = segment = Segment()
        (y,) = segment.run(self._function, x)
        return None if self.last else y

    def backward_program(
        self, chunk: int, received: Pending[torch.Tensor] | None, split: bool, emit: Callable[[torch.Tensor], None]
    ) -> Program:
        yield "attn(B)"
        segment = self.live.pop(chunk)
        (dx,) = segment.backward(self.store, self.one if received is None else received.wait())
        emit(dx)
        if split:
            self.store.defer((0, self.stage, chunk), [segment.bag])
        else:
            self.store.run(segment.bag)


class Sums:
    """A gradient sink: parameter.grad."""

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad += grad


class Module(nn.Module):
    """torch's."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(1, WIDTH, seed=stage))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def translated(table: Table) -> dict[int, list[torch_schedules._Action | None]]:
    """The table in torch's terms. A transfer is named by the stage that consumes it here, by the stage at its own end
    there."""
    kinds = torch_schedules._ComputationType
    compute = {Op.F: kinds.FORWARD, Op.B: kinds.FULL_BACKWARD, Op.I: kinds.BACKWARD_INPUT, Op.W: kinds.BACKWARD_WEIGHT}
    out: dict[int, list[torch_schedules._Action | None]] = {}
    for rank, row in enumerate(table.actions):
        out[rank] = []
        for action in row:
            if isinstance(action, Compute):
                out[rank].append(torch_schedules._Action(action.stage, compute[action.op], action.chunk))
                continue
            if not isinstance(action, Post):
                raise ValueError(f"{action}: torch runs the halves of a pair one after the other")
            for t in action.transfers:
                if t.payload is Payload.ACTIVATION:
                    kind, stage = (kinds.SEND_F, t.stage - 1) if t.send else (kinds.RECV_F, t.stage)
                else:
                    kind, stage = (kinds.SEND_B, t.stage + 1) if t.send else (kinds.RECV_B, t.stage)
                out[rank].append(torch_schedules._Action(stage, kind, t.chunk))
    return out


def torch_runtime(table: Table, modules: dict[int, Module]) -> torch_schedules._PipelineScheduleRuntime:
    stages = [
        pipelining.PipelineStage(
            module,
            stage,
            table.stages,
            torch.device("cpu"),
            input_args=torch.empty(1, WIDTH, requires_grad=stage > 0),
            output_args=torch.empty(1, WIDTH, requires_grad=True),
        )
        for stage, module in modules.items()
    ]
    runtime = torch_schedules._PipelineScheduleRuntime(
        stages, table.micro_batches, loss_fn=lambda output, target: output.sum(), scale_grads=False
    )
    runtime._prepare_schedule_with_comms(translated(table), format="compute_comms")
    return runtime


def body(rank: int, size: int, report: Report, names: list[str], micro_batches: int, steps: int, repeats: int) -> None:
    """One rank of both sides, turn about; rank 0 reports a `Run` for each turn."""
    for name in names:
        table = build(name, size, micro_batches)
        inputs = numbers(micro_batches, 1, WIDTH, seed=1000)
        held = [stage for _, stage in table.stages_of(rank)]
        store = WeightGradStore(Sums())
        stages = {stage: Stage(stage, table.stages, inputs, store) for stage in held}
        executor = Executor(table, rank, {(0, s): stages[s] for s in held}, store, torch.float32, DEFAULT_ORDER)
        modules = {stage: Module(stage) for stage in held}
        runtime = torch_runtime(table, modules)
        given = (inputs.flatten(0, 1),) if 0 in held else ()
        target = torch.zeros(micro_batches) if table.stages - 1 in held else None

        def theirs(runtime: Any = runtime, given: Any = given, target: Any = target) -> None:
            runtime.step(*given, target=target, return_outputs=False)

        executor.run()
        theirs()
        for stage in held:
            torch.testing.assert_close(stages[stage].weight.grad, modules[stage].weight.grad)
        for _ in range(repeats):
            for side, step in ((OURS, executor.run), (TORCH, theirs)):
                start, spent = start_together(), time.process_time()
                for _ in range(steps):
                    step()
                end, spent = time.perf_counter(), time.process_time() - spent
                rows = gathered((end - start, spent), size)
                if rank == 0:
                    report(Run(name, side, max(wall for wall, _ in rows), sum(spent for _, spent in rows)))


def actions_of(table: Table) -> int:
    """Compute actions, sends and receives of all ranks."""
    return sum(len(a.transfers) if isinstance(a, Post) else 1 for row in table.actions for a in row)


def figures(name: str, runs: list[Run], ranks: int, micro_batches: int, steps: int) -> dict[str, Any]:
    """Medians over the repeats: microseconds per action (wall clock of a rank's mean share; processor) and ratios."""
    every = actions_of(build(name, ranks, micro_batches)) * steps
    row: dict[str, Any] = {"schedule": name}
    medians: dict[tuple[str, str], float] = {}
    for side in (OURS, TORCH):
        mine = [run for run in runs if run.side == side]
        medians[side, "wall"] = statistics.median(run.wall * ranks for run in mine) / every * 1e6
        medians[side, "processor"] = statistics.median(run.processor for run in mine) / every * 1e6
        row |= {f"{side}_{what}_us": round(medians[side, what], 1) for what in ("wall", "processor")}
    row["overhead_ratio"] = round(medians[OURS, "wall"] / medians[TORCH, "wall"], 4)
    row["processor_ratio"] = round(medians[OURS, "processor"] / medians[TORCH, "processor"], 4)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host overhead per action, ours over torch's.")
    parser.add_argument(
        "--schedules", nargs="+", default=["1f1b", "interleaved", "zbv"], choices=SCHEDULES, metavar="NAME"
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.ranks < 2 or min(arguments.micro_batches, arguments.steps, arguments.repeats) < 1:
        parser.exit(64, "overhead: --ranks must be at least 2, --micro-batches, --steps and --repeats at least 1\n")
    console = Console()
    load = os.getloadavg()[0]
    given = (arguments.schedules, arguments.micro_batches, arguments.steps, arguments.repeats)
    runs: dict[str, list[Run]] = {name: [] for name in arguments.schedules}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("overhead", total=2 * arguments.repeats * len(arguments.schedules))
        try:
            for run in gloo(body, arguments.ranks, *given, timeout=SILENCE_SECONDS):
                runs[run.schedule].append(run)
                progress.update(bar, advance=1, description=f"{run.schedule} {run.side}")
        except ProcessFailed as error:
            progress.stop()
            print(f"overhead: {error}", file=sys.stderr)
            return 69
    rows = [
        figures(name, found, arguments.ranks, arguments.micro_batches, arguments.steps) for name, found in runs.items()
    ]
    grid = Grid(title=f"Microseconds per action, P={arguments.ranks}, M={arguments.micro_batches}, empty stages")
    grid.add_column("schedule")
    for column in ("ours", "torch", "ratio", "ours processor", "torch processor", "ratio"):
        grid.add_column(column, justify="right")
    for row in rows:
        walls = (f"{row['ours_wall_us']:.1f}", f"{row['torch_wall_us']:.1f}", f"{row['overhead_ratio']:.3f}")
        spent = (f"{row['ours_processor_us']:.1f}", f"{row['torch_processor_us']:.1f}", f"{row['processor_ratio']:.3f}")
        grid.add_row(row["schedule"], *walls, *spent)
    console.print(grid)
    worst = max(rows, key=lambda row: row["overhead_ratio"])
    missed = worst["overhead_ratio"] > BOUND
    if missed:
        console.print(f"missed: overhead_ratio={worst['overhead_ratio']:.3f} ({worst['schedule']}): at most {BOUND}")
    merits = {
        "overhead_ratio": worst["overhead_ratio"],
        "processor_ratio": max(row["processor_ratio"] for row in rows),
        "ranks": arguments.ranks,
        "micro_batches": arguments.micro_batches,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({**merits, "rows": rows}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
