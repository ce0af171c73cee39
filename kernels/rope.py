"""Rotary position embedding: pair (x0, x1) becomes (x0 + i x1) * (cos + i sin) (RoFormer eq. 34).

Pair j is dimensions 2j and 2j + 1 (`interleaved`, DeepSeek-V2 and V3) or j and j + R/2 (DeepSeek LLM, as Llama).

Shapes: x [..., R] with R even, cos and sin [..., R/2] broadcast against x's pairs: [T, R/2] for x [..., T, R],
[T, 1, R/2] for x [..., T, heads, R].
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate pair j by its angle; computed in FP32 at least and rounded once to x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if not interleaved:
        first, second = x.to(compute).chunk(2, -1)
        cos, sin = cos.to(compute), sin.to(compute)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    pairs = torch.view_as_complex(x.to(compute).contiguous().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(cos.to(compute), sin.to(compute))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """`rotate` in place, without a copy where pairs can be seen as complex numbers in the precision of the product."""
    aligned = not any(stride % 2 for stride in (*x.stride()[:-1], x.storage_offset()))
    if interleaved and aligned and x.stride(-1) == 1 and x.dtype == torch.promote_types(x.dtype, torch.float32):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.complex(cos.to(x.dtype), sin.to(x.dtype)))
        return x
    return x.copy_(rotate(x, cos, sin, interleaved))


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """The inverse rotation, which is the transpose: the backward of `rotate`."""
    return rotate(x, cos, -sin, interleaved)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, without complex numbers."""
    compute = torch.promote_types(x.dtype, torch.float32)
    first, second = x[..., 0::2].to(compute), x[..., 1::2].to(compute)
    cos, sin = cos.to(compute), sin.to(compute)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)
