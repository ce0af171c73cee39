"""A layer in segments, and its forward and backward as programs.

`TransformerLayer.forward` is the definition; these segments compute the same with each graph cut at the transfers, so
that the forward of one chunk and the backward of another can be advanced together.

Shape letters: N tokens, d hidden, K experts per token, X expanded rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from kernels.quantize import Quantized
from model.attention import Attention
from model.attention_core import AttentionCore, Geometry, attend
from model.balance import BalanceWeights, weighted_balance
from model.grouped_query import GroupedQueryCore
from model.latent_attention import LatentAttention
from model.layer import TransformerLayer
from model.operands import Arrived, Box, Input, stand_in
from model.ops import Ops
from model.router import affinities, expert_load, expert_weights, select_experts
from parallel.device import Event
from parallel.expert.all_to_all import Received
from parallel.expert.contract import Dispatcher, Pending
from parallel.pipeline.contract import Program
from parallel.pipeline.segment import Segment
from parallel.pipeline.store import Bag

TakeBag = Callable[[Bag], None]
Handed = TypeVar("Handed")


@dataclass
class ChunkContext:
    """What every layer needs of a chunk. real_N: False on padding. balance: weights over the sequences of the step."""

    geometry: Geometry
    real_N: torch.Tensor
    balance: BalanceWeights


@dataclass
class LayerState:
    """What one layer keeps of one chunk between forward and backward."""

    attention: Segment = field(default_factory=Segment)
    mlp: Segment = field(default_factory=Segment)
    experts: Segment = field(default_factory=Segment)
    route: Any = None
    box: Box = field(default_factory=Box)
    given: Input | None = None
    expert_index_NK: torch.Tensor | None = None
    balanced: bool = False


@dataclass
class Entering:
    """The gradient of a layer's output on its way in: `payload` as combine(B) will send it, from the moment that
    `ready` marks (None and empty in a dense layer)."""

    dy: torch.Tensor
    payload: Any = None
    ready: tuple[Event, ...] = ()


class SegmentedLayer:
    """One layer on one rank. load_E accumulates real tokens per expert over the step; balance the scaled balance
    loss."""

    def __init__(self, layer: TransformerLayer, name: str, ops: Ops, dispatcher: Dispatcher | None) -> None:
        self.layer, self.name, self.ops, self.dispatcher = layer, name, ops, dispatcher
        self.config = layer.config
        self.load_E = torch.zeros(self.config.num_routed_experts, dtype=torch.int64) if layer.moe else None
        self.balance: torch.Tensor | float = 0.0

    def new_step(self) -> None:
        """Start counting afresh."""
        if self.load_E is not None:
            self.load_E = torch.zeros_like(self.load_E)
        self.balance = 0.0

    # Segments -------------------------------------------------------------------------------------------------------

    def _attention(self, x: torch.Tensor, context: ChunkContext, state: LayerState) -> tuple[torch.Tensor, ...]:
        """x -> residual h, normed MLP input n (, router weights [N, K] (, scaled balance loss if one is asked for))."""
        layer, ops, name = self.layer, self.ops, f"{self.name}.attention"
        m = layer.attention
        normed, _, given = ops.rmsnorm_linear(x, layer.attn_norm, others=False)
        core: AttentionCore
        if isinstance(m, Attention):
            core = LatentAttention(m, ops, context.geometry, name)
        else:
            core = GroupedQueryCore(m, ops, context.geometry, name)
        out, kept = attend(core, *core.project(normed, given))
        h = x + ops.linear(out, m.o, ops.attention_output(kept, out), f"{name}.o")
        n, again, state.given = ops.rmsnorm_linear(h, layer.mlp_norm, others=layer.moe)
        if not layer.moe:
            return h, n
        high = torch.promote_types(ops.dtype, torch.float32)
        logits = ops.high_linear(n, layer.router.weight, again, f"{self.name}.router", high)
        scores_NE = affinities(logits, self.config)
        index_NK = select_experts(scores_NE, layer.router.bias, self.config)
        state.expert_index_NK = index_NK
        assert self.load_E is not None
        # Evaluation must not move the router's bias.
        if torch.is_grad_enabled():
            self.load_E += expert_load(index_NK, self.config.num_routed_experts, context.real_N)
        g = context.geometry
        shape = (g.sequences, g.length)
        weights_NK = expert_weights(scores_NE, index_NK, self.config)
        if not context.balance.asked:
            return h, n, weights_NK
        balance = weighted_balance(
            scores_NE.unflatten(0, shape),
            index_NK.unflatten(0, shape),
            self.config,
            context.real_N.view(shape),
            context.balance,
        )
        return h, n, weights_NK, balance

    def _mlp(self, n: torch.Tensor, state: LayerState) -> tuple[torch.Tensor]:
        """The dense MLP, or the shared expert."""
        part, ops = ("shared", self.layer.shared) if self.layer.moe else ("mlp", self.layer.mlp), self.ops
        name, module = f"{self.name}.{part[0]}", part[1]
        given, state.given = state.given, None
        assert given is not None
        box = Box()
        gate_up = ops.linear(n, module.gate_up, given, f"{name}.gate_up", box)
        inner, hidden = ops.swiglu(gate_up, None, None, box)
        return (ops.linear(inner, module.down, hidden, f"{name}.down"),)

    def _experts(
        self, x: torch.Tensor, weights_X: torch.Tensor, received: Received, exact: torch.Tensor | None, box: Box
    ) -> tuple[torch.Tensor]:
        """Routed experts on their rows, each output already times its router weight."""
        module, ops, name, counts = self.layer.experts, self.ops, f"{self.name}.experts", received.counts
        rows = ops.dispatched(received.rows, counts, exact)
        inside = Box()
        gate_up = ops.grouped_linear(x, module.gate_up, rows, counts, f"{name}.gate_up", inside)
        inner, hidden = ops.swiglu(gate_up, weights_X, counts, inside)
        return (ops.grouped_linear(inner, module.down, hidden, counts, f"{name}.down", box),)

    def _run_experts(
        self, state: LayerState, received: Received, exact: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        rows, box = received.rows, state.box
        entering = stand_in(rows, dtype) if isinstance(rows, Quantized) else rows
        if isinstance(rows, Quantized):
            box.promise()
        assert received.weights_X is not None
        (out,) = state.experts.run(lambda x, w: self._experts(x, w, received, exact, box), entering, received.weights_X)
        return out

    def _exact_rows(
        self, state: LayerState, rows: torch.Tensor, after: tuple[Event, ...]
    ) -> Pending[torch.Tensor] | None:
        """The same rows sent in plain form, as an audit's yardstick; waited for after the scatter they belong to."""
        if self.dispatcher is None or not self.ops.auditing:
            return None
        moving = self.dispatcher.scatter(state.route, rows, after=after)
        return Pending((), lambda: moving.wait().rows)

    # Programs -------------------------------------------------------------------------------------------------------

    def forward(self, x: Pending[torch.Tensor], context: ChunkContext, state: LayerState) -> Program:
        """Returns a Pending of the layer's output, waited for by the next layer or by whoever sends it."""
        yield "attn(F)"
        arrived = x.wait()
        outputs = state.attention.run(lambda x: self._attention(x, context, state), arrived)
        h, n = outputs[:2]
        del arrived
        if not self.layer.moe:
            yield "mlp(F)"
            (y,) = state.mlp.run(lambda n: self._mlp(n, state), n)
            out = h + y
            return Pending((), lambda: out)
        assert self.dispatcher is not None and state.expert_index_NK is not None
        dispatcher = self.dispatcher
        weights_NK = outputs[2]
        state.balanced = len(outputs) == 4
        if state.balanced:
            self.balance = self.balance + outputs[3]
        payload = self.ops.payload(n)
        ready = (dispatcher.mark(),)
        state.route = dispatcher.plan(state.expert_index_NK, ready)
        state.expert_index_NK = None
        yield "dispatch(F)"
        moving = dispatcher.scatter(state.route, payload, weights_NK, ready)
        exact = self._exact_rows(state, n, ready)
        del payload
        yield "mlp(F)"
        # The shared expert needs no token of other ranks: it runs before the wait.
        (y,) = state.mlp.run(lambda n: self._mlp(n, state), n)
        received = moving.wait()
        expert_out = self._run_experts(state, received, exact.wait() if exact else None, n.dtype)
        reduced = dispatcher.reduce(state.route, expert_out)
        ready = (dispatcher.mark(),)
        residual = h + y
        del n, y, h, outputs, received, exact, expert_out
        yield "combine(F)"
        combining = dispatcher.gather(state.route, reduced, ready)
        del reduced
        return Pending((), lambda: residual + combining.wait()[0])

    def enter(self, dy: torch.Tensor) -> Entering:
        """What `backward` takes, made as soon as `dy` exists, so that combine(B) waits for nothing computed later."""
        if not self.layer.moe:
            return Entering(dy)
        assert self.dispatcher is not None
        payload = self.ops.payload(dy)
        return Entering(dy, payload, (self.dispatcher.mark(),))

    def backward(
        self, entering: Entering, state: LayerState, weights: TakeBag, emit: Callable[[torch.Tensor], Handed]
    ) -> Generator[str, None, Handed]:
        """`weights` takes each segment's bag (run now, or kept for W); `emit` gets dx before the attention's weight
        gradients, and what it returns is returned."""
        ops, store, dispatcher = self.ops, self.ops.store, self.dispatcher
        dy = entering.dy
        dweights: torch.Tensor | None = None
        combining: Any = None
        if self.layer.moe:
            assert dispatcher is not None
            yield "combine(B)"
            combining = dispatcher.scatter(state.route, entering.payload, after=entering.ready)
            exact = self._exact_rows(state, dy, entering.ready)
        del entering
        yield "mlp(B)"
        (dn,) = state.mlp.backward(store, dy)
        moving: Any = None
        if self.layer.moe:
            assert dispatcher is not None
            rows = combining.wait().rows
            grad = rows
            if isinstance(rows, Quantized):
                state.box.put(Arrived(rows, exact=exact.wait() if exact else None))
                grad = stand_in(rows, dy.dtype)
            drows, dweights_X = state.experts.backward(store, grad)
            reduced = dispatcher.reduce(state.route, drows, dweights_X)
            ready = (dispatcher.mark(),)
            del rows, grad, combining, exact, drows, dweights_X
            yield "dispatch(B)"
            moving = dispatcher.gather(state.route, reduced, ready)
            del reduced
        yield "mlp(W)"
        weights(state.mlp.bag)
        weights(state.experts.bag)
        yield "attn(B)"
        if self.layer.moe:
            back, dweights = moving.wait()
            dn = dn + back
            one = torch.ones((), dtype=torch.promote_types(ops.dtype, torch.float32), device=dn.device)
            (dx,) = state.attention.backward(store, dy, dn, dweights, *([one] if state.balanced else []))
            del back
        else:
            (dx,) = state.attention.backward(store, dy, dn)
        del dn, dweights, moving, dy
        handed = emit(dx)
        del dx
        yield "attn(W)"
        weights(state.attention.bag)
        return handed
