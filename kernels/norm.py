"""RMSNorm: y = x * gain / sqrt(mean(x^2) + eps), computed in FP32 at least (float64 stays) and rounded once.

Shapes: x [..., D], gain [D]. Backward recomputes the normalisation from x, so nothing but x need be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """[..., D] -> [..., D] in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * _inverse_rms(wide, eps)).mul_(gain_D.to(wide.dtype)).to(x.dtype)


def rmsnorm_backward(dy: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dy, x [..., D] -> (dx [..., D] in x's dtype, dgain [D] in FP32 at least).

    With n = x / rms and h = dy * gain: dx = (h - n * mean(h * n)) / rms, dgain = sum over rows of dy * n.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide_dy = dy.to(wide.dtype)
    inverse_rms = _inverse_rms(wide, eps)
    normalised = wide * inverse_rms
    product = wide_dy * normalised
    dgain_D = product.reshape(-1, product.shape[-1]).sum(0)
    gain = gain_D.to(wide.dtype)
    # mean(h * n) as a matrix-vector product: one pass over `product` instead of two.
    projection = (product @ gain).div_(x.shape[-1]).unsqueeze(-1)
    dx = (wide_dy * gain).addcmul_(normalised, projection, value=-1).mul_(inverse_rms)
    return dx.to(x.dtype), dgain_D


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
