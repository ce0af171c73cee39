"""The ledger's formulas against what the code really keeps, holds and sends."""

from __future__ import annotations

import gc
import json
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.ledger.__main__ import main
from launch.ledger.caches import stage_after_forward, stage_after_input_gradient
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents, stage_contents
from launch.ledger.load import Load, ranks_per_token
from launch.ledger.state import held_state, rank_buckets
from launch.ledger.timeline import QUEUED, walk
from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.count import count_parameters
from model.layer import TransformerLayer
from model.mtp import MultiTokenPrediction
from model.ops import Ops
from model.partition import RankModel, stage_layout
from model.precision import in_fp8
from model.rope import Rotary
from model.segments import ChunkContext, SegmentedLayer
from model.stage import Chunk, Depth, LossScales, Output, TransformerStage
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from parallel.expert.layout import send_layout
from parallel.optimizer.bucket import Bucket
from parallel.optimizer.contract import ParameterSpec
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.checker import check
from parallel.schedule.registry import build as build_table
from parallel.schedule.simulator import simulate
from parallel.topology import Topology
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


ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, LENGTH = 2, 72


def build(config: ModelConfig, contents: Contents, fp8: bool, recompute: bool = True) -> TransformerStage:
    torch.manual_seed(3)
    ops = Ops(WeightGradStore(Drop()), torch.bfloat16, fp8, config.rms_norm_eps, recompute)
    dispatcher = AllToAllDispatcher(config.num_routed_experts, None) if config.has_experts else None

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
        Geometry(SEQUENCES, LENGTH, cos, sin, rotary.softmax_scale),
        torch.ones(tokens, dtype=torch.bool),
        BalanceWeights(sequence=1e-4),
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


def measured(config: ModelConfig, contents: Contents, fp8: bool, recompute: bool = True) -> tuple[int, int, int, Load]:
    """Bytes after F, after I and after W; and the load that the router really made."""
    stage = build(config, contents, fp8, recompute)
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
    return after_forward, after_input, after_weights, Load(SEQUENCES, LENGTH, SEQUENCES * LENGTH, counts, alone=True)


STAGES = {
    "dense": Contents(0, 1, 1, 0, 0, False, False),
    "moe": Contents(1, 2, 0, 1, 0, False, False),
    "first": Contents(0, 1, 1, 0, 0, True, False),
    "head": Contents(0, 1, 1, 0, 0, False, True),
    "head and MTP": Contents(1, 3, 0, 2, 1, False, True),
}
DENSE_MTP = {"dense head and MTP": Contents(1, 2, 1, 0, 1, False, True)}
GROUPED = {"attention": "gqa", "num_key_value_heads": 2, "head_dim": 32}
SOFTMAX = {"score_function": "softmax", "group_rule": "max", "router_bias": False}
# Changes, and the stages that they are tried in.
CONFIGS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "as V3": ({}, tuple(STAGES)),
    "queries not compressed": ({"q_lora_rank": 0}, tuple(STAGES)),
    "two shared experts": ({"num_shared_experts": 2}, tuple(STAGES)),
    "grouped keys": (GROUPED, ("dense", "moe", "head and MTP")),
    "multi-head": (GROUPED | {"num_key_value_heads": 4}, ("dense", "moe")),
    "as V2": (SOFTMAX | {"renormalise": False}, ("moe", "head and MTP")),
    "softmax, renormalised": (SOFTMAX, ("moe",)),
    "as LLM": (GROUPED | {"num_routed_experts": 0}, ("dense", "first", "head", *DENSE_MTP)),
}


@pytest.mark.parametrize("caches", ["fp8", "bf16"])
@pytest.mark.parametrize(("changes", "stage"), [(c, s) for c, (_, stages) in CONFIGS.items() for s in stages])
def test_cached_bytes_are_those_of_the_code(changes: str, stage: str, caches: str) -> None:
    config, contents = model_config("tiny", **(WIDE | CONFIGS[changes][0])), (STAGES | DENSE_MTP)[stage]
    after_forward, after_input, after_weights, load = measured(config, contents, caches == "fp8")
    choices = Choices(caches=caches)
    # Losses and balance losses stay for the step: a few bytes, not the chunk's.
    few = after_weights
    assert few <= 64
    expected = sum(stage_after_forward(config, contents, load, choices).values())
    assert after_forward - few == expected
    queued = sum(stage_after_input_gradient(config, contents, load, choices).values())
    assert after_input - few == queued


