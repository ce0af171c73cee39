"""One pipeline stage: embedding, layers, head and MTP in segments, and the programs of a chunk through them.

Shape letters: N tokens, d hidden, D MTP depths, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.mtp import MultiTokenPrediction
from model.ops import Ops
from model.recompute import Cell
from model.segments import ChunkContext, LayerState, SegmentedLayer, TakeBag
from model.vocabulary import Embedding, HeadLoss
from parallel.expert.contract import Pending
from parallel.pipeline.contract import Program
from parallel.pipeline.segment import Segment


@dataclass(frozen=True)
class Chunk:
    """A micro-batch as the stages read it, flattened to N = B x T tokens. source_B: index of the sequence's source."""

    context: ChunkContext
    tokens_N: torch.Tensor
    labels_N: torch.Tensor
    mtp_tokens_DN: torch.Tensor
    mtp_labels_DN: torch.Tensor
    source_B: torch.Tensor


@dataclass(frozen=True)
class LossScales:
    """What each summed token loss is multiplied by: 1 / count for the main loss, lambda / (D count_k) for MTP depth
    k."""

    main: float
    mtp: tuple[float, ...]


@dataclass(frozen=True)
class ChunkLosses:
    """Summed token losses of one chunk (natural logarithm): main per sequence [B], MTP per depth [D]."""

    main_B: torch.Tensor
    mtp_D: torch.Tensor
    source_B: torch.Tensor


@dataclass
class Depth:
    """One MTP depth on this rank."""

    module: MultiTokenPrediction
    layer: SegmentedLayer


@dataclass
class Output:
    """What the last stage adds: final norm, head, MTP depths (with the embedding they look up)."""

    norm: nn.Parameter
    head: nn.Parameter
    depths: list[Depth]


@dataclass
class _DepthState:
    join: Segment = field(default_factory=Segment)
    layer: LayerState = field(default_factory=LayerState)
    norm: Segment = field(default_factory=Segment)
    head: Segment = field(default_factory=Segment)


@dataclass
class _ChunkState:
    layers: list[LayerState]
    depths: list[_DepthState]
    embed: Segment = field(default_factory=Segment)
    norm: Segment = field(default_factory=Segment)
    head: Segment = field(default_factory=Segment)


