"""Rotary position embedding, plain or YaRN exactly as DeepSeek's code has it (V3 section 4.3).

Shape letters: T positions, R rotary dimensions, P pairs (R / 2).
"""

from __future__ import annotations

import math

import torch

from model.config import ModelConfig, RopeScaling
from model.norm import promoted


def plain_frequencies(dimensions: int, base: float) -> torch.Tensor:
    """base^(-2i / dimensions) for pair i: [dimensions / 2] float64."""
    exponent_P = torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions
    return base**-exponent_P


def correction_range(dimensions: int, base: float, scaling: RopeScaling) -> tuple[int, int]:
    """First and last pair of YaRN's ramp: pairs up to `low` keep their frequency, from `high` on it is divided by
    `factor`.

    find(n) = dimensions * ln(original_length / (2 pi n)) / (2 ln base) is the pair that turns n times in the original
    length. DeepSeek's ramp is linear in the pair's index, not in its number of turns as in the YaRN paper.
    """

    def find(turns: float) -> float:
        return dimensions * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(find(scaling.beta_fast)), 0)
    high = min(math.ceil(find(scaling.beta_slow)), dimensions - 1)
    return low, high


def yarn_frequencies(dimensions: int, base: float, scaling: RopeScaling) -> torch.Tensor:
    """Plain frequencies at the fast end, divided by `factor` at the slow end, a linear ramp between: [dimensions / 2]
    float64.
    """
    low, high = correction_range(dimensions, base, scaling)
    width = high - low if high != low else 0.001
    pair_P = torch.arange(dimensions // 2, dtype=torch.float64)
    interpolated_P = ((pair_P - low) / width).clamp(0, 1)
    frequency_P = plain_frequencies(dimensions, base)
    return frequency_P / scaling.factor * interpolated_P + frequency_P * (1 - interpolated_P)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1; 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_is_on(config: ModelConfig, length: int) -> bool:
    """Whether a model at sequence length `length` has YaRN: only beyond the length of pretraining."""
    return length > config.rope_scaling.original_length


class Rotary:
    """Frequencies and softmax scale for one sequence length.

    YaRN, and with it the factor mscale^2 of the softmax scale, is on only when `length` exceeds
    `rope_scaling.original_length`: pretraining is plain RoPE, and both change together at the first extension.

    softmax_scale: multiplies the whole q.k logit (nope and rope parts together).
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        if length < 1:
            raise ValueError(f"rope: sequence length must be at least 1, found {length}")
        scaling = config.rope_scaling
        dimensions = config.rotary_dim
        self.length = length
        self.yarn = yarn_is_on(config, length)
        self.softmax_scale = config.qk_head_dim**-0.5
        self.magnitude = 1.0
        if self.yarn:
            self.frequency_P = yarn_frequencies(dimensions, config.rope_theta, scaling)
            all_dim = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
            self.magnitude = yarn_mscale(scaling.factor, scaling.mscale) / all_dim
            self.softmax_scale *= all_dim**2
        else:
            self.frequency_P = plain_frequencies(dimensions, config.rope_theta)

    def tables(
        self, positions_T: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [T, R / 2] in the promoted precision of `dtype`, on the device of `positions_T`.

        Angles are formed in float64 whatever the model's precision: position * frequency loses up to 1e-2 of a turn
        in float32 at 128K positions.
        """
        angle_TP = positions_T.to(torch.float64)[:, None] * self.frequency_P.to(positions_T.device)[None, :]
        precision = promoted(dtype)
        return (angle_TP.cos() * self.magnitude).to(precision), (angle_TP.sin() * self.magnitude).to(precision)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = True) -> torch.Tensor:
    """Rotate adjacent pairs (x0, x1), (x2, x3), ... of the last dimension, or (not interleaved) each dimension of the
    first half with its like in the second; the result keeps the order and x's dtype.

    cos and sin broadcast against half of x's last dimension. The inverse rotation is `apply_rope(x, cos, -sin)` when
    their magnitude is 1.
    """
    wide = x.to(promoted(x.dtype))
    if not interleaved:
        first, second = wide.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
