"""The choices that change what a rank holds: their values (the code's own first) and what each does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Choices:
    """One value of each choice; the defaults are the code as it is."""

    caches: str = "fp8"
    recompute: str = "on"
    attention_output: str = "int16"
    weights: str = "bf16+fp8"
    gradients: str = "float32"
    shard: str = "optimizer"
    owners: str = "rows"
    logits: str = "whole"
    weight_gradients: str = "apart"
    working: str = "plain"

    @property
    def fp8(self) -> bool:
        return self.caches == "fp8"

    def differences(self) -> list[str]:
        """`key=value` of every choice that is not the code's own."""
        return [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]


# What each value does. The first value of a key is what the code does.
EFFECTS: dict[str, dict[str, str]] = {
    "caches": {
        "fp8": "activations are kept in E4M3 tiles, the attention output in E5M6 (precision.fp8=true)",
        "bf16": "everything is kept in BF16, and no FP8 copy of a weight exists (precision.fp8=false)",
    },
    "recompute": {
        "on": "RMSNorm, MLA up-projections and SwiGLU are computed again in the backward",
        "off": "their results are kept too, in BF16 (precision.recompute=false)",
    },
    "attention_output": {
        "int16": "an E5M6 code of 12 bits lies in 16",
        "packed": "two codes in three bytes (a change of kernels/e5m6.py)",
    },
    "weights": {
        "bf16+fp8": "a BF16 copy of every weight, and an FP8 one of those that FP8 products use, all step long",
        "bf16": "weights are quantised at each use and not kept (time for memory)",
        "fp8": "owners send FP8: no BF16 copy of a weight that only FP8 products use",
    },
    "gradients": {
        "float32": "weight gradients accumulate in FP32",
        "bfloat16": "in BF16 (optimizer.accumulate_dtype=bfloat16; V3 uses FP32)",
    },
    "shard": {
        "optimizer": "ZeRO-1: masters and moments are sharded, accumulators are whole",
        "gradients": "accumulators are sharded too: a reduce-scatter per weight gradient instead of one per step",
    },
    "owners": {
        "rows": "a bucket is dealt out in units of 128 whole rows; every owner's piece is padded to the largest",
        "tiles": "in units of 128 rows and 1024 columns: less padding, FP8 blocks stay whole (parallel/optimizer)",
    },
    "logits": {
        "whole": "all logits of a chunk in FP32, then their gradient in BF16 until the head's backward",
        "chunked": "head, loss and both gradients in pieces of 512 tokens: only the input's gradient waits",
    },
    "weight_gradients": {
        "apart": "a weight gradient is a tensor of its own in FP32 before it is added",
        "into": "the product adds into the accumulator (kernels have `into`; the store does not use it)",
    },
    "working": {
        "plain": "FP32 copies of gradients and of rows to be summed; attention frees nothing before it returns",
        "lean": "kernels that quantise and sum without FP32 copies; intermediates freed once used",
    },
}

# In the order in which they are tried. The first group is work on the code alone: no number changes.
# The second costs something: a collective for every weight gradient, or precision.
FREE: tuple[tuple[str, str], ...] = (
    ("owners", "tiles"),
    ("working", "lean"),
    ("weight_gradients", "into"),
    ("attention_output", "packed"),
    ("logits", "chunked"),
    ("weights", "fp8"),
)
COSTLY: tuple[tuple[str, str], ...] = (
    ("shard", "gradients"),
    ("gradients", "bfloat16"),
)


def choose(given: Mapping[str, str]) -> Choices:
    """Choices from `key: value`; ValueError with what was given and what is allowed."""
    for key, value in given.items():
        if value not in EFFECTS[key]:
            raise ValueError(f"{key}={value}: allowed: {', '.join(EFFECTS[key])}")
    chosen = replace(Choices(), **given)
    if not chosen.fp8:
        for key, value in (("attention_output", "packed"), ("weights", "fp8")):
            if getattr(chosen, key) == value:
                raise ValueError(f"{key}={value}: needs caches=fp8, found caches={chosen.caches}")
    return chosen
