"""The optimizer's numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class OptimizerConfig:
    """AdamW as DeepSeek-V3 trains (section 4.2), in its dtypes (section 3.3).

    clip: largest global gradient norm; 0 turns clipping off. The dtypes are torch names: masters and accumulation
    `float32`, moments `bfloat16`; a float64 model sets all three to `float64`.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    master_dtype: str = "float32"
    moment_dtype: str = "bfloat16"
    accumulate_dtype: str = "float32"


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a configured name; ValueError lists what is allowed."""
    if name not in DTYPES:
        raise ValueError(f"optimizer dtype {name!r} is unknown; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
