"""The routed experts that a rank holds, stacked. Shape letters: T tokens, d hidden, f intermediate, E experts, K per
token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.mlp import swiglu


class Experts(nn.Module):
    """gate_up [E_local, 2f, d] and down [E_local, d, f] of experts [first, last)."""

    def __init__(
        self,
        config: ModelConfig,
        experts: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.first, self.last = experts if experts is not None else (0, config.num_routed_experts)
        if not 0 <= self.first < self.last <= config.num_routed_experts:
            raise ValueError(f"experts: slice {experts} is not within 0..{config.num_routed_experts}")
        self.total = config.num_routed_experts
        local, d, f = self.last - self.first, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(local, 2 * f, d, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(local, d, f, dtype=dtype, device=device))

    def forward(self, x_Td: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, [T, d]; a loop over experts, the definition. All experts must be here.

        The router weight multiplies the SwiGLU output, before the down-projection.
        """
        if (self.first, self.last) != (0, self.total):
            raise RuntimeError(
                f"experts: forward needs all {self.total} experts, this rank holds {self.first}..{self.last}"
            )
        output_Td = torch.zeros_like(x_Td)
        for expert in range(self.total):
            token, slot = (index_TK == expert).nonzero(as_tuple=True)
            inner = swiglu(F.linear(x_Td[token], self.gate_up[expert]))
            weighted = (inner * weight_TK[token, slot, None]).to(x_Td.dtype)
            output_Td = output_Td.index_add(0, token, F.linear(weighted, self.down[expert]))
        return output_Td
