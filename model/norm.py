"""RMSNorm."""

from __future__ import annotations

import torch


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The precision of norms, router, softmax, RoPE and losses: at least float32, float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in promoted precision, returned in x's dtype."""
    precision = promoted(x.dtype)
    wide = x.to(precision)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(precision)).to(x.dtype)
