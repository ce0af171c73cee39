"""The dispatcher: how token rows reach their experts and come back.

Two movements, each the transpose of the other. `scatter` carries one row per (token, rank) to the ranks that own the
token's experts and lays the rows out by local expert; `reduce` sums over the experts of a rank, and `gather` carries
those rows back and sums over ranks. Dispatch is scatter forward and gather backward; combine is gather forward and
scatter backward. Payloads are plain tensors or `kernels.quantize.Quantized` rows (FP8 bytes and scales).

The host blocks only in `Route` resolution (receive counts), whose exchange starts in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from parallel.device import Event, Ticket

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Pending(Generic[T]):
    """Communication under way. Owns the tensors until `wait`, which may be called exactly once."""

    def __init__(self, works: Sequence[Ticket], finish: Callable[[], T]) -> None:
        self._works: Sequence[Ticket] | None = works
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        if self._works is None or self._finish is None:
            raise RuntimeError("a pending transfer was waited for twice")
        works, finish = self._works, self._finish
        self._works = self._finish = None
        for work in works:
            work.wait()
        return finish()


class Dispatcher(Protocol):
    """Expert dispatch over one expert-parallel group: `experts` routed experts, split evenly, contiguous per rank.

    `after`: the marks of the segments that made what is moved; a movement waits for those and for nothing else.
    """

    experts: int
    local_experts: int

    def mark(self) -> Event:
        """The end of what was computed so far."""
        ...

    def plan(self, expert_index_TK: torch.Tensor, after: Sequence[Event] = ()) -> Any:
        """Start the exchange of counts for [tokens, top_k] expert ids; returns the route of this chunk and layer."""
        ...

    def scatter(
        self, route: Any, rows: Any, weights_TK: torch.Tensor | None = None, after: Sequence[Event] = ()
    ) -> Pending[Any]:
        """rows [tokens, width] -> Pending of `Received` (rows by local expert). With `weights_TK` their router weights
        come along."""
        ...

    def reduce(self, route: Any, rows: torch.Tensor, weight_grads: torch.Tensor | None = None) -> Any:
        """Compute: expanded rows (and gradients of their router weights) -> sums over this rank's experts."""
        ...

    def gather(self, route: Any, reduced: Any, after: Sequence[Event] = ()) -> Pending[Any]:
        """What `reduce` made -> Pending of ([tokens, width] sums, [tokens, top_k] gradients or None)."""
        ...
