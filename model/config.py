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

    q_lora_rank 0 means no query compression. `vocab_size` counts the padded rows.
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
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim
