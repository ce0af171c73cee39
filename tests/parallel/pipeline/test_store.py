"""The weight-gradient store: order, the queue of deferred chunks, misuse, and when tensors die."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.pipeline.store import Bag, WeightGradStore


class Sink:
    """Records (parameter, value) in order of arrival."""

    def __init__(self) -> None:
        self.arrived: list[tuple[nn.Parameter, float]] = []
        self.grad_enabled: list[bool] = []

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        self.grad_enabled.append(torch.is_grad_enabled())
        self.arrived.append((parameter, grad.item()))


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(())) for _ in range(count)]


def filled(store: WeightGradStore, *entries: tuple[nn.Parameter, float]) -> Bag:
    bag: Bag = []
    with store.collecting(bag):
        for parameter, value in entries:
            store.put(parameter, lambda value=value: torch.tensor(value))
    return bag


def test_a_bag_runs_in_the_order_it_was_filled() -> None:
    sink, (a, b) = Sink(), parameters(2)
    store = WeightGradStore(sink)
    bag = filled(store, (a, 1.0), (b, 2.0), (a, 3.0))
    assert sink.arrived == []
    store.run(bag)
    assert sink.arrived == [(a, 1.0), (b, 2.0), (a, 3.0)]
    assert sink.grad_enabled == [False] * 3
    assert bag == []


def test_deferred_chunks_run_first_in_first_out() -> None:
    sink, (a, b) = Sink(), parameters(2)
    store = WeightGradStore(sink)
    store.defer("first", [filled(store, (a, 1.0)), filled(store, (b, 2.0))])
    store.defer("second", [filled(store, (a, 3.0))])
    assert store.depth == 2 and sink.arrived == []
    store.run_oldest("first")
    assert store.depth == 1 and sink.arrived == [(a, 1.0), (b, 2.0)]
    store.run_oldest("second")
    assert store.depth == 0 and sink.arrived[2:] == [(a, 3.0)]


def test_the_wrong_chunk_at_the_head() -> None:
    sink, (a,) = Sink(), parameters(1)
    store = WeightGradStore(sink)
    store.defer((0, 1, 2), [filled(store, (a, 1.0))])
    with pytest.raises(RuntimeError, match=r"W \(0, 1, 3\): .*head is \(0, 1, 2\)"):
        store.run_oldest((0, 1, 3))
    assert sink.arrived == []


def test_an_empty_queue() -> None:
    with pytest.raises(RuntimeError, match="queue is empty"):
        WeightGradStore(Sink()).run_oldest("any")


def test_gradients_outside_a_backward() -> None:
    store, (a,) = WeightGradStore(Sink()), parameters(1)
    with pytest.raises(RuntimeError, match="outside a segment's backward"):
        store.put(a, lambda: torch.zeros(()))
    filled(store, (a, 1.0))
    with pytest.raises(RuntimeError, match="outside a segment's backward"):
        store.put(a, lambda: torch.zeros(()))


def test_a_backward_inside_a_backward() -> None:
    store = WeightGradStore(Sink())
    with pytest.raises(RuntimeError, match="inside another"), store.collecting([]), store.collecting([]):
        pass
    with store.collecting([]):  # the failure left nothing behind
        pass


def test_each_closure_dies_as_soon_as_it_has_run() -> None:
    (a,), alive = parameters(1), []
    kept: list[StorageWeakRef] = []

    class Watching(Sink):
        def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
            alive.append([not ref.expired() for ref in kept])

    store = WeightGradStore(Watching())
    bag: Bag = []
    with store.collecting(bag):
        for i in range(3):
            saved = torch.full((4,), float(i))
            kept.append(StorageWeakRef(saved.untyped_storage()))
            store.put(a, lambda saved=saved: saved.sum())
            del saved
    store.run(bag)
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]
    assert all(ref.expired() for ref in kept)


def test_clear_forgets_a_failed_step() -> None:
    sink, (a,) = Sink(), parameters(1)
    store = WeightGradStore(sink)
    store.defer("chunk", [filled(store, (a, 1.0))])
    store.clear()
    assert store.depth == 0
    with pytest.raises(RuntimeError, match="queue is empty"):
        store.run_oldest("chunk")
