"""SwiGLU with the router's weight: h = silu(gate) * up * weight (V3 section 2.1.2), in FP32 at least, rounded once.

Shapes: M rows, F hidden features; gate_up [M, 2F] holds gate in its first F columns, up in the rest; row_weight [M].
The weight multiplies here, before the down-projection, so that combining experts is a plain sum. Backward recomputes
from gate_up, which is all that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor, row_weight_M: Tensor | None = None) -> Tensor:
    """[M, 2F] -> [M, F] in gate_up's dtype."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = wide.chunk(2, -1)
    hidden = F.silu(gate).mul_(up)
    if row_weight_M is not None:
        hidden.mul_(row_weight_M.to(wide.dtype).unsqueeze(-1))
    return hidden.to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dy [M, F] -> (dgate_up [M, 2F] in gate_up's dtype, drow_weight [M] in FP32 at least, None without weights)."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    wide_dy = dy.to(wide.dtype)
    gate, up = wide.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    drow_weight_M = None
    if row_weight_M is not None:
        drow_weight_M = (silu * up).mul_(wide_dy).sum(-1)
        wide_dy = wide_dy * row_weight_M.to(wide.dtype).unsqueeze(-1)
    dgate_up = torch.empty_like(wide)
    dgate, dup = dgate_up.chunk(2, -1)
    torch.mul(wide_dy, silu, out=dup)
    # silu'(g) = s * (1 + g * (1 - s)) = s + silu(g) * (1 - s)
    slope = torch.addcmul(sigmoid, silu, 1.0 - sigmoid)
    torch.mul(slope, up, out=dgate).mul_(wide_dy)
    return dgate_up.to(gate_up.dtype), drow_weight_M
