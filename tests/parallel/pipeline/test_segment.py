"""Segments against plain autograd, and what they keep alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.pipeline.segment import Segment
from parallel.pipeline.store import WeightGradStore


class Sink:
    def __init__(self) -> None:
        self.grads: dict[nn.Parameter, torch.Tensor] = {}

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        self.grads[parameter] = self.grads.get(parameter, 0) + grad


class Linear(Function):
    """x w^T whose weight gradient goes to the store."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, store: WeightGradStore) -> torch.Tensor:
        ctx.kept = x.detach(), weight, store
        return x.detach() @ weight.detach().T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, store = ctx.kept
        dy = grads[0]
        store.put(weight, lambda: dy.T @ x)
        return dy @ weight.detach(), None, None


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gradients_equal_plain_autograd() -> None:
    """Two inputs, two outputs, a weight used twice; one input enters both outputs."""
    sink = Sink()
    store, weight = WeightGradStore(sink), nn.Parameter(draw(4, 4, seed=0))
    x, z, dp, dq = (draw(3, 4, seed=i) for i in range(1, 5))

    def function(x: torch.Tensor, z: torch.Tensor, linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = linear(x).sin() * z
        return linear(hidden), hidden.exp() + x

    segment = Segment()
    outputs = segment.run(lambda x, z: function(x, z, lambda t: Linear.apply(t, weight, store)), x, z)
    dx, dz = segment.backward(store, dp, dq)
    assert not any(output.requires_grad for output in outputs)
    assert sink.grads == {}  # they wait in the bag
    assert len(segment.bag) == 2
    store.run(segment.bag)

    plain_x, plain_z = x.clone().requires_grad_(), z.clone().requires_grad_()
    expected = function(plain_x, plain_z, lambda t: t @ weight.T)
    grads = torch.autograd.grad(expected, (plain_x, plain_z, weight), (dp, dq))
    for got, want in zip([*outputs, dx, dz, sink.grads[weight]], [*expected, *grads], strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=1e-13)
    assert weight.grad is None


def test_an_output_without_gradient() -> None:
    x, z, dp = (draw(3, seed=i) for i in range(3))
    segment = Segment()
    segment.run(lambda x, z: (x * 2, z * 3), x, z)
    dx, dz = segment.backward(WeightGradStore(Sink()), dp, None)
    assert torch.equal(dx, 2 * dp)
    assert dz is None


def test_every_output_needs_a_gradient_or_none() -> None:
    segment = Segment()
    segment.run(lambda x: (x * 2, x * 3), draw(3, seed=0))
    with pytest.raises(ValueError):
        segment.backward(WeightGradStore(Sink()), draw(3, seed=1))


@pytest.mark.parametrize("times", [0, 1], ids=["before_the_forward", "twice"])
def test_backward_without_a_forward_of_its_own(times: int) -> None:
    segment, store = Segment(), WeightGradStore(Sink())
    for _ in range(times):
        segment.run(lambda x: (x * 2,), draw(3, seed=0))
        segment.backward(store, draw(3, seed=1))
    with pytest.raises(RuntimeError, match="ran twice, or before its forward"):
        segment.backward(store, draw(3, seed=1))


def test_keeps_nothing_where_gradients_are_off() -> None:
    segment, x = Segment(), draw(3, seed=0)
    kept = StorageWeakRef(x.untyped_storage())
    with torch.no_grad():
        (y,) = segment.run(lambda x: (x * 2,), x)
        assert not torch.is_grad_enabled()
    assert torch.equal(y, 2 * x)
    del x
    assert kept.expired()
    with pytest.raises(RuntimeError, match="before its forward"):
        segment.backward(WeightGradStore(Sink()), y)


def watched(segment: Segment, function: Any) -> list[StorageWeakRef]:
    """Of what entered and of what left."""
    x = draw(5, seed=0)
    (y,) = segment.run(function, x)
    return [StorageWeakRef(t.untyped_storage()) for t in (x, y)]


def test_holds_only_what_its_operations_saved() -> None:
    """A product with a constant saves neither input nor output; a square saves its input, an exponential its output."""
    segments = [Segment() for _ in range(3)]
    functions = [lambda x: (x * 2,), lambda x: (x.square() * 1,), lambda x: (x.exp(),)]
    references = [watched(segment, function) for segment, function in zip(segments, functions, strict=True)]
    alive = [[not reference.expired() for reference in pair] for pair in references]
    assert alive == [[False, False], [True, False], [False, True]]
    for segment in segments:
        segment.backward(WeightGradStore(Sink()), draw(5, seed=1))
    assert all(reference.expired() for pair in references for reference in pair)


def test_a_failed_backward_leaves_the_store_usable() -> None:
    class Fails(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise ValueError("broken")

    store, segment = WeightGradStore(Sink()), Segment()
    segment.run(lambda x: (Fails.apply(x),), draw(3, seed=0))
    with pytest.raises(ValueError, match="broken"):
        segment.backward(store, draw(3, seed=1))
    other = Segment()
    other.run(lambda x: (x * 2,), draw(3, seed=0))
    other.backward(store, draw(3, seed=1))
