"""A dispatcher whose movements take time on a clock and carry their rows nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from parallel.clock.contract import Clock, Counts
from parallel.device import Event
from parallel.expert.all_to_all import Received
from parallel.expert.contract import Pending


@dataclass
class TimedRoute:
    """counts: until the first scatter has blocked on them."""

    counts: Counts | None


@dataclass(frozen=True)
class TimedReduced:
    """Rows, and gradients of their router weights on the way back."""

    rows: torch.Tensor
    weight_grads: torch.Tensor | None


class TimedDispatcher:
    """A `Dispatcher` of one expert and one choice per token: a row goes out and comes back as it is.

    times: milliseconds of `dispatch(F)`, `combine(F)`, `combine(B)`, `dispatch(B)`. wait_for_all: a movement begins
    after all compute issued so far, whatever it was told, as a torch NCCL collective does that is issued under the
    compute stream.
    """

    experts = local_experts = 1

    def __init__(self, clock: Clock, times: Mapping[str, float], wait_for_all: bool = False) -> None:
        self.clock, self.times, self.wait_for_all = clock, times, wait_for_all

    def mark(self) -> Event:
        return self.clock.mark()

    def _marks(self, after: Sequence[Event]) -> tuple[Event, ...]:
        return (self.clock.mark(),) if self.wait_for_all else tuple(after)

    def plan(self, expert_index_TK: torch.Tensor, after: Sequence[Event] = ()) -> TimedRoute:
        return TimedRoute(self.clock.counts(self._marks(after)))

    def scatter(
        self,
        route: TimedRoute,
        rows: torch.Tensor,
        weights_TK: torch.Tensor | None = None,
        after: Sequence[Event] = (),
    ) -> Pending[Received]:
        if route.counts is not None:
            route.counts.block()
            route.counts = None
        name = "combine(B)" if weights_TK is None else "dispatch(F)"
        ticket = self.clock.transfer(name, self.times[name], self._marks(after))
        weights_X = None if weights_TK is None else weights_TK[:, 0]
        return Pending([ticket], lambda: Received(rows, weights_X, [len(rows)]))

    def reduce(self, route: TimedRoute, rows: torch.Tensor, weight_grads: torch.Tensor | None = None) -> TimedReduced:
        return TimedReduced(rows, weight_grads)

    def gather(
        self, route: TimedRoute, reduced: TimedReduced, after: Sequence[Event] = ()
    ) -> Pending[tuple[torch.Tensor, torch.Tensor | None]]:
        name = "combine(F)" if reduced.weight_grads is None else "dispatch(B)"
        ticket = self.clock.transfer(name, self.times[name], self._marks(after))
        grads_TK = None if reduced.weight_grads is None else reduced.weight_grads[:, None]
        return Pending([ticket], lambda: (reduced.rows, grads_TK))
