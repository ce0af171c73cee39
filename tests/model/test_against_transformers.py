"""The models of conf/model, exported and opened by transformers; what config.json says of the released ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.huggingface import export_model
from model.names import canonical_tensors
from model.released_config import released_config
from model.rope import Rotary
from model.transformer import Transformer
from tests.model.compared import (
    BOUND,
    assert_saved_again_bit_for_bit,
    compare_with_transformers,
    gradients,
    my_logits,
    worst_gradient,
)
from tests.model.models import model_config, random_model, random_tokens
from tests.model.transformers_oracle import built_by_hand, copy_into, opened, their_gradients, their_logits

DEMOS = ("demo", "demo_v2", "demo_llm")


def export(folder: Path, config: ModelConfig, model: Transformer, length: int, dtype: torch.dtype) -> Path:
    export_model(folder, config, canonical_tensors(model).__getitem__, length=length, dtype=dtype, shard_bytes=100_000)
    return folder


@pytest.mark.parametrize("length", [128, 1024], ids=["plain", "yarn"])
def test_the_smallest_model_in_float64(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with_transformers(model_config("tiny", mtp_depth=2), length, tmp_path, monkeypatch)


@pytest.mark.parametrize("length", [128, 1024], ids=["plain", "yarn"])
@pytest.mark.parametrize("name", DEMOS)
def test_logits_of_the_demo_models_in_float32(tmp_path: Path, name: str, length: int) -> None:
    config = model_config(name)
    model = random_model(config, torch.float32)
    theirs = opened(export(tmp_path / "out", config, model, length, torch.float32), torch.float32)
    tokens_BT = random_tokens(config, 1, 100)
    with torch.no_grad():
        difference = model(tokens_BT, rotary=Rotary(config, length)).logits_BTV - theirs(tokens_BT).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", DEMOS)
def test_bfloat16_weights_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = model_config(name, vocab_size=200, num_layers=2, first_dense_layers=2 if name == "demo_llm" else 1)
    model = random_model(config, torch.bfloat16)
    theirs = opened(export(tmp_path / "out", config, model, 128, torch.bfloat16), torch.bfloat16)
    assert_saved_again_bit_for_bit(tmp_path / "again", config, theirs, canonical_tensors(model))


@pytest.mark.parametrize("length", [128, 1024], ids=["plain", "yarn"])
def test_half_split_rope_in_latent_attention(length: int) -> None:
    """No released model has it, and no folder of ours says it; transformers' V3 computes it."""
    config = model_config("tiny", rope_interleaved=False, mtp_depth=0, num_layers=2)
    model = random_model(config, torch.float64)
    theirs = built_by_hand(config, length)
    copy_into(config, canonical_tensors(model), theirs)
    tokens_BT = random_tokens(config, 2, 24)
    (mine,), (their,) = my_logits(model, tokens_BT, None, length), their_logits(theirs, None, tokens_BT, None)
    assert (mine - their).abs().max() < BOUND
    probe = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (mine * probe).sum().backward()
    (their * probe).sum().backward()
    worst_gradient(gradients(model), their_gradients(config, theirs))
    interleaved = Transformer(model_config("tiny", mtp_depth=0, num_layers=2), torch.float64)
    interleaved.load_state_dict(model.state_dict())
    assert (my_logits(interleaved, tokens_BT, None, length)[0] - mine).abs().max() > 1e-3


def test_plain_and_yarn_differ() -> None:
    config = model_config("tiny")
    model = random_model(config, torch.float64)
    tokens_BT = random_tokens(config, 1, 40)
    plain, yarn = (model(tokens_BT, rotary=Rotary(config, length)).logits_BTV for length in (128, 129))
    assert (plain - yarn).abs().max() > 1e-3


YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
V2: dict[str, Any] = LATENT | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}
RELEASED: dict[str, dict[str, Any]] = {
    "v3": LATENT
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
        "num_nextn_predict_layers": 1,
    },
    "v2": V2
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "v2_lite": V2
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_config_json_says_what_the_released_ones_say(name: str) -> None:
    values = released_config(model_config(name), 163840, "bfloat16", 0, 1)
    assert {key: values.get(key, "missing") for key in RELEASED[name]} == RELEASED[name]
    at_4k = released_config(model_config(name), 4096, "bfloat16", 0, 1)
    assert at_4k["rope_scaling"] is None and at_4k["max_position_embeddings"] == 4096
