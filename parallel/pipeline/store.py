"""Where weight gradients wait: closures collected per segment, run at once (B) or queued for a later W (I)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from parallel.optimizer.contract import GradientSink

Entry = tuple[nn.Parameter, Callable[[], torch.Tensor]]
Bag = list[Entry]


class WeightGradStore:
    """One per pipeline, never global and never thread-local: on CUDA autograd runs backward in threads of its own.

    A linear layer's backward computes dX at once and hands in a closure for dW. Bucket readiness hangs on the sink,
    since autograd's own accumulation hooks never fire for closures.
    """

    def __init__(self, sink: GradientSink) -> None:
        self.sink = sink
        self._bag: Bag | None = None
        self._queue: deque[tuple[object, list[Bag]]] = deque()

    @contextmanager
    def collecting(self, bag: Bag) -> Iterator[None]:
        """Held only around one autograd backward call, never across a yield of a program."""
        if self._bag is not None:
            raise RuntimeError("a segment's backward was started inside another segment's backward")
        self._bag = bag
        try:
            yield
        finally:
            self._bag = None

    def put(self, parameter: nn.Parameter, grad: Callable[[], torch.Tensor]) -> None:
        """Hand in the weight gradient of `parameter` for the segment whose backward is running."""
        if self._bag is None:
            raise RuntimeError("a weight gradient was handed in outside a segment's backward")
        self._bag.append((parameter, grad))

    def run(self, bag: Bag) -> None:
        """Compute and accumulate one segment's weight gradients; each closure's tensors die as soon as it has run."""
        bag.reverse()
        while bag:
            parameter, grad = bag.pop()
            with torch.no_grad():
                self.sink.accumulate(parameter, grad())

    def defer(self, key: object, bags: list[Bag]) -> None:
        """I: one queue entry per chunk and stage, named by `key`."""
        self._queue.append((key, bags))

    def run_oldest(self, key: object) -> None:
        """W: run the queue's head, which must be `key`'s."""
        if not self._queue:
            raise RuntimeError(f"W {key}: the weight-gradient queue is empty")
        found, bags = self._queue.popleft()
        if found != key:
            raise RuntimeError(f"W {key}: the weight-gradient queue's head is {found}")
        for bag in bags:
            self.run(bag)

    @property
    def depth(self) -> int:
        """Chunks whose weight gradients are queued."""
        return len(self._queue)

    def clear(self) -> None:
        """Forget everything, as after a failed step."""
        self._bag = None
        self._queue.clear()
