"""Which optimizer group a canonical tensor belongs to, and what the groups of a model come to.

Router biases are in no group: the optimizer does not hold them, the load moves them (V3 section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from model.config import ModelConfig
from model.names import canonical_shapes, is_norm, is_router_bias
from parallel.optimizer.config import GROUPS, OptimizerConfig


@dataclass(frozen=True)
class GroupSummary:
    """One line of the groups' table. tensors, parameters: of the whole model, MTP included. learning_rate_factor: on
    the schedule's; weight_decay: already multiplied. Both are None for what the optimizer does not hold. note: empty
    where there is nothing to say.
    """

    group: str
    tensors: int
    parameters: int
    learning_rate_factor: float | None
    weight_decay: float | None
    note: str = ""


def group_of(name: str) -> str:
    """The optimizer group of canonical tensor `name`. ValueError for a router bias."""
    if is_router_bias(name):
        raise ValueError(f"{name}: a router bias is in no optimizer group")
    if is_norm(name):
        return "norms"
    if name in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[name]
    if name.endswith("router.weight"):
        return "router"
    return "experts" if "experts" in name.split(".") else "matrices"


def group_table(config: ModelConfig, optimizer: OptimizerConfig) -> list[GroupSummary]:
    """Every group in the order of `GROUPS`, then the router biases where the model has them."""
    tensors: dict[str, list[int]] = {group: [] for group in GROUPS}
    biases: list[int] = []
    for name, shape in canonical_shapes(config).items():
        (biases if is_router_bias(name) else tensors[group_of(name)]).append(prod(shape))
    found = []
    for group, sizes in tensors.items():
        settings = optimizer.groups.of(group)
        factor, decay = settings.learning_rate_factor, optimizer.weight_decay * settings.weight_decay_factor
        note = "frozen" if factor == 0.0 and sizes else ""
        if config.tie_embeddings:
            tied = {"embedding": "holds the tied head", "head": "in embedding, tied"}.get(group, "")
            note = ", ".join(part for part in (tied, note) if part)
        found.append(GroupSummary(group, len(sizes), sum(sizes), factor, decay, note))
    if biases:
        found.append(GroupSummary("router biases", len(biases), sum(biases), None, None, "moved by the load"))
    return found
