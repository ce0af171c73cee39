"""A layer run forward and backward, and what it sent and kept meanwhile: counted for `benchmarks/fp8_bytes.py`.

Shape letters: N tokens of a rank, d hidden.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.processes import M_MMAP_THRESHOLD, Report, gathered
from kernels.observe import Operand
from kernels.quantize import Quantized
from launch.ledger.load import Load
from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.layer import TransformerLayer
from model.ops import Ops
from model.precision import in_fp8
from model.rope import Rotary
from model.segments import ChunkContext, LayerState, SegmentedLayer
from parallel.device import HostDevice, Ticket
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from parallel.pipeline.store import WeightGradStore

DENSE, MOE = "dense", "moe"
PRECISIONS = ("bf16", "fp8")
SETTLE_SECONDS = 0.1
MOVEMENTS = ("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")
T = TypeVar("T")


class Alive(TorchDispatchMode):
    """The storages made while on and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.nbytes() and storage._cdata not in given:
                    ref = StorageWeakRef(storage)
                    self._made[ref.cdata] = (ref, storage.nbytes())
        return out

    def sizes(self) -> dict[int, int]:
        """Bytes of each, by a number that is its own while it lives; counted once they have stopped falling, since a
        thread of gloo may hold what it sent for a moment after the transfer was waited for."""
        gc.collect()
        before = -1
        while before != len(self._made):
            before = len(self._made)
            time.sleep(SETTLE_SECONDS)
            self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return {key: size for key, (_, size) in self._made.items()}


class Wire(HostDevice):
    """A host that notes what is handed to the all-to-all. sent: (rows, bytes) by the program step that runs."""

    def __init__(self) -> None:
        self.step = ""
        self.sent: dict[str, tuple[int, int]] = {}

    def all_to_all(
        self, out: torch.Tensor, sent: torch.Tensor, take: list[int], give: list[int], group: dist.ProcessGroup
    ) -> Ticket:
        rows, size = self.sent.get(self.step, (0, 0))
        self.sent[self.step] = rows + len(sent), size + sent.nbytes
        return super().all_to_all(out, sent, take, give, group)

    def follow(self, program: Generator[str, None, T]) -> T:
        """Run a program to its end; what it returns."""
        while True:
            try:
                self.step = next(program)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]


class CodesOnly(Ops):
    """FP8 weights without the FP32 copy that a CPU remembers of them."""

    def weight(self, parameter: torch.nn.Parameter) -> Operand:
        found = super().weight(parameter)
        return replace(found, memo=None) if isinstance(found, Quantized) else found


class Drop:
    """A gradient sink that keeps nothing."""

    def accumulate(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        pass


@dataclass(frozen=True)
class Counted:
    """kept: bytes of every storage that waits for the backward. stays: bytes that outlive the chunk. sent: rows and
    bytes of each movement. load: what the router made of the tokens."""

    kept: list[int]
    stays: int
    sent: dict[str, tuple[int, int]]
    load: Load


def filled(layer: TransformerLayer) -> TransformerLayer:
    """Numbers that repeat after a while: a normal draw for each of V3's weights would take longer than the rest."""
    noise = (torch.randn(1_000_003) * 0.02).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            for piece in parameter.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
        for bias in layer.buffers():
            bias.zero_()
    return layer


def count(layer: TransformerLayer, group: dist.ProcessGroup | None, tokens: int, fp8: bool) -> Counted:
    """Forward of one sequence of `tokens`; backward too where something is sent in it. The weight gradients are dropped
    uncomputed: nothing here counts them."""
    config, wire = layer.config, Wire()
    ops = CodesOnly(WeightGradStore(Drop()), torch.bfloat16, fp8, config.rms_norm_eps)
    if fp8:
        for name, parameter in layer.named_parameters():
            if in_fp8(name):
                ops.weight(parameter)
    dispatcher = AllToAllDispatcher(config.num_routed_experts, group, wire) if layer.moe else None
    segmented = SegmentedLayer(layer, "layer", ops, dispatcher)
    rotary = Rotary(config, tokens)
    cos, sin = rotary.tables(torch.arange(tokens), torch.bfloat16)
    geometry = Geometry(1, tokens, cos, sin, rotary.softmax_scale)
    context = ChunkContext(geometry, torch.ones(tokens, dtype=torch.bool), BalanceWeights(sequence=1e-4))
    state, load = LayerState(), Load(1, tokens, 0, ())

    def arriving() -> torch.Tensor:
        return torch.randn(tokens, config.hidden_size).to(torch.bfloat16)

    with Alive() as alive:
        # Made here, so that it counts: what enters a layer is what its first norm keeps.
        wire.follow(segmented.forward(Pending((), arriving), context, state)).wait()
        after_forward = alive.sizes()
        if layer.moe:
            load = Load(1, tokens, sum(state.route.give), tuple(state.route.expert_counts))
            entering = segmented.enter(arriving())
            wire.follow(segmented.backward(entering, state, lambda bag: None, lambda dx: None))
            del entering
        del state
        left = alive.sizes()
    kept = [size for key, size in after_forward.items() if key not in left]
    return Counted(kept, sum(left.values()), {step: wire.sent[step] for step in MOVEMENTS if step in wire.sent}, load)


def body(rank: int, size: int, report: Report, kind: str, config: ModelConfig, tokens: int) -> None:
    """Reports (kind, precision, what each rank counted) for each precision, on the same weights and routes."""
    # Large temporaries are given back, for two ranks of V3's widths to fit side by side.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    torch.manual_seed(0)
    local = config.num_routed_experts // size
    held = (rank * local, (rank + 1) * local)
    layer = filled(TransformerLayer(config, kind == MOE, held, torch.bfloat16))
    for precision in PRECISIONS:
        torch.manual_seed(1 + rank)
        found = gathered(count(layer, dist.group.WORLD, tokens, precision == "fp8"), size)
        if rank == 0:
            report((kind, precision, found))
