"""How much of the all-to-all an overlapped pair hides, with the segment and link times of DeepSeek's own trace.

    python benchmarks/overlap.py [--repeats 3] [--stretch 10] [--image overlap.png]

The forward of one chunk beside the backward of another, each through a stage of the real programs (`TransformerStage`,
`SegmentedLayer`, `overlap`) whose segments and dispatcher take time on a clock instead of computing: the model of one
GPU in `parallel/clock/virtual.py`, and real sleeps with transfers in the background. `exposed_share` is (span - compute
busy) / transfer time. Ends with exit code 1 if a bound does not hold; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.autograd import Function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.operands import Box
from model.ops import Ops
from model.segments import ChunkContext, LayerState, SegmentedLayer
from model.stage import Chunk, LossScales, TransformerStage
from parallel.clock.contract import Clock, Record
from parallel.clock.dispatcher import TimedDispatcher
from parallel.clock.drawing import Panel, draw_overlap
from parallel.clock.real import RealClock
from parallel.clock.virtual import VirtualClock
from parallel.expert.all_to_all import Received
from parallel.expert.contract import Dispatcher, Pending
from parallel.pipeline.contract import DEFAULT_ORDER, PUBLISHED_ORDER, READY_FIRST_ORDER, Program
from parallel.pipeline.interleave import Running, overlap
from parallel.pipeline.store import WeightGradStore

# Mean milliseconds per layer in the profile DeepSeek published (deepseek-ai/profile-data, train.json: H800, EP64, 4,096
# tokens). Of mlp(W) 3.5 ms ran on the compute stream beside 2.8 ms on a second one, 5.3 ms from first to last; there is
# one compute stream here, so it takes all 5.3.
DEEPSEEK: Mapping[str, float] = {
    "attn(F)": 4.4,
    "mlp(F)": 4.6,
    "mlp(B)": 5.3,
    "mlp(W)": 5.3,
    "attn(B)": 9.3,
    "attn(W)": 2.4,
    "dispatch(F)": 6.7,
    "combine(F)": 8.7,
    "combine(B)": 5.8,
    "dispatch(B)": 7.5,
}
LINKS = ("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")
ORDERS: Mapping[str, Sequence[str] | None] = {
    "published": PUBLISHED_ORDER,
    "default": DEFAULT_ORDER,
    "ready first": READY_FIRST_ORDER,
    "serial": None,
}
# One token goes to 8 routed experts and a shared one of the same width (V3).
SHARED = 1 / 9
CONTROL = "control: wait for all compute issued"
SPAN = (125.2, 132.9)
PUBLISHED_BOUND, CONTROL_BOUND, DEFAULT_BOUND, READY_BOUND = 0.037, 0.40, 0.25, 0.08


@dataclass(frozen=True)
class Case:
    """One pair. forward, backward: a letter for each layer of the stage, M (MoE) or D (dense). shared: part of the MLP
    time that the shared expert takes, which waits for no transfer. links: factor on the link times. wait_for_all:
    transfers wait for all compute issued. launch_cost, counts_late: milliseconds."""

    about: str
    order: str
    forward: str = "MMMM"
    backward: str = "MMMM"
    real: bool = False
    wait_for_all: bool = False
    launch_cost: float = 0.0
    counts_late: float = 0.0
    shared: float = 0.0
    links: float = 1.0


class _Timed(Function):
    """The identity, `name`(F) long; its backward `name`(B), and its weight gradient a closure `name`(W) long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, layer: TimedLayer) -> torch.Tensor:
        ctx.kept = name, layer
        layer.take(f"{name}(F)")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        name, layer = ctx.kept
        layer.take(f"{name}(B)")

        def weight_grad() -> torch.Tensor:
            layer.take(f"{name}(W)")
            return torch.zeros_like(layer.parameter)

        layer.ops.store.put(layer.parameter, weight_grad)
        return grads[0], None, None


