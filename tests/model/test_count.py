"""Counts to the unit, against the published figures and against the modules themselves."""

from __future__ import annotations

import pytest

from model.config import ModelConfig, config_problems
from model.count import cache_bytes_per_token, count_parameters, part_flops, training_flops_per_token
from model.names import is_router_bias, module_parts
from model.transformer import Transformer
from tests.model.models import model_config


def test_v3() -> None:
    counts = count_parameters(model_config("v3"))
    assert counts.total == 671_026_419_200
    assert counts.total - counts.router_biases == 671_026_404_352
    assert counts.active == 36_625_618_432
    assert counts.mtp == 11_610_068_224
    assert cache_bytes_per_token(model_config("v3")) == 70_272
    assert model_config("v3") == ModelConfig()


@pytest.mark.parametrize(
    ("causal", "mtp", "expected"),
    [(True, False, 250.4), (False, False, 281.2), (True, True, 260.6), (False, True, 291.8)],
)
def test_v3_flops_at_4k(causal: bool, mtp: bool, expected: float) -> None:
    flops = training_flops_per_token(ModelConfig(), 4096, causal, mtp)
    assert round(flops["total"] / 1e9, 1) == expected
    assert sum(flops.values()) == pytest.approx(2 * flops["total"])


def test_v2_without_router_biases() -> None:
    v2 = ModelConfig(
        vocab_size=102400, hidden_size=5120, num_layers=60, first_dense_layers=1, intermediate_size=12288,
        moe_intermediate_size=1536, num_routed_experts=160, num_shared_experts=2, experts_per_token=6,
        groups_per_token=3, mtp_depth=0,
    )  # fmt: skip
    counts = count_parameters(v2)
    assert counts.total - counts.router_biases == 235_741_434_880
    lite = ModelConfig(
        vocab_size=102400, hidden_size=2048, num_layers=27, first_dense_layers=1, num_heads=16, q_lora_rank=0,
        intermediate_size=10944, moe_intermediate_size=1408, num_routed_experts=64, num_shared_experts=2,
        experts_per_token=6, num_expert_groups=1, groups_per_token=1, mtp_depth=0,
    )  # fmt: skip
    counts = count_parameters(lite)
    assert counts.total - counts.router_biases == 15_706_484_224


@pytest.mark.parametrize("name", ["tiny", "demo", "v3"])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_the_parts_add_up(name: str, causal: bool) -> None:
    config = model_config(name, mtp_depth=2)
    parts = part_flops(config, 4096, causal)
    layers, output = parts.layers(config), parts.output(config)
    assert len(layers) == config.num_layers and layers.count(parts.dense_layer) == config.first_dense_layers
    total = training_flops_per_token(config, 4096, causal, mtp=True)["total"]
    assert sum(layers) + parts.embedding + output == pytest.approx(total, rel=1e-12)
    assert output == parts.head + 2 * parts.mtp
    without = training_flops_per_token(config, 4096, causal)["total"]
    assert sum(layers) + parts.embedding + parts.head == pytest.approx(without, rel=1e-12)


@pytest.mark.parametrize("name", ["tiny", "demo", "v3"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_the_modules_own(name: str, tied: bool) -> None:
    config = model_config(name, tie_embeddings=tied)
    assert config_problems(config) == []
    counts = count_parameters(config)
    sizes = {
        part.name: (part.last_row - part.first_row) * part.columns
        for parts in module_parts(Transformer(config, device="meta"), buffers=True).values()
        for part in parts
    }
    assert counts.total == sum(size for part, size in sizes.items() if not part.startswith("mtp"))
    assert counts.mtp == sum(size for part, size in sizes.items() if part.startswith("mtp"))
    assert counts.router_biases == sum(
        size for part, size in sizes.items() if is_router_bias(part) and not part.startswith("mtp")
    )


def test_config_problems_name_key_found_and_allowed() -> None:
    changes = {"num_expert_groups": 3, "qk_rope_head_dim": 7, "first_dense_layers": 9, "groups_per_token": 4}
    problems = config_problems(model_config("tiny", **changes))
    assert [problem.split(":")[0] for problem in problems] == [
        "model.qk_rope_head_dim", "model.first_dense_layers", "model.num_expert_groups", "model.groups_per_token"
    ]  # fmt: skip
    assert config_problems(model_config("tiny", hidden_size=0)) == ["model.hidden_size: found 0, must be above 0"]
    assert "at most 4" in config_problems(model_config("tiny", experts_per_token=5))[0]