class TransformerStage:
    """A `PipelineStage`. embed: on the first stage, and on the last one when there are MTP depths. key: (direction,
    stage). losses: of the step's chunks, on the last stage."""

    def __init__(
        self,
        key: tuple[int, int],
        ops: Ops,
        layers: list[SegmentedLayer],
        embed: nn.Parameter | None,
        first: bool,
        output: Output | None,
        hidden_size: int,
    ) -> None:
        self.key, self.ops, self.layers, self.embed = key, ops, layers, embed
        self.first, self.output, self.hidden_size = first, output, hidden_size
        self.chunks: list[Chunk] = []
        self.scales = LossScales(0.0, ())
        self.losses: dict[int, ChunkLosses] = {}
        self._states: dict[int, _ChunkState] = {}

    def begin_step(self, chunks: list[Chunk], scales: LossScales) -> None:
        """The micro-batches of this stage's direction, in chunk order."""
        self.chunks, self.scales = chunks, scales
        self.losses = {}
        self._states = {}

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        return self.chunks[chunk].context.geometry.tokens, self.hidden_size

    def output_shape(self, chunk: int) -> tuple[int, ...]:
        return self.boundary_shape(chunk)

    # Forward --------------------------------------------------------------------------------------------------------

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        data, ops = self.chunks[chunk], self.ops
        depths = self.output.depths if self.output else []
        state = _ChunkState([LayerState() for _ in self.layers], [_DepthState() for _ in depths])
        if torch.is_grad_enabled():
            self._states[chunk] = state
        if self.first:
            yield "embed(F)"
            (embedded,) = state.embed.run(self._lookup(data.tokens_N), torch.empty(0, dtype=ops.dtype))
            received = Pending((), lambda: embedded)
        assert received is not None
        moving: Pending[torch.Tensor] = received
        for layer, kept in zip(self.layers, state.layers, strict=True):
            moving = yield from layer.forward(moving, data.context, kept)
        if self.output is None:
            yield "output(F)"
            return moving.wait()
        yield "head(F)"
        self.losses[chunk] = yield from self._head_forward(moving.wait(), data, state, self.output)
        return None

    def _lookup(self, tokens_N: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        embed, ops = self.embed, self.ops
        assert embed is not None
        return lambda anchor: (Embedding.apply(anchor, embed, tokens_N, ops),)

    def _normed(self, segment: Segment, x: torch.Tensor, gain: nn.Parameter) -> tuple[torch.Tensor, Cell[torch.Tensor]]:
        cells: list[Cell[torch.Tensor]] = []

        def run(x: torch.Tensor) -> tuple[torch.Tensor]:
            y, again = self.ops.rmsnorm(x, gain)
            cells.append(again)
            return (y,)

        (n,) = segment.run(run, x)
        return n, cells[0]

    def _loss(
        self,
        segment: Segment,
        n: torch.Tensor,
        again: Cell[torch.Tensor],
        labels_N: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert self.output is not None
        head, losses = self.output.head, list[torch.Tensor]()
        segment.run(lambda n: (HeadLoss.apply(n, head, labels_N, scale, again, self.ops, "head", losses),), n)
        return losses[0]

    def _head_forward(
        self, x: torch.Tensor, data: Chunk, state: _ChunkState, output: Output
    ) -> Generator[str, None, ChunkLosses]:
        n, again = self._normed(state.norm, x, output.norm)
        token_losses = self._loss(state.head, n, again, data.labels_N, self.scales.main)
        geometry = data.context.geometry
        main_B = token_losses.view(geometry.sequences, geometry.length).sum(1)
        sums: list[torch.Tensor] = []
        for k, (depth, kept) in enumerate(zip(output.depths, state.depths, strict=True)):
            yield "mtp_in(F)"
            (joined,) = kept.join.run(self._join(depth, data.mtp_tokens_DN[k]), n)
            moving = yield from depth.layer.forward(_arrived(joined), data.context, kept.layer)
            yield "mtp_head(F)"
            n, again = self._normed(kept.norm, moving.wait(), depth.module.norm)
            sums.append(self._loss(kept.head, n, again, data.mtp_labels_DN[k], self.scales.mtp[k]).sum())
        mtp_D = torch.stack(sums) if sums else token_losses.new_zeros(0)
        return ChunkLosses(main_B, mtp_D, data.source_B)

    def _join(self, depth: Depth, tokens_N: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        """proj [norm(embedding of the token k ahead); norm(state)] (V3 eq. 21, embedding first)."""
        module, ops, name = depth.module, self.ops, depth.layer.name.removesuffix(".layer")

        def run(n: torch.Tensor) -> tuple[torch.Tensor]:
            embedded = Embedding.apply(n, self.embed, tokens_N, ops)
            e, e_again = ops.rmsnorm(embedded, module.embed_norm)
            h, h_again = ops.rmsnorm(n, module.hidden_norm)
            again = Cell(lambda: torch.cat((e_again(), h_again()), -1))
            return (ops.high_linear(torch.cat((e, h), -1), module.proj, again, f"{name}.proj", ops.dtype),)

        return run

    # Backward -------------------------------------------------------------------------------------------------------

    def backward_program(
        self,
        chunk: int,
        received: Pending[torch.Tensor] | None,
        split: bool,
        emit: Callable[[torch.Tensor], None],
    ) -> Program:
        state, store = self._states.pop(chunk), self.ops.store
        bags: list[list] = []

        def weights(bag: list) -> None:
            if split:
                bags.append(bag)
            else:
                store.run(bag)

        layers, pairs = self.layers, list(zip(self.layers, state.layers, strict=True))

        def leave(dx: torch.Tensor) -> torch.Tensor:
            """The gradient of the stage's input: to the stage before, or to the embedding."""
            if not self.first:
                emit(dx)
            return dx

        into = layers[-1].enter if layers else leave
        if self.output is not None:
            handed = yield from self._head_backward(state, self.output, weights, into)
        else:
            yield "input(B)"
            assert received is not None
            handed = into(received.wait())
        del received
        for i in reversed(range(len(pairs))):
            layer, kept = pairs[i]
            handed = yield from layer.backward(handed, kept, weights, layers[i - 1].enter if i else leave)
        if self.first:
            yield "embed(B)"
            state.embed.backward(store, handed)
            weights(state.embed.bag)
        if split:
            store.defer((*self.key, chunk), bags)
        return None

    def _head_backward(
        self, state: _ChunkState, output: Output, weights: TakeBag, emit: Callable[[torch.Tensor], Any]
    ) -> Program:
        """`emit` gets the gradient of the head's input; what it returns is returned."""
        store = self.ops.store
        one = torch.ones((), dtype=torch.promote_types(self.ops.dtype, torch.float32), device=output.norm.device)
        carried: torch.Tensor | None = None
        for depth, kept in reversed(list(zip(output.depths, state.depths, strict=True))):
            yield "mtp_head(B)"
            (dn,) = kept.head.backward(store, one)
            (dy,) = kept.norm.backward(store, dn if carried is None else dn + carried)
            weights(kept.head.bag)
            weights(kept.norm.bag)
            entering = depth.layer.enter(dy)
            dy = yield from depth.layer.backward(entering, kept.layer, weights, _same)
            yield "mtp_in(B)"
            (carried,) = kept.join.backward(store, dy)
            weights(kept.join.bag)
        yield "head(B)"
        (dn,) = state.head.backward(store, one)
        (dy,) = state.norm.backward(store, dn if carried is None else dn + carried)
        handed = emit(dy)
        del dn, dy, carried
        weights(state.head.bag)
        weights(state.norm.bag)
        return handed


def _arrived(x: torch.Tensor) -> Pending[torch.Tensor]:
    return Pending((), lambda: x)


def _same(dx: torch.Tensor) -> torch.Tensor:
    """The gradient of this input stays in the stage."""
    return dx
