"""The families of released config.json files, and which of them a model can be written as.

A family is a model_type with its own code in transformers or beside DeepSeek's weights: what that code computes is
fixed for some of our fields (`implied`) and read from config.json for the others (`numbers`). A model is only written
as a family whose code gives the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from model.config import EXPERT_NUMBERS, GQA_NUMBERS, MLA_NUMBERS, ModelConfig
from model.errors import ModelError
from model.rope import yarn_is_on

# The code of V2 and V3 builds the two latent norms with its default eps whatever config.json says.
LATENT_EPS = 1e-6

COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}
LATENT = {name: name for name in ("q_lora_rank", *MLA_NUMBERS)}
GROUPED = {"num_key_value_heads": "num_key_value_heads"}
EXPERTS = {
    "first_dense_layers": "first_k_dense_replace",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
}
GROUPS = {"num_expert_groups": "n_group", "groups_per_token": "topk_group"}
SCALED = {"routed_scaling_factor": "routed_scaling_factor"}
RENORMALISED = {"renormalise": "norm_topk_prob"}
DENSE: dict[str, Any] = {
    "num_routed_experts": 0,
    **dict.fromkeys(EXPERT_NUMBERS, 0),
    "score_function": "softmax",
    "group_rule": "max",
    "renormalise": False,
    "routed_scaling_factor": 1.0,
    "router_bias": False,
}
PLAIN_MLP = {"hidden_act": "silu", "attention_bias": False}


@dataclass(frozen=True)
class Family:
    """numbers: our field -> key of config.json, needed there. fixed: key -> the only value supported; an absent key has
    it. implied: our field -> the value that the family's code computes with.
    """

    model_type: str
    architecture: str
    numbers: dict[str, str]
    fixed: dict[str, Any]
    implied: dict[str, Any]


V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    COMMON | LATENT | EXPERTS | GROUPS | SCALED | RENORMALISED | {"mtp_depth": "num_nextn_predict_layers"},
    PLAIN_MLP | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
    {"attention": "mla", "score_function": "sigmoid", "group_rule": "top2_sum", "router_bias": True}
    | {"rope_interleaved": True},
)
V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    COMMON | LATENT | EXPERTS | SCALED,
    PLAIN_MLP | {"mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    {"attention": "mla", "score_function": "softmax", "group_rule": "max", "renormalise": False, "router_bias": False}
    | {"rope_interleaved": True, "mtp_depth": 0},
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    COMMON | GROUPED,
    PLAIN_MLP | {"mlp_bias": False},
    {"attention": "gqa", "num_routed_experts": 0, "rope_interleaved": False, "mtp_depth": 0},
)
# DeepSeekMoE 16B. transformers has no class for it: its code is beside its weights.
MOE = Family(
    "deepseek",
    "DeepseekForCausalLM",
    COMMON | GROUPED | EXPERTS | RENORMALISED,
    PLAIN_MLP | {"scoring_func": "softmax", "moe_layer_freq": 1},
    {"attention": "gqa", "score_function": "softmax", "router_bias": False, "rope_interleaved": False, "mtp_depth": 0}
    | {"num_expert_groups": 1, "groups_per_token": 1, "group_rule": "max", "routed_scaling_factor": 1.0},
)
FAMILIES = {family.model_type: family for family in (V3, V2, LLAMA, MOE)}


def essential(config: ModelConfig) -> ModelConfig:
    """The same model with every field that changes no logit at one plain value: two models are the same computation
    when these are equal. YaRN is left alone; `name` and `init_std` count as changing nothing.
    """
    plain: dict[str, Any] = {"name": "", "init_std": 0.0}
    plain |= dict.fromkeys(("q_lora_rank", *MLA_NUMBERS) if config.attention == "gqa" else GQA_NUMBERS, 0)
    if not config.has_experts:
        plain |= DENSE | {"first_dense_layers": config.num_layers}
    elif config.groups_per_token == config.num_expert_groups:
        plain["group_rule"] = "max"
    return replace(config, **plain)


def differing_fields(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields that make the two compute differently, YaRN's aside."""
    mine, theirs = vars(essential(config)), vars(essential(other))
    return [key for key in mine if key != "rope_scaling" and mine[key] != theirs[key]]


def family_of(config: ModelConfig, length: int) -> Family:
    """The family that a model trained at `length` is written as. ModelError with every reason when none can say it."""
    if config.attention == "gqa":
        family = MOE if config.has_experts else LLAMA
    else:
        family = V3 if config.has_experts and config.score_function == "sigmoid" else V2
    as_family = replace(config, **family.implied)
    reasons = [
        f"model.{key}: found {getattr(config, key)}, {family.model_type} has {family.implied[key]}"
        for key in differing_fields(config, as_family)
    ] + code_reasons(config, family, length)
    if reasons:
        raise ModelError("\n".join(f"export as {family.model_type}: {reason}" for reason in reasons))
    return family


def code_reasons(config: ModelConfig, family: Family, length: int) -> list[str]:
    """What the family's code computes differently though its config.json could say it."""
    reasons = []
    if family in (V3, V2) and config.rms_norm_eps != LATENT_EPS:
        reasons.append(
            f"model.rms_norm_eps: found {config.rms_norm_eps}; its code uses {LATENT_EPS} in the latent norms, so only "
            "that value gives the same logits there"
        )
    if family in (V2, LLAMA) and config.hidden_size % config.num_heads:
        reasons.append(f"model.hidden_size: found {config.hidden_size}; must be a multiple of num_heads there")
    if family is V3 and config.num_routed_experts < 2 * config.num_expert_groups:
        reasons.append(f"model.num_routed_experts: found {config.num_routed_experts}; its code needs two in a group")
    if family is MOE:
        if config.head_dim * config.num_heads != config.hidden_size:
            reasons.append(f"model.head_dim: found {config.head_dim}; its code has hidden_size / num_heads")
        if config.renormalise and config.experts_per_token == 1:
            reasons.append("model.renormalise: found True; its code does not renormalise a single expert's weight")
        if yarn_is_on(config, length):
            reasons.append(
                f"length {length} exceeds model.rope_scaling.original_length ({config.rope_scaling.original_length}); "
                "its code has no YaRN"
            )
    return reasons
