"""AdamW (Loshchilov and Hutter, algorithm 2) on flat slices, in place.

Masters in FP32 (or float64); moments in BF16 as DeepSeek-V3 keeps them (section 3.3.3), in FP32 or float64. Moments are
widened, updated in the master's precision, used unrounded in this step's update, and rounded to nearest when stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements per piece: a piece and its temporaries stay in the cache.
PIECE = 1 << 17


def adamw(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Update `master` and both moments in place; `grad` is not changed.

    All four have the same shape and are contiguous. step: 1 for the first update. grad_scale: factor on the
    gradient (clipping). With g = grad * grad_scale:
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        master = master (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
    """
    tensors = (master, exp_avg, exp_avg_sq, grad)
    if len({t.shape for t in tensors}) != 1 or not all(t.is_contiguous() for t in tensors):
        raise ValueError(
            f"adamw: contiguous tensors of one shape are needed; found {[tuple(t.shape) for t in tensors]}"
        )
    if step < 1:
        raise ValueError(f"adamw: step {step}; the first update is step 1")
    compute = torch.promote_types(master.dtype, torch.float32)
    if master.dtype != compute:
        raise TypeError(f"adamw: master weights are {master.dtype}; allowed are float32 and float64")
    step_size = lr / (1.0 - beta1**step)
    root_correction = math.sqrt(1.0 - beta2**step)
    pieces = [tensor.view(-1).split(PIECE) for tensor in tensors]
    for weight, first, second, piece in zip(*pieces, strict=True):
        g = piece.to(compute)
        if grad_scale != 1.0:
            g = g * grad_scale
        m, v = first.to(compute), second.to(compute)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        if m is not first:
            first.copy_(m)
        if v is not second:
            second.copy_(v)
        weight.mul_(1.0 - lr * weight_decay).addcdiv_(m, v.sqrt().div_(root_correction).add_(eps), value=-step_size)
