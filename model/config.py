"""The model's numbers: one schema for every size; a model is a YAML of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class RopeScaling:
    """YaRN as in DeepSeek's code (V3 section 4.3). Only used when a stage's length exceeds `original_length`."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass
class ModelConfig:
    """An architecture of the DeepSeek family in numbers; the defaults are V3's (section 4.2, released config.json).

    attention: `mla` (latent; q_lora_rank 0 means no query compression) or `gqa` (num_key_value_heads heads of keys and
    values of width head_dim; as many as num_heads is plain multi-head attention). rope_interleaved: RoPE turns adjacent
    pairs (V2, V3) or, if false, dimension i with i + half (LLM, DeepSeekMoE).

    num_routed_experts 0: a dense model, every layer with an MLP of intermediate_size. score_function: `sigmoid` or
    `softmax` affinities. group_rule: a group of experts is ranked by its best score (`max`, V2) or by the sum of its
    two best (`top2_sum`, V3). renormalise: the chosen weights are divided by their sum. router_bias: selection adds a
    bias that balances without a loss.

    `vocab_size` counts the padded rows. tie_embeddings: the head is the embedding, one parameter (no DeepSeek model).
    """

    name: str = "v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    first_dense_layers: int = 3
    attention: str = "mla"
    num_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_routed_experts: int = 256
    num_shared_experts: int = 1
    experts_per_token: int = 8
    num_expert_groups: int = 8
    groups_per_token: int = 4
    score_function: str = "sigmoid"
    group_rule: str = "top2_sum"
    renormalise: bool = True
    routed_scaling_factor: float = 2.5
    router_bias: bool = True
    mtp_depth: int = 1
    rope_theta: float = 10000.0
    rope_interleaved: bool = True
    rms_norm_eps: float = 1e-6
    init_std: float = 0.006
    tie_embeddings: bool = False
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head; logits are scaled by its root."""
        return self.head_dim if self.attention == "gqa" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a head's output."""
        return self.head_dim if self.attention == "gqa" else self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head RoPE turns."""
        return self.head_dim if self.attention == "gqa" else self.qk_rope_head_dim

    @property
    def has_experts(self) -> bool:
        return self.num_routed_experts > 0

    def is_moe(self, layer: int) -> bool:
        """Whether main layer `layer` has experts."""
        return self.has_experts and layer >= self.first_dense_layers

    @property
    def dense_layers(self) -> int:
        """Main layers without experts; the rest have them."""
        return self.first_dense_layers if self.has_experts else self.num_layers


CHOICES = {"attention": ("mla", "gqa"), "score_function": ("sigmoid", "softmax"), "group_rule": ("max", "top2_sum")}
MLA_NUMBERS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GQA_NUMBERS = ("num_key_value_heads", "head_dim")
EXPERT_NUMBERS = (
    "moe_intermediate_size",
    "num_shared_experts",
    "experts_per_token",
    "num_expert_groups",
    "groups_per_token",
)


def config_problems(config: ModelConfig) -> list[str]:
    """What is wrong with the numbers, one line each (key, value found, what is allowed); empty when the model can be
    built. Numbers of the attention that is not chosen, and of experts in a dense model, are not looked at.
    """
    c = config
    problems = [
        f"model.{key}: found {getattr(c, key)!r}, allowed {' and '.join(allowed)}"
        for key, allowed in CHOICES.items()
        if getattr(c, key) not in allowed
    ]
    if problems:
        return problems
    zero_allowed = {"q_lora_rank", "first_dense_layers", "mtp_depth", "num_routed_experts"}
    zero_allowed.update(MLA_NUMBERS if c.attention == "gqa" else GQA_NUMBERS)
    if not c.has_experts:
        zero_allowed.update(EXPERT_NUMBERS)
    for key, value in vars(c).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            problems.append(f"model.{key}: found {value}, must be finite")
        elif value < 0 or (value == 0 and key not in zero_allowed):
            problems.append(f"model.{key}: found {value}, must be {'at least 0' if key in zero_allowed else 'above 0'}")
    if problems:
        return problems
    problems += _attention_problems(c)
    if c.first_dense_layers > c.num_layers:
        problems.append(f"model.first_dense_layers: found {c.first_dense_layers}, at most num_layers ({c.num_layers})")
    if c.has_experts:
        problems += _router_problems(c)
    if c.rope_theta <= 1:
        problems.append(f"model.rope_theta: found {c.rope_theta}, must be above 1")
    return problems + _scaling_problems(c.rope_scaling)


def _attention_problems(c: ModelConfig) -> list[str]:
    problems = []
    if c.rotary_dim % 2:
        key = "head_dim" if c.attention == "gqa" else "qk_rope_head_dim"
        problems.append(f"model.{key}: found {c.rotary_dim}, must be even (RoPE rotates pairs)")
    if c.attention == "gqa" and c.num_heads % c.num_key_value_heads:
        problems.append(
            f"model.num_key_value_heads: found {c.num_key_value_heads}, must divide num_heads ({c.num_heads})"
        )
    return problems


def _router_problems(c: ModelConfig) -> list[str]:
    problems = []
    if c.num_routed_experts % c.num_expert_groups:
        problems.append(
            f"model.num_expert_groups: found {c.num_expert_groups}, "
            f"must divide num_routed_experts ({c.num_routed_experts})"
        )
    elif c.group_rule == "top2_sum" and 1 < c.num_expert_groups and c.num_routed_experts // c.num_expert_groups < 2:
        problems.append(
            f"model.num_expert_groups: found {c.num_expert_groups}, at most half of num_routed_experts "
            f"({c.num_routed_experts}): a group is ranked by its two best experts"
        )
    if c.groups_per_token > c.num_expert_groups:
        problems.append(
            f"model.groups_per_token: found {c.groups_per_token}, at most num_expert_groups ({c.num_expert_groups})"
        )
    reachable = c.num_routed_experts // c.num_expert_groups * c.groups_per_token
    if c.experts_per_token > reachable:
        problems.append(
            f"model.experts_per_token: found {c.experts_per_token}, "
            f"at most {reachable} (the experts of {c.groups_per_token} groups)"
        )
    return problems


def _scaling_problems(scaling: RopeScaling) -> list[str]:
    problems = [
        f"model.rope_scaling.{key}: found {value}, must be finite"
        for key, value in vars(scaling).items()
        if not math.isfinite(value)
    ]
    if scaling.factor < 1 or scaling.original_length < 1:
        problems.append(
            f"model.rope_scaling: found factor {scaling.factor}, "
            f"original_length {scaling.original_length}; both at least 1"
        )
    if not scaling.beta_fast >= scaling.beta_slow > 0:
        problems.append(
            f"model.rope_scaling: found beta_fast {scaling.beta_fast}, beta_slow {scaling.beta_slow}; "
            "beta_fast >= beta_slow > 0 is needed"
        )
    return problems
