"""The optimizer's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch


@dataclass
class GroupConfig:
    """What a group of tensors makes of the run's numbers: factors on the scheduled learning rate and on `weight_decay`.

    learning_rate_factor 0 freezes the group: neither weights nor moments change. Its gradients still count in the
    global norm, as every tensor's do.
    """

    learning_rate_factor: float = 1.0
    weight_decay_factor: float = 1.0


@dataclass
class GroupsConfig:
    """Every tensor that gradients train is in exactly one group, by its canonical name (`model/groups.py`).

    embedding; head (of its own, not tied); norms: every RMSNorm weight; router: the affinity matrices; experts: the
    routed ones; matrices: all that is left (attention, dense and shared MLPs, MTP projection). The papers say nothing
    of groups: all matrices decay, norms do not, and one learning rate serves all.
    """

    embedding: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    norms: GroupConfig = field(default_factory=lambda: GroupConfig(weight_decay_factor=0.0))
    router: GroupConfig = field(default_factory=GroupConfig)
    experts: GroupConfig = field(default_factory=GroupConfig)
    matrices: GroupConfig = field(default_factory=GroupConfig)

    def of(self, group: str) -> GroupConfig:
        """The settings of `group`; ValueError lists what is allowed."""
        if group not in GROUPS:
            raise ValueError(f"optimizer.groups: found '{group}', allowed {', '.join(GROUPS)}")
        found: GroupConfig = getattr(self, group)
        return found


GROUPS = tuple(group.name for group in fields(GroupsConfig))


@dataclass
class OptimizerConfig:
    """AdamW as DeepSeek-V3 trains (section 4.2), in its dtypes (section 3.3).

    clip: largest global gradient norm; 0 turns clipping off. groups: factors by group of tensors. The dtypes are torch
    names: masters and accumulation `float32`, moments `bfloat16`; a float64 model sets all three to `float64`.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    master_dtype: str = "float32"
    moment_dtype: str = "bfloat16"
    accumulate_dtype: str = "float32"
    groups: GroupsConfig = field(default_factory=GroupsConfig)


def group_problems(groups: GroupsConfig) -> list[str]:
    """Factors that cannot be, one line each: the key, what was found, what is allowed."""
    return [
        f"optimizer.groups.{group}.{key}: found {value}, allowed 0 or more"
        for group in GROUPS
        for key, value in vars(groups.of(group)).items()
        if not 0 <= value < math.inf
    ]


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a configured name; ValueError lists what is allowed."""
    if name not in DTYPES:
        raise ValueError(f"optimizer dtype {name!r} is unknown; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
