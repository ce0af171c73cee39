"""The ledger's formulas against what the code really keeps, holds and sends."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.ledger.caches import stage_after_forward, stage_after_input_gradient
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents
from launch.ledger.load import Load
from model.config import ModelConfig
from model.latent_attention import Geometry
from model.layer import TransformerLayer
from model.mtp import MultiTokenPrediction
from model.ops import Ops
from model.rope import Rotary
from model.segments import ChunkContext, SegmentedLayer
from model.stage import Chunk, Depth, LossScales, Output, TransformerStage
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from parallel.pipeline.store import WeightGradStore
from tests.model.models import model_config

WIDE = {
    "hidden_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_heads": 4,
    "intermediate_size": 144,
    "moe_intermediate_size": 48,
    "vocab_size": 272,
}


class Live(TorchDispatchMode):
    """Bytes of every storage made while on and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.nbytes() and storage._cdata not in given:
                    ref = StorageWeakRef(storage)
                    self.made[ref.cdata] = (ref, storage.nbytes())
        return out

    def bytes(self) -> int:
        gc.collect()
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())


class Drop:
    """A gradient sink that keeps nothing."""

    def accumulate(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        pass


SEQUENCES, LENGTH = 2, 72


def build(config: ModelConfig, contents: Contents, fp8: bool) -> TransformerStage:
    torch.manual_seed(3)
    ops = Ops(WeightGradStore(Drop()), torch.bfloat16, fp8, config.rms_norm_eps)
    dispatcher = AllToAllDispatcher(config.num_routed_experts, None)

    def filled(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for value in module.parameters():
                value.normal_(0.0, 0.05)
        return module

    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16) * 0.05)

    def layer(moe: bool) -> TransformerLayer:
        return filled(TransformerLayer(config, moe, dtype=torch.bfloat16))  # type: ignore[return-value]

    layers = [
        SegmentedLayer(layer(i >= contents.dense), f"layers.{i}", ops, dispatcher)
        for i in range(contents.dense + contents.moe)
    ]
    V, d = config.vocab_size, config.hidden_size
    output = None
    if contents.head:
        depths = []
        for k in range(contents.mtp):
            module = filled(MultiTokenPrediction(config, dtype=torch.bfloat16))
            depths.append(Depth(module, SegmentedLayer(module.layer, f"mtp.{k}.layer", ops, dispatcher)))
        output = Output(parameter(d), parameter(V, d), depths)
    embed = parameter(V, d) if contents.embed or contents.head else None
    stage = TransformerStage((0, 0), ops, layers, embed, contents.embed, output, d)
    tokens = SEQUENCES * LENGTH
    rotary = Rotary(config, LENGTH)
    cos, sin = rotary.tables(torch.arange(LENGTH), torch.bfloat16)
    context = ChunkContext(
        Geometry(SEQUENCES, LENGTH, cos, sin, rotary.softmax_scale), torch.ones(tokens, dtype=torch.bool), 1e-4
    )
    ids = torch.randint(V, (2 + 2 * contents.mtp, tokens))
    depths_ids = ids[2:].view(2, contents.mtp, tokens)
    chunk = Chunk(context, ids[0], ids[1], depths_ids[0], depths_ids[1], torch.zeros(SEQUENCES, dtype=torch.int64))
    stage.begin_step([chunk] * 3, LossScales(1e-3, (1e-3,) * contents.mtp))
    return stage


def drain(program):  # type: ignore[no-untyped-def]
    while True:
        try:
            next(program)
        except StopIteration as stop:
            return stop.value


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def forward(stage: TransformerStage, chunk: int) -> None:
    # Made here, so that it counts: what enters a stage is what its first layer keeps.
    x = None if stage.first else torch.randn(stage.boundary_shape(chunk)).to(torch.bfloat16)
    drain(stage.forward_program(chunk, None if x is None else Pending((), partial(same, x))))


def input_gradient(stage: TransformerStage, chunk: int) -> None:
    dy = None if stage.output else torch.randn(stage.output_shape(chunk)).to(torch.bfloat16)
    drain(stage.backward_program(chunk, None if dy is None else Pending((), partial(same, dy)), True, lambda dx: None))


def measured(config: ModelConfig, contents: Contents, fp8: bool) -> tuple[int, int, int, Load]:
    """Bytes after F, after I and after W; and the load that the router really made."""
    stage = build(config, contents, fp8)
    forward(stage, 0)  # the first use of a weight quantises it
    input_gradient(stage, 0)
    stage.ops.store.run_oldest((0, 0, 0))
    segmented = [*stage.layers, *([depth.layer for depth in stage.output.depths] if stage.output else [])]
    for each in segmented:
        each.new_step()
    stage.losses.clear()
    gc.collect()
    with Live() as live:
        forward(stage, 1)
        after_forward = live.bytes()
        input_gradient(stage, 1)
        after_input = live.bytes()
        stage.ops.store.run_oldest((0, 0, 1))
        after_weights = live.bytes()
    counts = next((tuple(each.load_E.tolist()) for each in segmented if each.load_E is not None), (0,))
    return after_forward, after_input, after_weights, Load(SEQUENCES, LENGTH, SEQUENCES * LENGTH, counts)


STAGES = {
    "dense": Contents(0, 1, 1, 0, 0, False, False),
    "moe": Contents(1, 2, 0, 1, 0, False, False),
    "first": Contents(0, 1, 1, 0, 0, True, False),
    "head": Contents(0, 1, 1, 0, 0, False, True),
    "head and MTP": Contents(1, 3, 0, 2, 1, False, True),
}
CONFIGS = {
    "as V3": {},
    "queries not compressed": {"q_lora_rank": 0},
    "two shared experts": {"num_shared_experts": 2},
}


@pytest.mark.parametrize("caches", ["fp8", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("changes", CONFIGS)
def test_cached_bytes_are_those_of_the_code(stage: str, changes: str, caches: str) -> None:
    config = model_config("tiny", **(WIDE | CONFIGS[changes]))
    after_forward, after_input, after_weights, load = measured(config, STAGES[stage], caches == "fp8")
    choices = Choices(caches=caches)
    # Losses and balance losses stay for the step: a few bytes, not the chunk's.
    few = after_weights
    assert few <= 64
    expected = sum(stage_after_forward(config, STAGES[stage], load, choices).values())
    assert after_forward - few == expected
    queued = sum(stage_after_input_gradient(config, STAGES[stage], load, choices).values())
    assert after_input - few == queued
