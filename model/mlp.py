"""SwiGLU MLP: the dense layers' and the shared expert's. Shape letters: d hidden, f intermediate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2f], gate first: [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """down(silu(gate x) * up x). gate_up [2f, d] (gate rows first), down [d, f]."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate, hidden, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(hidden, intermediate, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(swiglu(F.linear(x, self.gate_up)), self.down)
