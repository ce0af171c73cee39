"""RMSNorm: y = x * gain / sqrt(mean(x^2) + eps), computed in FP32 at least (float64 stays) and rounded once.

Shapes: x [..., D], gain [D]. Backward recomputes the normalisation from x, so nothing but x need be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantize import Quantized, quantize_columns, quantize_rows


def rmsnorm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """[..., D] -> [..., D] in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * _inverse_rms(wide, eps)).mul_(gain_D.to(wide.dtype)).to(x.dtype)


def rmsnorm_rows(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool = False) -> tuple[Tensor, Quantized]:
    """[M, D] -> (y [M, D] in x's dtype, its 1x128 tiles), the tiles from the rounded y: what a linear in FP8 and one
    outside the FP8 set take of the same y is the same number. D: any multiple of 16."""
    y_MD = rmsnorm(x_MD, gain_D, eps)
    return y_MD, quantize_rows(y_MD, power_of_two)


def rmsnorm_columns(x_MD: Tensor, gain_D: Tensor, eps: float) -> Quantized:
    """[M, D] -> y computed again and quantised along tokens, for the weight gradient: data [D, M], scale
    [D, ceil(M/128)]."""
    return quantize_columns(rmsnorm(x_MD, gain_D, eps))


def rmsnorm_backward(dy: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dy, x [..., D] -> (dx [..., D] in x's dtype, dgain [D] in FP32 at least).

    With r = 1 / rms and s = sum(dy * x * gain): dx = r * dy * gain - r^3 * s / D * x, dgain = sum over rows of
    r * dy * x. ValueError: dy is not of x's shape, or elsewhere.
    """
    _check_gradient(dy, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    wide_dy = dy.to(wide.dtype).reshape(wide.shape)
    gain = gain_D.to(wide.dtype)
    inverse_rms = _inverse_rms(wide, eps)
    product = wide_dy * wide
    # Both sums over `product` as matrix-vector products: one pass each.
    dgain_D = product.t() @ inverse_rms.squeeze(-1)
    projection = (product @ gain).div_(-x.shape[-1]).unsqueeze(-1).mul_(inverse_rms.pow(3))
    dx = torch.mul(wide_dy, gain, out=product).mul_(inverse_rms).addcmul_(wide, projection)
    return dx.to(x.dtype).view(x.shape), dgain_D


def _check_gradient(dy: Tensor, x: Tensor) -> None:
    """ValueError: dy is not of x's shape, or elsewhere: as many elements in other rows would be taken for these."""
    if dy.shape != x.shape or dy.device != x.device:
        raise ValueError(
            f"rmsnorm_backward: dy {tuple(dy.shape)} on {dy.device}, x {tuple(x.shape)} on {x.device}; allowed is one "
            "shape on one device"
        )


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    # The root of the sum of squares in one pass, without a tensor of squares.
    root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return root.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()
