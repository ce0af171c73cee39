"""In which precision a tensor is held for compute and multiplied, by the FP8 recipe (V3 section 3.3)."""

from __future__ import annotations

from model.names import is_router_bias

# Of the linear layers of attention, MLP and experts. Not embedding, head, norms, router and MTP projection.
FP8_LEAVES = frozenset({"q", "k", "v", "q_a", "q_b", "kv_a", "kv_b", "o", "gate_up", "down"})


def in_fp8(name: str) -> bool:
    """Whether the three products of canonical tensor `name` take FP8 when the recipe is on."""
    return name.rpartition(".")[2] in FP8_LEAVES


def precision_of(name: str) -> str:
    """`fp8` (products in FP8 with the recipe on, BF16 otherwise), `bf16`, or `fp32` (the router's scores and bias)."""
    if is_router_bias(name) or name.endswith("router.weight"):
        return "fp32"
    return "fp8" if in_fp8(name) else "bf16"
