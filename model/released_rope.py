"""RoPE in config.json, both ways: where transformers would scale differently from DeepSeek's formula, the file says so
in `attention_factor`, and a file that means different things to the two is refused.

With m(x) = 0.1 x ln(factor) + 1, DeepSeek multiplies cos and sin by m(mscale) / m(mscale_all_dim) and the softmax scale
by m(mscale_all_dim)^2. transformers' V2 and V3 do the second; for the first they take m(1) unless mscale and
mscale_all_dim are both given and not 0. Its llama never changes the softmax scale; but there the whole head is turned,
so that factor m(mscale) on cos and sin is DeepSeek's product exactly.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from model.config import ModelConfig, RopeScaling
from model.rope import yarn_is_on, yarn_mscale

AGREE = 1e-9


def rope_scaling_values(config: ModelConfig, length: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; None when YaRN is off at `length`."""
    if not yarn_is_on(config, length):
        return None
    scaling = config.rope_scaling
    values: dict[str, Any] = {
        "type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    if config.attention == "gqa":
        values["attention_factor"] = yarn_mscale(scaling.factor, scaling.mscale)
    elif not (scaling.mscale and scaling.mscale_all_dim):
        values["attention_factor"] = _magnitude(scaling)
    return values


def _magnitude(scaling: RopeScaling) -> float:
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def read_rope(
    values: dict[str, Any], attention: str, allowed: tuple[str, ...]
) -> tuple[float, RopeScaling | None, list[str]]:
    """(theta, scaling, problems) of a config.json in either of transformers' spellings; no scaling without YaRN."""
    problems: list[str] = []
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return 1.0, None, [f"rope_scaling is {rope!r}, a JSON object or null is needed"]
    base, theta = values.get("rope_theta", rope.get("rope_theta")), 1.0
    if _is_number(base):
        theta = float(base)
    else:
        problems.append("rope_theta is missing" if base is None else f"rope_theta is {base!r}, a number is needed")
    for place in (values, rope):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            problems.append(f"partial_rotary_factor is {place['partial_rotary_factor']!r}, supported is 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in allowed:
        problems.append(f"rope type is {kind!r}, supported: {' and '.join(map(repr, allowed))}")
    if "rope_type" not in rope and "type" not in rope and "factor" in rope:
        problems.append(f"rope type is missing beside factor {rope['factor']!r}")
    if problems or kind == "default":
        return theta, None, problems
    if not rope.get("truncate", True):
        problems.append("rope truncate is False, supported is True")
    needed = ("factor", "original_max_position_embeddings")
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    wrong = [key for key in needed if not _is_number(rope.get(key))]
    wrong += [key for key in optional if rope.get(key) is not None and not _is_number(rope[key])]
    problems += [f"rope {key} is {rope.get(key)!r}, a number is needed" for key in wrong]
    if not wrong and rope[needed[1]] != int(rope[needed[1]]):
        problems.append(f"rope {needed[1]} is {rope[needed[1]]!r}, a whole number is needed")
    if not wrong and rope.get("attention_factor") is not None and rope["attention_factor"] <= 0:
        problems.append(f"rope attention_factor is {rope['attention_factor']!r}, a number above 0 is needed")
    if problems:
        return theta, None, problems
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=1.0 if rope.get("mscale") is None else float(rope["mscale"]),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )
    theirs = _their_factor(rope, scaling)
    if attention == "gqa":
        problems += _as_whole_head(scaling, theirs, rope)
    elif not math.isclose(theirs, _magnitude(scaling), rel_tol=AGREE):
        problems.append(
            f"rope attention_factor: transformers scales cos and sin by {theirs:.6g}, DeepSeek's formula by "
            f"{_magnitude(scaling):.6g}; attention_factor must say which is meant"
            if rope.get("attention_factor") is None
            else f"rope attention_factor is {theirs!r}, supported is DeepSeek's {_magnitude(scaling)!r}"
        )
    return theta, scaling, problems


def _their_factor(rope: dict[str, Any], scaling: RopeScaling) -> float:
    """What transformers multiplies cos and sin by."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _magnitude(scaling)
    return yarn_mscale(scaling.factor, 1.0)


def _as_whole_head(scaling: RopeScaling, factor: float, rope: dict[str, Any]) -> list[str]:
    """Set mscale so that m(mscale) is the factor on cos and sin; mscale_all_dim changes nothing in a whole head."""
    if math.isclose(yarn_mscale(scaling.factor, scaling.mscale), factor, rel_tol=AGREE):
        if rope.get("mscale_all_dim") is None:
            scaling.mscale_all_dim = scaling.mscale
        return []
    if scaling.factor <= 1:
        return [f"rope attention_factor is {factor!r}, supported without extension (factor {scaling.factor}) is 1"]
    scaling.mscale = scaling.mscale_all_dim = (factor - 1) / (0.1 * math.log(scaling.factor))
    return []


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
