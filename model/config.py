"""The model's numbers: one schema for every size; a model is a YAML of these."""

from __future__ import annotations

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
    """DeepSeek-V3's architecture in numbers (V3 section 4.2; config.json of the released weights).

    q_lora_rank 0 means no query compression. `vocab_size` counts the padded rows. tie_embeddings: the head is the
    embedding, one parameter (not in V3).
    """

    name: str = "v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    first_dense_layers: int = 3
    num_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_routed_experts: int = 256
    num_shared_experts: int = 1
    experts_per_token: int = 8
    num_expert_groups: int = 8
    groups_per_token: int = 4
    routed_scaling_factor: float = 2.5
    mtp_depth: int = 1
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    init_std: float = 0.006
    tie_embeddings: bool = False
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def config_problems(config: ModelConfig) -> list[str]:
    """What is wrong with the numbers, one line each (key, value found, what is allowed); empty when the model can be
    built.
    """
    c = config
    problems = []
    zero_allowed = {"q_lora_rank", "first_dense_layers", "mtp_depth"}
    for key, value in vars(c).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value < 0 or (value == 0 and key not in zero_allowed):
            problems.append(f"model.{key}: found {value}, must be {'at least 0' if key in zero_allowed else 'above 0'}")
    if problems:
        return problems
    if c.qk_rope_head_dim % 2:
        problems.append(f"model.qk_rope_head_dim: found {c.qk_rope_head_dim}, must be even (RoPE rotates pairs)")
    if c.first_dense_layers > c.num_layers:
        problems.append(f"model.first_dense_layers: found {c.first_dense_layers}, at most num_layers ({c.num_layers})")
    if c.num_routed_experts % c.num_expert_groups:
        problems.append(
            f"model.num_expert_groups: found {c.num_expert_groups}, "
            f"must divide num_routed_experts ({c.num_routed_experts})"
        )
    elif c.num_routed_experts // c.num_expert_groups < 2:
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
    if c.rope_theta <= 1:
        problems.append(f"model.rope_theta: found {c.rope_theta}, must be above 1")
    scaling = c.rope_scaling
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
