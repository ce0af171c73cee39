"""Small random models of every family, drawn by hypothesis.

Each number is drawn on its own from a generator that hypothesis seeds: its own draws repeat parts of earlier examples,
and a dozen of them leave much untried.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st

from model.config import ModelConfig, RopeScaling, config_problems

ORIGINAL_LENGTH = 128
PLAIN, EXTENDED = ORIGINAL_LENGTH, 8 * ORIGINAL_LENGTH
LATENT: dict[str, Any] = {"attention": "mla", "num_key_value_heads": 0, "head_dim": 0}
GROUPED: dict[str, Any] = {
    "attention": "gqa",
    "rope_interleaved": False,
    "q_lora_rank": 0,
    "kv_lora_rank": 0,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
}
SIGMOID = {"score_function": "sigmoid", "group_rule": "top2_sum", "router_bias": True}
SOFTMAX = {"score_function": "softmax", "group_rule": "max", "router_bias": False, "renormalise": False}
DENSE = {
    "num_routed_experts": 0,
    "num_shared_experts": 0,
    "moe_intermediate_size": 0,
    "experts_per_token": 0,
    "num_expert_groups": 0,
    "groups_per_token": 0,
    "router_bias": False,
}

Drawn = tuple[ModelConfig, int]


def checked(name: str, fields: dict[str, Any]) -> ModelConfig:
    config = ModelConfig(**{"name": name, "init_std": 0.2, "mtp_depth": 0} | fields)
    assert not config_problems(config), config_problems(config)
    return config


def drawn(family: Callable[[Random], Drawn]) -> st.SearchStrategy[Drawn]:
    """Models of a family, with the sequence length of the stage that they come from."""
    return st.randoms(use_true_random=True).map(family)


def _common(r: Random) -> dict[str, Any]:
    """hidden_size is a multiple of 12, so of every number of heads: transformers' V2 and llama ask for that."""
    scaling = RopeScaling(
        factor=r.choice([4.0, 40.0]),
        original_length=ORIGINAL_LENGTH,
        beta_fast=r.choice([5.0, 32.0]),
        beta_slow=1.0,
        mscale=r.choice([1.0, 0.707]),
        mscale_all_dim=r.choice([1.0, 0.707, 0.0]),
    )
    return {
        "vocab_size": r.randint(30, 70),
        "hidden_size": r.choice([12, 24, 36]),
        "num_layers": r.choice([1, 2, 2, 3]),
        "num_heads": r.randint(1, 4),
        "intermediate_size": r.randint(5, 24),
        "tie_embeddings": r.random() < 0.3,
        "rope_theta": r.choice([73.0, 10000.0]),
        "rope_scaling": scaling,
    }


def _latent(r: Random) -> dict[str, Any]:
    nope = r.randint(2, 8)
    return LATENT | {
        "q_lora_rank": r.choice([0, r.randint(4, 12), r.randint(4, 12)]),
        "kv_lora_rank": r.randint(4, 12),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": r.choice([2, 4, 8]),
        "v_head_dim": r.choice([nope, r.randint(2, 9)]),
    }


def _experts(r: Random, layers: int, most_groups: int = 4) -> dict[str, Any]:
    """At least two experts a token: of a single one the renormalised weight is constant and its gradient pure noise."""
    groups = r.randint(1, most_groups)
    size = r.randint(2, 3) if groups > 1 else r.randint(3, 8)
    kept = r.randint(1, groups)
    return {
        "first_dense_layers": r.randint(0, layers - 1),
        "moe_intermediate_size": r.randint(3, 12),
        "num_routed_experts": groups * size,
        "num_shared_experts": r.randint(1, 3),
        "experts_per_token": r.randint(2, min(4, kept * size)),
        "num_expert_groups": groups,
        "groups_per_token": kept,
        "routed_scaling_factor": r.choice([1.0, 2.5, 16.0]),
    }


def _grouped(r: Random) -> dict[str, Any]:
    heads = r.choice([1, 3, 4, 6])
    shared = r.choice([n for n in range(1, heads + 1) if heads % n == 0])
    return GROUPED | {"num_heads": heads, "num_key_value_heads": shared}


def _length(r: Random) -> int:
    return r.choice([PLAIN, EXTENDED])


def v3_model(r: Random) -> Drawn:
    fields = _common(r) | _latent(r) | SIGMOID
    fields |= _experts(r, fields["num_layers"])
    return checked("v3", fields | {"renormalise": r.random() < 0.5, "mtp_depth": r.randint(0, 2)}), _length(r)


def v2_model(r: Random) -> Drawn:
    fields = _common(r) | _latent(r) | SOFTMAX
    return checked("v2", fields | _experts(r, fields["num_layers"])), _length(r)


def llama_model(r: Random) -> Drawn:
    fields = _common(r) | _grouped(r)
    fields |= DENSE | {"first_dense_layers": fields["num_layers"]}
    fields |= {"head_dim": r.choice([2, 4, 6, 10]), "rms_norm_eps": r.choice([1e-6, 1e-5])}
    return checked("llama", fields), _length(r)


def deepseek_moe_model(r: Random) -> Drawn:
    """DeepSeekMoE 16B's shape, or (sigmoid, bias, renormalised) that of the loss-free balancing study."""
    fields = _common(r) | _grouped(r) | {"head_dim": 2 * r.randint(1, 4)}
    fields |= _experts(r, fields["num_layers"], most_groups=1)
    fields |= r.choice([SOFTMAX, SOFTMAX, SIGMOID | {"renormalise": True}]) | {"group_rule": "max"}
    return checked("deepseek", fields | {"routed_scaling_factor": 1.0}), PLAIN