class TimedLayer(SegmentedLayer):
    """A layer whose segments take time and compute nothing; its programs are those of every layer."""

    def __init__(self, moe: bool, ops: Ops, clock: Clock, times: Mapping[str, float], dispatcher: Dispatcher) -> None:
        described: Any = SimpleNamespace(moe=moe, config=SimpleNamespace(num_routed_experts=1))
        super().__init__(described, "timed", ops, dispatcher if moe else None)
        self.clock, self.times = clock, times
        self.parameter = nn.Parameter(torch.zeros(1))

    def take(self, name: str) -> None:
        if self.times[name]:
            self.clock.compute(name, self.times[name])

    def _attention(self, x: torch.Tensor, context: ChunkContext, state: LayerState) -> tuple[torch.Tensor, ...]:
        h = _Timed.apply(x, "attn", self)
        if not self.layer.moe:
            return h.clone(), h.clone()
        state.expert_index_NK = torch.zeros(len(x), 1, dtype=torch.int64)
        return h.clone(), h.clone(), h[:, :1].clone(), h.sum()

    def _mlp(self, n: torch.Tensor, state: LayerState) -> tuple[torch.Tensor]:
        return (_Timed.apply(n, "shared" if self.layer.moe else "dense", self),)

    def _experts(
        self, x: torch.Tensor, weights_X: torch.Tensor, received: Received, exact: torch.Tensor | None, box: Box
    ) -> tuple[torch.Tensor]:
        return (_Timed.apply(x, "mlp", self) * weights_X[:, None],)


class _NoGradients:
    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        pass


def layer_times(shared: float = 0.0, links: float = 1.0, stretch: float = 1.0) -> dict[str, float]:
    """Milliseconds of every segment and transfer. A dense MLP takes as long as shared and routed experts together: V3's
    is 9 experts wide."""
    times = {name: stretch * time * (links if name in LINKS else 1.0) for name, time in DEEPSEEK.items()}
    for kind in ("(F)", "(B)", "(W)"):
        times[f"dense{kind}"] = whole = times[f"mlp{kind}"]
        times[f"shared{kind}"] = shared * whole
        times[f"mlp{kind}"] = whole - times[f"shared{kind}"]
    return times


def _stepped(program: Program, clock: Clock) -> Program:
    """The same program; the host is told of every step that launches something."""
    try:
        while True:
            try:
                name = next(program)
            except StopIteration as stop:
                return stop.value
            yield name
            if name in DEFAULT_ORDER:
                clock.step(name)
    finally:
        program.close()


def _stage(layers: str, clock: Clock, times: Mapping[str, float], wait_for_all: bool) -> TransformerStage:
    ops = Ops(WeightGradStore(_NoGradients()), torch.float32, False, 1e-6)
    dispatcher = TimedDispatcher(clock, times, wait_for_all)
    made: list[SegmentedLayer] = [TimedLayer(kind == "M", ops, clock, times, dispatcher) for kind in layers]
    stage = TransformerStage((0, 1), ops, made, None, False, None, 1)
    none = torch.empty(0)
    context = ChunkContext(Geometry(1, 1, none, none, 1.0), torch.ones(1, dtype=torch.bool), BalanceWeights())
    stage.begin_step([Chunk(context, none, none, none, none, none)], LossScales(0.0, ()))
    return stage


def _arriving() -> Pending[torch.Tensor]:
    x = torch.zeros(1, 1)
    return Pending((), lambda: x)


def run_pair(case: Case, clock: Clock, times: Mapping[str, float]) -> Record:
    """The forward of a chunk beside the backward of one whose forward took no time, on `clock`."""
    ahead = _stage(case.forward, clock, times, case.wait_for_all)
    back = _stage(case.backward, clock, times, case.wait_for_all)
    Running(back.forward_program(0, _arriving())).drain()
    clock.start()
    forward = Running(_stepped(ahead.forward_program(0, _arriving()), clock))
    backward = Running(_stepped(back.backward_program(0, _arriving(), False, lambda dx: None), clock))
    order = ORDERS[case.order]
    if order is None:
        forward.drain()
        backward.drain()
    else:
        overlap(forward, backward, order)
    return clock.record()


