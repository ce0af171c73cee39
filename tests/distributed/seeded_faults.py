"""Faults put into the real classes of an engine, one function each; every rank calls it before its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from parallel.device import PIPELINE
from parallel.pipeline.contract import DEFAULT_ORDER
from parallel.sanitizer.device import SanitizerDevice
from parallel.sanitizer.executor import WatchedExecutor
from parallel.sanitizer.findings import Rule
from tests.distributed.sanitized import SanitizedEngine

CROSSED_ORDER = tuple(
    {"dispatch(F)": "dispatch(B)", "dispatch(B)": "dispatch(F)"}.get(step, step) for step in DEFAULT_ORDER
)


def missing_event(engine: SanitizedEngine) -> None:
    """Dispatch waits for no segment."""
    plan, scatter = engine.dispatcher.plan, engine.dispatcher.scatter
    engine.dispatcher.plan = lambda expert_index_TK, after=(): plan(expert_index_TK, ())  # type: ignore[method-assign]
    engine.dispatcher.scatter = lambda route, rows, weights_TK=None, after=(): scatter(route, rows, weights_TK, ())  # type: ignore[method-assign]


class ForgetsSent(WatchedExecutor):
    """Lets go of what it sends as soon as it is posted."""

    def _post(self, batch: Any) -> None:
        super()._post(batch)
        nothing = torch.empty(0)
        for index, (transfer, ticket, _) in enumerate(self._sending):
            self._sending[index] = transfer, ticket, nothing


def early_free(engine: SanitizedEngine) -> None:
    engine.executor_class = ForgetsSent


def adopt_left_out(engine: SanitizedEngine) -> None:
    engine.device.adopt = lambda *tensors: None  # type: ignore[method-assign]


def item_in_a_segment(engine: SanitizedEngine) -> None:
    swiglu = engine.ops.swiglu

    def watched(gate_up: torch.Tensor, *others: Any) -> Any:
        assert gate_up.abs().max().item() >= 0
        return swiglu(gate_up, *others)

    engine.ops.swiglu = watched  # type: ignore[method-assign]


def crossed_collective(engine: SanitizedEngine) -> None:
    """One rank of each expert group issues dispatch(B) before dispatch(F)."""
    if engine.topology.expert_rank == 1:
        engine.order = CROSSED_ORDER


class WhoeverIsReady(WatchedExecutor):
    """Chooses the order of a pair by what has arrived, which no two ranks see alike."""

    def _compute(self, part_list: Any) -> None:
        arrived = self.device.arrivals.pop() if len(part_list) == 2 else False  # type: ignore[attr-defined]
        self.order = CROSSED_ORDER if arrived else DEFAULT_ORDER
        super()._compute(part_list)


def order_by_arrival(engine: SanitizedEngine) -> None:
    engine.executor_class = WhoeverIsReady
    engine.device.arrivals = [engine.topology.expert_rank == 0] * 8  # type: ignore[attr-defined]


class BuffersOnCompute(SanitizerDevice):
    """Enters the pipeline's side stream for the transfer alone, after its buffers were made."""

    @contextmanager
    def side(self, channel: str, after: Sequence[Any]) -> Iterator[None]:
        if channel == PIPELINE:
            self.later = after
            yield
        else:
            with super().side(channel, after):
                yield

    def transfer(self, operations: list[Any]) -> Any:
        with super().side(PIPELINE, self.later):
            return super().transfer(operations)


def buffer_on_compute(engine: SanitizedEngine) -> None:
    engine.device.__class__ = BuffersOnCompute


def counts_not_waited_for(engine: SanitizedEngine) -> None:
    engine.device.read = lambda channel, ticket, *tensors: [tensor.tolist() for tensor in tensors]  # type: ignore[method-assign]


def crossed_transfers(engine: SanitizedEngine) -> None:
    """One rank posts what a batch holds in reverse."""
    device, transfer = engine.device, engine.device.transfer

    def reverse(operations: list[Any]) -> Any:
        device.transfers = device.transfers[::-1]
        return transfer(operations[::-1])

    if engine.topology.pipeline_rank == 1:
        device.transfer = reverse  # type: ignore[method-assign]


def dropped_pending(engine: SanitizedEngine) -> None:
    """A second dispatch that nobody takes."""
    scatter = engine.dispatcher.scatter

    def twice(route: Any, rows: Any, weights_TK: Any = None, after: Any = ()) -> Any:
        scatter(route, rows, weights_TK, after)
        return scatter(route, rows, weights_TK, after)

    engine.dispatcher.scatter = twice  # type: ignore[method-assign]


# A table whose batches hold two transfers from one rank to another.
SCHEDULE_OF = {crossed_transfers: "dualpipev"}

# fault -> rule it breaks, words that its line must have
SEEDED: dict[Callable[[SanitizedEngine], None], tuple[Rule, tuple[str, ...]]] = {
    missing_event: (Rule.RACE, ("dispatch(F)", "on expert side stream", "compute", "a mark in `after`")),
    early_free: (Rule.EARLY_FREE, ("send of", "communicator", "is freed in", "keep it until")),
    adopt_left_out: (Rule.EARLY_FREE, ("on expert side stream", "on compute", "adopt it")),
    item_in_a_segment: (Rule.HIDDEN_SYNC, ("aten::_local_scalar_dense", "aten::max on compute", "mlp(F)")),
    crossed_collective: (Rule.COLLECTIVE, ("dispatch(F)", "dispatch(B)", "one order on all ranks")),
    order_by_arrival: (Rule.COLLECTIVE, ("dispatch(F)", "dispatch(B)", "one order on all ranks")),
    buffer_on_compute: (Rule.RACE, ("receive of", "aten::empty on compute", "allocates")),
    counts_not_waited_for: (Rule.RACE, ("Tensor.tolist on compute", "all-to-all", "int64[2, 5]", "writes")),
    crossed_transfers: (Rule.COLLECTIVE, ("is sent", "is received", "NCCL ignores tags")),
    dropped_pending: (Rule.TICKET, ("all-to-all", "dropped while under way", "never waited for")),
}
