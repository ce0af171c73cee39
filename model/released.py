"""The released names: which rows of which canonical tensor each tensor of a Hugging Face `deepseek_v3` folder holds,
and its config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig, RopeScaling
from model.errors import CheckpointError, ModelError
from model.names import layer_shapes

# transformers builds the two latent norms with its default eps whatever the config says.
RELEASED_EPS = 1e-6
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.q_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_b": "self_attn.q_b_proj",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b": "self_attn.kv_b_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "router.weight": "mlp.gate",
    "router.bias": "mlp.gate.e_score_correction_bias",
}
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "first_dense_layers": "first_k_dense_replace",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_expert_groups": "n_group",
    "groups_per_token": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "mtp_depth": "num_nextn_predict_layers",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}


@dataclass(frozen=True)
class Entry:
    """Released tensor `name` is rows [first_row, last_row) of canonical tensor `canonical`; `shape` is the released
    shape.
    """

    name: str
    canonical: str
    first_row: int
    last_row: int
    shape: tuple[int, ...]


def _layer_entries(config: ModelConfig, moe: bool, released: str, canonical: str) -> list[Entry]:
    entries = []
    for name, shape in layer_shapes(config, moe).items():
        rows = shape[0]
        if name in LAYER_NAMES:
            suffix = "" if name == "router.bias" else ".weight"
            entries.append(Entry(f"{released}{LAYER_NAMES[name]}{suffix}", canonical + name, 0, rows, shape))
            continue
        owner, _, leaf = name.rpartition(".")
        place = {"mlp": "mlp", "shared": "mlp.shared_experts"}.get(owner, f"mlp.{owner}")
        if leaf == "down":
            entries.append(Entry(f"{released}{place}.down_proj.weight", canonical + name, 0, rows, shape))
        else:
            half = (rows // 2, shape[1])
            entries.append(Entry(f"{released}{place}.gate_proj.weight", canonical + name, 0, rows // 2, half))
            entries.append(Entry(f"{released}{place}.up_proj.weight", canonical + name, rows // 2, rows, half))
    return entries


def released_entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the folder in order; MTP depth k is layer `num_layers + k`, with its copies of embedding and
    head. A head tied to the embedding has no tensor of its own.
    """
    V, d = config.vocab_size, config.hidden_size

    def whole(name: str, canonical: str, *shape: int) -> Entry:
        return Entry(f"model.{name}.weight" if name != "lm_head" else "lm_head.weight", canonical, 0, shape[0], shape)

    entries = [whole("embed_tokens", "embed", V, d)]
    for i in range(config.num_layers):
        entries += _layer_entries(config, i >= config.first_dense_layers, f"model.layers.{i}.", f"layers.{i}.")
    head = "embed" if config.tie_embeddings else "head"
    entries.append(whole("norm", "norm", d))
    if not config.tie_embeddings:
        entries.append(whole("lm_head", head, V, d))
    for k in range(config.mtp_depth):
        place = f"layers.{config.num_layers + k}"
        entries += [
            whole(f"{place}.embed_tokens", "embed", V, d),
            whole(f"{place}.enorm", f"mtp.{k}.embed_norm", d),
            whole(f"{place}.hnorm", f"mtp.{k}.hidden_norm", d),
            whole(f"{place}.eh_proj", f"mtp.{k}.proj", d, 2 * d),
        ]
        entries += _layer_entries(config, True, f"model.{place}.", f"mtp.{k}.layer.")
        entries += [
            whole(f"{place}.shared_head.norm", f"mtp.{k}.norm", d),
            whole(f"{place}.shared_head.head", head, V, d),
        ]
    return entries


def is_copy(entry: Entry) -> bool:
    """True for the MTP layers' copies of embedding and head: written for readers that expect them, not needed to
    read.
    """
    return entry.name.endswith((".embed_tokens.weight", ".shared_head.head.weight")) and ".layers." in entry.name


def released_config(config: ModelConfig, length: int, dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """config.json of a checkpoint made at sequence length `length`.

    `rope_scaling` is written only when YaRN is on at that length; max_position_embeddings is then factor *
    original_length, as released, and otherwise the length itself.
    """
    if config.rms_norm_eps != RELEASED_EPS:
        raise ModelError(
            f"export: model.rms_norm_eps is {config.rms_norm_eps}; transformers uses {RELEASED_EPS} in the "
            "latent norms, so only that value gives the same logits there"
        )
    scaling = config.rope_scaling
    yarn = length > scaling.original_length
    values: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], **FIXED, "attention_dropout": 0.0}
    values |= {released: getattr(config, name) for name, released in CONFIG_NAMES.items()}
    values |= {
        "q_lora_rank": config.q_lora_rank or None,
        "tie_word_embeddings": config.tie_embeddings,
        "num_key_value_heads": config.num_heads,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": round(scaling.factor * scaling.original_length) if yarn else length,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if yarn:
        values["rope_scaling"] = {
            "type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    return values


def model_config(values: dict[str, Any], source: str) -> tuple[ModelConfig, int]:
    """The model and the longest sequence length of a config.json; both of transformers' spellings of RoPE are read.

    Raises CheckpointError with every missing key and unsupported value. Without `rope_scaling` the length becomes
    YaRN's original length, the other YaRN numbers stay at their defaults.
    """
    problems = [
        f"{source}: {key} is {values[key]!r}, supported is {wanted!r}"
        for key, wanted in FIXED.items()
        if values.get(key, wanted) != wanted
    ]
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"{source}: tie_word_embeddings is {tied!r}, allowed true and false")
    if "quantization_config" in values:
        problems.append(f"{source}: quantization_config is present; quantised weights are not supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = values.get("rope_theta", rope.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = [*CONFIG_NAMES.values(), "max_position_embeddings"]
    problems += [f"{source}: {key} is missing" for key in needed if key not in values]
    if theta is None:
        problems.append(f"{source}: rope_theta is missing")
    if kind not in ("default", "yarn"):
        problems.append(f"{source}: rope type is {kind!r}, supported are 'default' and 'yarn'")
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        problems.append(f"{source}: rope attention_factor and truncate are not supported")
    if values.get("num_key_value_heads", values.get("num_attention_heads")) != values.get("num_attention_heads"):
        problems.append(f"{source}: num_key_value_heads differs from num_attention_heads")
    if problems or theta is None:
        raise CheckpointError("\n".join(problems))
    length = int(values["max_position_embeddings"])
    scaling = RopeScaling(original_length=length)
    if kind == "yarn":
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            original_length=int(rope["original_max_position_embeddings"]),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=float(rope.get("mscale") or 1),
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        )
    numbers = {name: values[released] for name, released in CONFIG_NAMES.items()}
    numbers["q_lora_rank"] = numbers["q_lora_rank"] or 0
    found = ModelConfig(name="imported", rope_theta=float(theta), rope_scaling=scaling, tie_embeddings=tied, **numbers)
    return found, length