def measure(case: Case, stretch: float = 10.0) -> Record:
    """One run of `case`; real sleeps are `stretch` times as long as DeepSeek's."""
    times = layer_times(case.shared, case.links, stretch if case.real else 1.0)
    if not case.real:
        return run_pair(case, VirtualClock(case.launch_cost, case.counts_late), times)
    with RealClock(case.counts_late * stretch) as clock:
        return run_pair(case, clock, times)


def cases() -> list[Case]:
    """Every row of the table, the bounded ones first."""
    rows = [Case("on time", order) for order in ORDERS]
    rows += [Case(CONTROL, order, wait_for_all=True) for order in ORDERS]
    for late in (0.0, 2.0, 4.0):
        about = f"1 ms launch cost, counts {late:g} ms late"
        rows += [Case(about, order, launch_cost=1.0, counts_late=late) for order in ORDERS]
    shapes = {
        "one layer": ("M", "M"),
        "3 layers forward, 4 backward": ("MMM", "MMMM"),
        "4 layers forward, 3 backward": ("MMMM", "MMM"),
        "dense, dense, MoE, MoE": ("DDMM", "DDMM"),
        "dense, MoE × 3 beside MoE × 4": ("DMMM", "MMMM"),
    }
    for about, (forward, backward) in shapes.items():
        rows += [Case(about, order, forward, backward) for order in ORDERS]
    rows += [Case("links 1.5 times as long", order, links=1.5) for order in ORDERS]
    rows += [Case("shared expert 1/9 of the MLP", order, shared=SHARED) for order in ORDERS]
    rows += [Case("real sleeps", order, real=True) for order in ORDERS]
    return rows


def in_declared_order(case: Case, record: Record) -> bool:
    """Whether the four-layer pair issued and waited as declared."""
    order = ORDERS[case.order]
    waits = ("combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)")
    return order is not None and record.issued == tuple(order) * 4 and record.waited == waits * 4


def figures_of(case: Case, record: Record) -> dict[str, Any]:
    compute, transfers = record.compute_busy, record.transfer_time
    return {
        "about": case.about,
        "order": case.order,
        "clock": "real" if case.real else "virtual",
        "layers": f"{case.forward}/{case.backward}",
        "span_ms": round(record.span, 3),
        "bound_ms": round(max(compute, transfers), 3),
        "compute_ms": round(compute, 3),
        "transfer_ms": round(transfers, 3),
        "exposed_share": round(record.exposed_share, 4),
    }


def summary(measured: Sequence[tuple[Case, Record]]) -> dict[str, Any]:
    """The bounded figures by name, from the rows they belong to."""
    plain = [(case, record) for case, record in measured if (case.forward, case.backward) == ("MMMM", "MMMM")]
    timed = {(case.about, case.order): record for case, record in plain}
    published = timed["on time", "published"]
    control = timed[CONTROL, "published"]
    paired = [(c, r) for c, r in plain if c.order != "serial" and not c.shared]
    return {
        "exposed_share": timed["real sleeps", "default"].exposed_share,
        "ready_first_share": timed["real sleeps", "ready first"].exposed_share,
        "serial_share": timed["real sleeps", "serial"].exposed_share,
        "published_span_ms": published.span,
        "published_share": published.exposed_share,
        "control_share": control.exposed_share,
        "orders_as_declared": all(in_declared_order(case, record) for case, record in paired),
    }


def broken_bounds(found: Mapping[str, Any]) -> list[str]:
    """One line for each bound that does not hold."""
    span, low, high = found["published_span_ms"], *SPAN
    lines = []
    if not low - 1e-9 <= span <= high:
        lines.append(f"published order, virtual clock: span {span:.1f} ms, allowed {low} to {high}")
    if not found["control_share"] > CONTROL_BOUND:
        lines.append(f"control: {found['control_share']:.3f} exposed, must be above {CONTROL_BOUND}")
    for name, key, bound in (
        ("published order, virtual clock", "published_share", PUBLISHED_BOUND),
        ("default order, real sleeps", "exposed_share", DEFAULT_BOUND),
        ("ready-first order, real sleeps", "ready_first_share", READY_BOUND),
    ):
        if not found[key] <= bound:
            lines.append(f"{name}: {found[key]:.3f} exposed, at most {bound} allowed")
    if not found["orders_as_declared"]:
        lines.append("a pair issued or waited in another order than declared")
    return lines


