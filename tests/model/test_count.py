"""Counts to the unit: published figures, the modules themselves, and the products that torch really makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention as kernel
from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.config import ModelConfig, config_problems
from model.count import (
    cache_bytes_per_token,
    cache_ratio,
    cache_values_per_token,
    count_parameters,
    layer_flops,
    part_flops,
    recompute_flops_per_token,
    training_flops_per_token,
)
from model.initialize import initialize
from model.layer import TransformerLayer
from model.names import is_router_bias, module_parts
from model.ops import Ops
from model.rope import Rotary
from model.segments import ChunkContext, LayerState, SegmentedLayer
from model.transformer import Transformer, loss
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from parallel.pipeline.store import WeightGradStore
from tests.model.models import CONF, model_config, random_tokens

# Total with router biases, and active without the input embedding: the papers' sizes (V3 36.6 of "37B", V2 20.9 of
# "21B", V2-Lite 2.45 of "2.4B"; LLM counts everything), the releases' own to the unit where they have been published.
SIZES = {
    "v3": (671_026_419_200, 36_625_618_432),
    "v2": (235_741_434_880, 20_851_512_320),
    "v2_lite": (15_706_484_224, 2_451_435_008),
    "moe_16b": (16_375_728_128, 2_618_935_296),
    "llm_7b": (6_910_365_696, 6_490_935_296),
    "llm_67b": (67_425_001_472, 66_586_140_672),
    "proxy_1b": (1_051_153_984, 197_285_440),
}
MODELS = sorted(path.stem for path in Path(CONF).glob("*.yaml"))
# Small models of every kind; changes to files of conf/model.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "v3": ("tiny", {"mtp_depth": 2}),
    "no query compression": ("tiny", {"q_lora_rank": 0, "mtp_depth": 0}),
    "v2": ("demo_v2", {}),
    "llm": ("demo_llm", {}),
    "dense with MTP": ("demo_llm", {"mtp_depth": 1}),
    "gqa with experts": ("tiny", {"attention": "gqa", "num_key_value_heads": 1, "head_dim": 8, "router_bias": False}),
    "dense latent": ("tiny", {"num_routed_experts": 0, "num_layers": 2}),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_families(name: str) -> None:
    counts = count_parameters(model_config(name))
    assert (counts.total, counts.active) == SIZES[name]
    assert sum(counts.parts.values()) == counts.total and sum(counts.active_parts.values()) == counts.active


def test_v3_biases_mtp_and_defaults() -> None:
    counts = count_parameters(model_config("v3"))
    assert counts.total - counts.router_biases == 671_026_404_352
    assert counts.mtp == 11_610_068_224
    assert model_config("v3") == ModelConfig()
    # Per layer (attention 187.1M, dense MLP 396.4M, a MoE layer 11.320B) and the head.
    assert counts.active_parts["head"] == 129280 * 7168
    assert counts.parts["attention"] == 61 * 187_105_280
    assert counts.parts["routed_experts"] == 58 * 256 * 44_040_192


def test_moe_16b_active_with_its_embedding_is_what_the_paper_says() -> None:
    config = model_config("moe_16b")
    assert (count_parameters(config).active + config.vocab_size * config.hidden_size) / 1e9 == pytest.approx(
        2.83, abs=5e-3
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_modules_own(name: str, tied: bool) -> None:
    config = model_config(name, tie_embeddings=tied)
    assert config_problems(config) == []
    counts = count_parameters(config)
    sizes = {
        part.name: (part.last_row - part.first_row) * part.columns
        for parts in module_parts(Transformer(config, device="meta"), buffers=True).values()
        for part in parts
    }
    main = {part: size for part, size in sizes.items() if not part.startswith("mtp")}
    assert counts.total == sum(main.values())
    assert counts.mtp == sum(sizes.values()) - counts.total
    assert counts.router_biases == sum(size for part, size in main.items() if is_router_bias(part))

    def used(part: str) -> bool:
        expert = part.partition(".experts.")[2].partition(".")[0]
        return (part != "embed" or tied) and (not expert or int(expert) < config.experts_per_token)

    assert counts.active == sum(size for part, size in main.items() if used(part))
    # Each depth uses the head again.
    heads = config.mtp_depth * config.vocab_size * config.hidden_size
    assert counts.mtp_active == heads + sum(s for p, s in sizes.items() if p.startswith("mtp") and used(p))


# FLOPs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "mtp", "expected"),
    [(True, False, 250.4), (False, False, 281.2), (True, True, 260.6), (False, True, 291.8)],
)
def test_v3_flops_at_4k(causal: bool, mtp: bool, expected: float) -> None:
    flops = training_flops_per_token(ModelConfig(), 4096, causal, mtp)
    assert round(flops["total"] / 1e9, 1) == expected
    assert sum(flops.values()) == pytest.approx(2 * flops["total"])


def test_published_utilisation_of_v3() -> None:
    """272.8e9 tokens a day on 2048 GPUs of 989.4e12 FLOPS: 38.94 % causal, 43.73 % not."""
    per_gpu = 272.8e9 / 86400 / 2048
    for causal, published in ((True, 0.3894), (False, 0.4373)):
        used = per_gpu * training_flops_per_token(ModelConfig(), 4096, causal)["total"] / 989.4e12
        assert used == pytest.approx(published, rel=4e-3)


def test_flops_of_v2_as_printed_beside_v3() -> None:
    """155 GF causal ("Insights into DeepSeek-V3", table 2)."""
    assert round(training_flops_per_token(model_config("v2"), 4096)["total"] / 1e9) == 155


def test_flops_of_the_scaling_laws() -> None:
    """LLM section 3: M = 72 n d^2 + 12 n d T without embeddings, with an MLP of 8/3 d; 7B's is 11008 wide."""
    layers, width = 30, 4096
    flops = training_flops_per_token(model_config("llm_7b"), 4096, causal=False)
    ideal = 72 * layers * width**2 + 12 * layers * width * 4096
    wider = 18 * layers * width * (11008 - 8 / 3 * width)
    assert flops["total"] - flops["head"] == pytest.approx(ideal + wider, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_the_parts_add_up(name: str, causal: bool) -> None:
    config = model_config(name, mtp_depth=2)
    parts = part_flops(config, 4096, causal)
    layers, output = parts.layers(config), parts.output(config)
    assert len(layers) == config.num_layers and layers.count(parts.dense_layer) == config.dense_layers
    total = training_flops_per_token(config, 4096, causal, mtp=True)["total"]
    assert sum(layers) + parts.embedding + output == pytest.approx(total, rel=1e-12)
    assert output == parts.head + 2 * parts.mtp
    without = training_flops_per_token(config, 4096, causal)["total"]
    assert sum(layers) + parts.embedding + parts.head == pytest.approx(without, rel=1e-12)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family: str, mtp: bool) -> None:
    """Matrix products of the plain model's forward and backward. The plain model multiplies whole squares of scores
    (to 512 positions), so this is the non-causal count."""
    name, changes = FAMILIES[family]
    config = model_config(name, **changes)
    sequences, length, D = 2, 24, config.mtp_depth if mtp else 0
    model = Transformer(config, dtype=torch.float32)
    initialize(model, config, 0)
    ids = random_tokens(config, 1 + 2 * max(D, 1), sequences, length)
    with FlopCounterMode(display=False) as counter:
        output = model(ids[0], ids[1 : 1 + D] if D else None, rotary=Rotary(config, length))
        loss(
            output, ids[0], ids[1 : 1 + D] if D else None, main_count=1, mtp_counts=(1,) * D, sequences=1,
            mtp_weight=0.3, balance_weights=BalanceWeights(sequence=1e-3),
        ).total.backward()  # fmt: skip
    expected = training_flops_per_token(config, length, causal=False, mtp=mtp)["total"]
    assert counter.get_total_flops() == round(expected * sequences * length)


class Drop:
    """A gradient sink that keeps nothing."""

    def accumulate(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("family", "moe"),
    [
        (f, moe)
        for f, (name, changes) in FAMILIES.items()
        for moe in (False, True)[: 1 + model_config(name, **changes).has_experts]
    ],
)
def test_recomputed_flops_are_those_of_the_chunk_programs(
    family: str, moe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer's forward and backward programs multiply, above the training count: the up-projections and, in
    attention's backward, the scores. Attention's definition stands in for the kernel, whose products torch does not
    count."""
    name, changes = FAMILIES[family]
    config = model_config(name, **changes)
    monkeypatch.setattr(kernel, "attention", kernel.attention_reference)
    monkeypatch.setattr(kernel, "attention_backward", kernel.attention_backward_reference)
    length, store = 24, WeightGradStore(Drop())
    layer = TransformerLayer(config, moe, dtype=torch.float32)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0.0, 0.1)
    ops = Ops(store, torch.float32, False, 1e-6)
    segmented = SegmentedLayer(
        layer, "layers.0", ops, AllToAllDispatcher(config.num_routed_experts, None) if moe else None
    )
    rotary = Rotary(config, length)
    cos, sin = rotary.tables(torch.arange(length))
    geometry = Geometry(1, length, cos, sin, rotary.softmax_scale)
    context = ChunkContext(geometry, torch.ones(length, dtype=torch.bool), BalanceWeights(sequence=1e-3))
    state, x = LayerState(), torch.randn(length, config.hidden_size)

    def drain(program):  # type: ignore[no-untyped-def]
        while True:
            try:
                next(program)
            except StopIteration as stop:
                return stop.value

    with FlopCounterMode(display=False) as counter:
        y = drain(segmented.forward(Pending((), lambda: x), context, state)).wait()
        drain(segmented.backward(segmented.enter(torch.ones_like(y)), state, store.run, lambda dx: dx))
    again = recompute_flops_per_token(config, length, causal=False)
    per_layer = sum(layer_flops(config, moe, length, causal=False).values()) + again["total"] / config.num_layers
    assert counter.get_total_flops() == round(per_layer * length)


def test_recomputation_of_v3() -> None:
    """Per layer 2 * (24576 * 1536 + 32768 * 512) for the up-projections; off, only the scores are left."""
    v3 = ModelConfig()
    found = recompute_flops_per_token(v3, 4096)
    assert found["attention_up_projections"] == 61 * 2 * (24576 * 1536 + 32768 * 512)
    assert found["attention_scores"] == 61 * 128 * 192 * 4096
    off = recompute_flops_per_token(v3, 4096, recompute=False)
    assert off["attention_up_projections"] == 0 and off["total"] == found["attention_scores"]
    assert recompute_flops_per_token(v3, 4096, mtp=True)["total"] == pytest.approx(found["total"] * 62 / 61)
    assert recompute_flops_per_token(v3, 4096, causal=False)["attention_scores"] == 2 * found["attention_scores"]


# Cache ----------------------------------------------------------------------------------------------------------------


def test_cache_sizes() -> None:
    v3, v2, llm = model_config("v3"), model_config("v2"), model_config("llm_67b")
    assert cache_bytes_per_token(v3) == 70_272
    assert cache_values_per_token(v2) == 34_560 and cache_values_per_token(llm) == 194_560
    assert 1 - cache_ratio(v2, llm) == pytest.approx(0.822, abs=5e-4)
    # V2's 93.3 % less, with 6 bits for each number against 16.
    assert 1 - cache_ratio(v2, llm) * 6 / 16 == pytest.approx(0.933, abs=5e-4)
    # Table 9: 15.6K against 110.6K (16B) for 27 layers of latent against multi-head attention of width 2048.
    assert cache_values_per_token(model_config("v2_lite")) == 15_552
    mha = model_config("moe_16b", num_layers=27)
    assert cache_values_per_token(mha) == 110_592


def test_config_problems_name_key_found_and_allowed() -> None:
    changes = {"num_expert_groups": 3, "qk_rope_head_dim": 7, "first_dense_layers": 9, "groups_per_token": 4}
    problems = config_problems(model_config("tiny", **changes))
    assert [problem.split(":")[0] for problem in problems] == [
        "model.qk_rope_head_dim", "model.first_dense_layers", "model.num_expert_groups", "model.groups_per_token"
    ]  # fmt: skip
    assert config_problems(model_config("tiny", hidden_size=0)) == ["model.hidden_size: found 0, must be above 0"]
    assert "at most 4" in config_problems(model_config("tiny", experts_per_token=5))[0]
    endless = {"rope_theta": float("nan"), "routed_scaling_factor": float("inf")}
    assert config_problems(model_config("tiny", **endless)) == [
        "model.routed_scaling_factor: found inf, must be finite", "model.rope_theta: found nan, must be finite"
    ]  # fmt: skip
    scaling = {"factor": float("inf"), "mscale": float("nan")}
    assert len(config_problems(model_config("tiny", rope_scaling=scaling))) == 2
