"""config.json, both ways: a model and its length to the released keys, and back with every problem named."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig, RopeScaling, config_problems
from model.errors import CheckpointError
from model.released_family import DENSE, FAMILIES, LLAMA, MOE, V2, Family, code_reasons, family_of
from model.released_rope import read_rope, rope_scaling_values

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def released_config(
    config: ModelConfig, length: int, dtype: str, bos_id: int, eos_id: int | list[int], fp8: bool = False
) -> dict[str, Any]:
    """config.json of a checkpoint made at sequence length `length`. ModelError when no family can say the model.

    `rope_scaling` is written only when YaRN is on at that length; max_position_embeddings is then factor *
    original_length, as released, and otherwise the length itself.
    """
    family = family_of(config, length)
    scaling, rope = config.rope_scaling, rope_scaling_values(config, length)
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= family.fixed | {"attention_dropout": 0.0, "initializer_range": config.init_std}
    values |= {key: getattr(config, name) for name, key in family.numbers.items()}
    if config.attention == "mla":
        values |= {"q_lora_rank": config.q_lora_rank or None, "num_key_value_heads": config.num_heads}
    if family is LLAMA:
        values["head_dim"] = config.head_dim
    if family is V2:
        values |= _v2_routing(config)
    values |= {
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": round(scaling.factor * scaling.original_length) if rope else length,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    return values | ({"quantization_config": QUANTIZATION} if fp8 else {})


def _v2_routing(config: ModelConfig) -> dict[str, Any]:
    """`greedy` looks at all experts and at no group. A dense model's layers all come before the first with experts."""
    if not config.has_experts:
        return {"first_k_dense_replace": config.num_layers, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    greedy = config.groups_per_token == config.num_expert_groups
    groups = {"n_group": config.num_expert_groups, "topk_group": config.groups_per_token}
    return {"topk_method": "greedy" if greedy else "group_limited_greedy", **groups}


def model_config(values: dict[str, Any], source: str) -> tuple[ModelConfig, int]:
    """The model and the longest sequence length of a config.json; both of transformers' spellings of RoPE are read.

    Raises CheckpointError with every missing key and unsupported value. Without `rope_scaling` the length becomes
    YaRN's original length, the other YaRN numbers stay at their defaults.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        allowed = ", ".join(FAMILIES)
        raise CheckpointError(f"{source}: model_type is {values.get('model_type')!r}, supported: {allowed}")
    problems = [
        f"{key} is {values[key]!r}, supported is {wanted!r}"
        for key, wanted in family.fixed.items()
        if values.get(key) is not None and values[key] != wanted
    ]
    problems += _quantization_problems(values.get("quantization_config"))
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings is {tied!r}, allowed true and false")
    numbers, found = _numbers(family, values)
    problems += found
    length = values.get("max_position_embeddings")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        problems.append(_wanted("max_position_embeddings", values, "an integer above 0"))
    attention = family.implied["attention"]
    theta, scaling, found = read_rope(values, attention, ("default",) if family is MOE else ("default", "yarn"))
    problems += found
    if problems or not isinstance(length, int):
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems))
    fields: dict[str, Any] = {"name": "imported", "q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0}
    fields |= {"qk_rope_head_dim": 0, "v_head_dim": 0, **DENSE} | family.implied | numbers
    if not fields["num_routed_experts"]:
        fields |= DENSE | {"first_dense_layers": fields["num_layers"]}
    fields |= {"rope_theta": theta, "rope_scaling": scaling or RopeScaling(original_length=length)}
    config = ModelConfig(**fields, tie_embeddings=tied)
    problems = config_problems(config) or code_reasons(config, family, length)
    if problems:
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems))
    return config, length


def _wanted(key: str, values: dict[str, Any], needed: str) -> str:
    return f"{key} is missing" if key not in values else f"{key} is {values[key]!r}, {needed} is needed"


def _numbers(family: Family, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our fields from the family's keys, and the problems of those keys."""
    values = dict(values)
    problems: list[str] = []
    heads = values.get("num_attention_heads")
    if "q_lora_rank" in family.numbers and values.get("q_lora_rank", 0) is None:
        values["q_lora_rank"] = 0
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if heads and "num_key_value_heads" not in family.numbers and values["num_key_value_heads"] != heads:
        problems.append(
            f"num_key_value_heads is {values['num_key_value_heads']!r}, supported is {heads!r}: one per head"
        )
    if family is V2 and values.get("n_routed_experts", 0) is None:
        values["n_routed_experts"] = 0
    found: dict[str, Any] = {}
    for name, key in family.numbers.items():
        default, value = getattr(ModelConfig, name), values.get(key)
        if isinstance(default, bool):
            fits, needed = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            fits, needed = isinstance(value, int) and not isinstance(value, bool), "an integer"
        else:
            fits, needed = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        if not fits:
            problems.append(_wanted(key, values, needed))
        else:
            found[name] = float(value) if isinstance(default, float) else value  # type: ignore[arg-type]
    std = values.get("initializer_range")
    if isinstance(std, int | float) and not isinstance(std, bool) and std > 0:
        found["init_std"] = float(std)
    if family is V2:
        problems += _read_v2_routing(values, found)
    if family in (LLAMA, MOE) and not problems:
        problems += _read_head_dim(family, values, found)
    return found, problems


def _read_v2_routing(values: dict[str, Any], found: dict[str, Any]) -> list[str]:
    method = values.get("topk_method", "greedy")
    if method == "greedy":
        found["num_expert_groups"] = found["groups_per_token"] = values.get("n_group") or 1
        return []
    if method != "group_limited_greedy":
        return [f"topk_method is {method!r}, supported: 'greedy' and 'group_limited_greedy'"]
    problems = []
    for name, key in (("num_expert_groups", "n_group"), ("groups_per_token", "topk_group")):
        if not isinstance(values.get(key), int) or isinstance(values[key], bool):
            problems.append(_wanted(key, values, "an integer"))
        else:
            found[name] = values[key]
    return problems


def _read_head_dim(family: Family, values: dict[str, Any], found: dict[str, Any]) -> list[str]:
    derived, rest = divmod(found["hidden_size"], found["num_heads"]) if found["num_heads"] else (0, 1)
    width = values.get("head_dim") if family is LLAMA else None
    if width is None and rest:
        return [f"hidden_size is {found['hidden_size']}, a multiple of num_attention_heads is needed"]
    if width is not None and (not isinstance(width, int) or isinstance(width, bool)):
        return [f"head_dim is {width!r}, an integer is needed"]
    found["head_dim"] = derived if width is None else width
    return []


def _quantization_problems(given: object) -> list[str]:
    """Block-scaled FP8 as DeepSeek releases it, or none. V3.1's scale_fmt `ue8m0` says that the FP32 scales are powers
    of two, which changes nothing for a reader.
    """
    if given is None:
        return []
    if not isinstance(given, dict):
        return [f"quantization_config is {given!r}, a JSON object is needed"]
    allowed: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "weight_block_size": ([128, 128],),
        "fmt": (None, "e4m3"),
        "activation_scheme": (None, "dynamic"),
        "scale_fmt": (None, "float", "ue8m0"),
    }
    return [
        f"quantization_config.{key} is {given.get(key)!r}, supported is {supported[-1]!r}"
        for key, supported in allowed.items()
        if given.get(key) not in supported
    ]