def measure_all(repeats: int, stretch: float, console: Console) -> list[tuple[Case, Record]]:
    """Every case; of the real ones, whose repeats alternate, the run with the median share."""
    rows = cases()
    runs: dict[Case, list[Record]] = {case: [] for case in rows}
    real = [case for case in rows if case.real]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext() as progress:
        bar = progress.add_task("pairs with real sleeps", total=repeats * len(real)) if progress else None
        for case in rows:
            if not case.real:
                runs[case].append(measure(case))
        for _ in range(repeats):
            for case in real:
                runs[case].append(measure(case, stretch))
                if progress and bar is not None:
                    progress.advance(bar)
    middle = {case: median([r.exposed_share for r in records]) for case, records in runs.items()}
    return [(case, min(runs[case], key=lambda r: abs(r.exposed_share - middle[case]))) for case in rows]


def table(measured: Sequence[tuple[Case, Record]]) -> Table:
    """A row for each kind of pair: span and exposed share by order. `bound` is the longer of compute and links, below
    which no order comes."""
    title = "span in ms and share of the all-to-all that is exposed, by order"
    made = Table("pair", "bound", *ORDERS, title=title, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    rows: dict[str, dict[str, Record]] = {}
    for case, record in measured:
        rows.setdefault(case.about, {})[case.order] = record
    for about, by_order in rows.items():
        bound = max(max(r.compute_busy, r.transfer_time) for r in by_order.values())
        cells = [f"{r.span:.1f}  {100 * r.exposed_share:4.1f} %" for r in (by_order[order] for order in ORDERS)]
        made.add_row(about, f"{bound:.1f}", *cells)
    return made


def panels() -> list[Panel]:
    """What the picture shows."""
    shown = {
        "published order": Case("", "published"),
        "default order": Case("", "default"),
        "ready-first order": Case("", "ready first"),
        "published order, counts 4 ms late, 1 ms launch cost": Case("", "published", launch_cost=1.0, counts_late=4.0),
        "default order, counts 4 ms late, 1 ms launch cost": Case("", "default", launch_cost=1.0, counts_late=4.0),
        "ready-first order, counts 4 ms late, 1 ms launch cost": Case(
            "", "ready first", launch_cost=1.0, counts_late=4.0
        ),
        "control: published order, transfers wait for all compute issued": Case("", "published", wait_for_all=True),
        "one after the other": Case("", "serial"),
    }
    return [Panel(title, measure(case)) for title, case in shown.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description="How much of the all-to-all an overlapped pair hides.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each pair with real sleeps; the median counts")
    parser.add_argument("--stretch", type=float, default=10.0, help="real sleeps are this many times DeepSeek's")
    parser.add_argument("--image", default="overlap.png", help="where the timelines are drawn")
    given = parser.parse_args()
    if given.repeats < 1 or given.stretch <= 0:
        parser.exit(64, "overlap: --repeats must be at least 1, --stretch above 0\n")
    image = Path(given.image)
    if image.suffix != ".png":
        parser.exit(64, f"overlap: --image {given.image}: must end in .png\n")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    measured = measure_all(given.repeats, given.stretch, console)
    try:
        draw_overlap(panels(), image)
    except OSError as error:
        parser.exit(73, f"overlap: cannot write {given.image}: {error.strerror}\n")
    console.print(table(measured))
    found = summary(measured)
    broken = broken_bounds(found)
    for line in broken:
        console.print(f"bound broken: {line}", style="red", soft_wrap=True)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    rows = [figures_of(case, record) for case, record in measured]
    print(json.dumps({**rounded, "image": given.image, "bounds_hold": not broken, "rows": rows}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
