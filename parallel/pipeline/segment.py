"""A segment: one run of one compute step as a small autograd graph, cut off on both sides.

It holds graph nodes only, not the tensors that entered and left it, so what it keeps alive is exactly what its
operations saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.pipeline.store import Bag, WeightGradStore

GradSlots = list[torch.Tensor | None]


class _Entry(Function):
    """Where a tensor enters a segment. Keeps no data: a detached leaf would hold its tensor until the backward."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, x: torch.Tensor, slots: GradSlots, index: int) -> torch.Tensor:
        ctx.slots, ctx.index = slots, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.slots[ctx.index] = grads[0]
        return None, None, None, None


class Segment:
    """Runs `function` once forward, once backward. `bag` collects the weight gradients of its backward."""

    def __init__(self) -> None:
        self.bag: Bag = []
        self._edges: list[GradientEdge] | None = None
        self._slots: GradSlots | None = None

    def run(self, function: Callable[..., Sequence[torch.Tensor]], *inputs: torch.Tensor) -> list[torch.Tensor]:
        """`function(*inputs)` with gradients; returns its outputs detached. Where gradients are off (forward-only
        steps) it keeps nothing."""
        if not torch.is_grad_enabled():
            return [output.detach() for output in function(*inputs)]
        slots: GradSlots = [None] * len(inputs)
        with torch.enable_grad():
            # The anchor makes the graph exist even where no input requires a gradient.
            anchor = torch.empty(0, requires_grad=True)
            outputs = function(*(_Entry.apply(anchor, x, slots, i) for i, x in enumerate(inputs)))
        self._edges = [get_gradient_edge(output) for output in outputs]
        self._slots = slots
        return [output.detach() for output in outputs]

    def backward(self, store: WeightGradStore, *grads: torch.Tensor | None) -> list[torch.Tensor]:
        """Gradients of the inputs, given those of the outputs (None: that output has no gradient). Frees the graph."""
        if self._edges is None or self._slots is None:
            raise RuntimeError("a segment's backward ran twice, or before its forward")
        edges, slots = self._edges, self._slots
        self._edges = self._slots = None
        given = [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if grad is not None]
        with store.collecting(self.bag):
            torch.autograd.backward([edge for edge, _ in given], [grad for _, grad in given])
        return slots  # type: ignore[return-value]