@pytest.mark.parametrize("caches", ["fp8", "bf16"])
@pytest.mark.parametrize("changes", ["as V3", "queries not compressed", "grouped keys"])
@pytest.mark.parametrize("stage", ["dense", "moe", "head and MTP"])
def test_cached_bytes_without_recomputation(changes: str, stage: str, caches: str) -> None:
    config, contents = model_config("tiny", **(WIDE | CONFIGS[changes][0])), STAGES[stage]
    after_forward, after_input, few, load = measured(config, contents, caches == "fp8", recompute=False)
    choices = Choices(caches=caches, recompute="off")
    assert after_forward - few == sum(stage_after_forward(config, contents, load, choices).values())
    assert after_input - few == sum(stage_after_input_gradient(config, contents, load, choices).values())


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 5, 11])
@pytest.mark.parametrize(
    ("changes", "expert"),
    [
        ({}, 2),
        ({"tie_embeddings": True}, 2),
        (GROUPED | SOFTMAX | {"renormalise": False, "mtp_depth": 0}, 2),
        (GROUPED | {"num_routed_experts": 0}, 1),
    ],
)
def test_held_state_is_that_of_real_buckets(rank: int, changes: dict[str, object], expert: int) -> None:
    config = model_config("tiny", **(WIDE | changes))
    topology = Topology(data=4 // expert, pipeline=4, expert=expert, rank=rank)
    table = build_table("dualpipe", 4, 8)
    layout = stage_layout(config, table, "")
    specs = RankModel(config, topology, table, layout, torch.bfloat16).specs()
    grouped: dict[str, list[ParameterSpec]] = {}
    for spec in specs:
        grouped.setdefault(spec.bucket, []).append(spec)
    real = [Bucket(members, rank, None, torch.float32, torch.bfloat16, torch.float32) for members in grouped.values()]
    contents = stage_contents(config, layout)
    buckets = rank_buckets(config, contents, table, topology.pipeline_rank, expert, topology.data)
    assert {b.name: (b.elements, b.owners, b.piece()) for b in buckets} == {
        b.name: (sum(s.parameter.numel() for s in b.specs), b.owners, b.piece) for b in real
    }
    ops = Ops(WeightGradStore(Drop()), torch.bfloat16, True, 1e-6)
    fp8 = [s.parameter for s in specs if in_fp8(s.parts[0].name)]
    copies = [ops.weight(parameter) for parameter in fp8]
    assert held_state(buckets, Choices()) == {
        "BF16 weights": sum(s.parameter.nbytes for s in specs),
        "FP8 weights": sum(q.data.nbytes + q.scale.nbytes for q in copies),  # type: ignore[union-attr]
        "gradient accumulators": sum(b.gradients.nbytes + (b.reduced.nbytes if b.owners > 1 else 0) for b in real),
        "FP32 masters": sum(b.master.nbytes for b in real),
        "BF16 moments": sum(b.exp_avg.nbytes + b.exp_avg_sq.nbytes for b in real),
    }


def test_v3_parameters_over_all_ranks() -> None:
    """Every tensor once: 671,026,419,200 without MTP, less the router biases, which no bucket holds."""
    config = model_config("v3")
    table = build_table("dualpipe", 16, 32)
    contents = stage_contents(config, stage_layout(config, table, ""))
    every: dict[str, int] = {}
    for rank in range(16):
        for bucket in rank_buckets(config, contents, table, rank, expert=1, data=1):
            every |= {name: prod(shape) for name, shape in bucket.tensors}
    counted = count_parameters(config)
    assert counted.total == 671_026_419_200
    main = sum(size for name, size in every.items() if not name.startswith("mtp."))
    assert main == counted.total - counted.router_biases == 671_026_404_352
    assert sum(every.values()) - main == counted.mtp - config.num_routed_experts


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
def test_expected_ranks_of_a_token(ranks: int) -> None:
    """Against routes drawn at random."""
    config = model_config("v3")
    tokens, E, G = 4096, config.num_routed_experts, config.num_expert_groups
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(tokens, G, generator=generator).topk(config.groups_per_token).indices
    allowed = torch.zeros(tokens, G).scatter_(1, groups, 1.0).repeat_interleave(E // G, 1)
    index = (torch.rand(tokens, E, generator=generator) * allowed).topk(config.experts_per_token).indices
    sent = send_layout(index, E // ranks, ranks).rank_hit_RT.sum().item()
    assert sent / tokens == pytest.approx(ranks_per_token(config, ranks), rel=5e-3)


# Timeline -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p", "1f1b", "dualpipev"])
def test_chunks_are_those_of_the_checker(schedule: str) -> None:
    table = build_table(schedule, 4, 12)
    simulation, report = simulate(table), check(table)
    for rank in range(table.ranks):
        situations = [moment.situation for moment in walk(simulation, rank)]
        assert max(sum(count for _, count in s.held) for s in situations) == report.peak_chunks[rank]
        queue = [sum(count for (_, state), count in s.held if state == QUEUED) for s in situations]
        assert max(queue) == report.queue_depth[rank]
        # At the end only what the last action itself held is left.
        assert sum(count for _, count in situations[-1].held) == 1


def test_boundaries_by_hand() -> None:
    """GPipe, two ranks, two chunks: F0 send F1 (send, receive) B0 receive B1, and F0 F1 B0 send B1 send."""
    simulation = simulate(build_table("gpipe", 2, 2))
    found = [[moment.situation.boundaries for moment in walk(simulation, rank)] for rank in (0, 1)]
    assert found == [[0, 1, 2, 1], [0, 0, 0, 1]]


# Command ------------------------------------------------------------------------------------------------------------

V3 = ["model=v3", "pipeline=16", "expert=64", "ranks=2048", "micro_batches=24,30,60,120"]


@pytest.mark.parametrize(
    ("model", "expert", "parameters"),
    [
        ("v2", 8, 235_741_434_880),
        ("v2_lite", 8, 15_706_484_224),
        ("moe_16b", 8, 16_375_728_128),
        ("llm_67b", 1, 67_425_001_472),
    ],
)
def test_every_family_has_a_ledger(
    model: str, expert: int, parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parameters are on some rank: experts on `expert` of them, and all but the embedding and head twice."""
    arguments = [
        f"model={model}",
        "pipeline=4",
        f"expert={expert}",
        f"ranks={16 * expert}",
        "micro_batches=8",
        "budget=1e12",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["parameters"] == parameters
    assert ("dense, after F" in printed) and (("MoE, after F" in printed) == (expert > 1))
    assert ("rows dispatched here" in printed) == (expert > 1)
    config = model_config(model)
    table = build_table("dualpipe", 4, 8)
    layout = stage_layout(config, table, "")
    for found in last["classes"]:
        for rank in found["ranks"]:
            real = RankModel(config, Topology(4, 4, expert, rank * expert), table, layout, torch.bfloat16, "meta")
            assert sum(p.numel() for p in real.parameters()) == found["parameters"]


@pytest.mark.slow
def test_the_document_holds_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*V3, f"out={tmp_path}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    document = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for line in (tmp_path / "memory_tables.md").read_text(encoding="utf-8").splitlines():
        assert line in document, line
    assert last["largest"] == max(p["total"] for c in last["classes"] for p in c["peaks"].values())
    assert last["largest"] > last["budget"] >= last["largest_remedied"] and not last["fits"]
    # The remedy given as choices fits, by itself.
    assert main([*V3, *last["remedy"]]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["fits"] and again["largest"] == last["largest_remedied"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (V3[1:], "model missing"),
        ([*V3, "model=v3"], "given twice"),
        ([*V3, "colour=red"], "must be KEY=VALUE"),
        ([*V3, "model.num_layer=3"], "did you mean model.num_layers?"),
        (["model=llm_67b", *V3[1:]], "must divide the model's 0 experts"),
        (["model=v9", *V3[1:]], "unknown; allowed: demo, demo_llm, demo_v2, llm_67b"),
        ([*V3[:3], "ranks=2000", V3[4]], "multiple of pipeline x expert = 1024"),
        ([*V3[:4], "micro_batches=25"], "must be an even number"),
        ([*V3, "caches=int4"], "allowed: fp8, bf16"),
        ([*V3, "caches=bf16", "weights=fp8"], "needs caches=fp8"),
        ([*V3, "layout=Et|tL"], "allowed 16"),
        ([*V3, "length=1.5"], "whole number"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
