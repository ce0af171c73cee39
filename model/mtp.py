"""Multi-token prediction (V3 section 2.2). Shape letters: B sequences, T positions, d hidden, P rotary pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.cache import Cache
from model.config import ModelConfig
from model.layer import MoEStatistics, TransformerLayer
from model.norm import rms_norm


class MultiTokenPrediction(nn.Module):
    """One depth: embed_norm, hidden_norm [d], proj [d, 2d], layer (MoE, or dense in a dense model), norm [d].

    Equation 21 with the embedding first, as the released `eh_proj` is consumed. Embedding and head are the main
    model's and are not here. The state that enters depth 1 is the main model's *after* its final norm, and each depth
    hands on its state after its own norm: the report does not say, and transformers, vLLM and SGLang do so.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))
        self.hidden_norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))
        self.proj = nn.Parameter(torch.empty(d, 2 * d, dtype=dtype, device=device))
        self.layer = TransformerLayer(config, config.has_experts, experts, dtype, device)
        self.norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))

    def join(self, hidden_BTd: torch.Tensor, embedded_BTd: torch.Tensor) -> torch.Tensor:
        """proj [norm(embedding); norm(hidden)]: [B, T, d]."""
        eps = self.config.rms_norm_eps
        both = (rms_norm(embedded_BTd, self.embed_norm, eps), rms_norm(hidden_BTd, self.hidden_norm, eps))
        return F.linear(torch.cat(both, dim=-1), self.proj)

    def forward(
        self,
        hidden_BTd: torch.Tensor,
        embedded_BTd: torch.Tensor,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        softmax_scale: float,
        real_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, MoEStatistics | None]:
        """State of the depth before (normed) and embeddings of the tokens k ahead -> this depth's state (normed)."""
        x_BTd, statistics = self.layer(
            self.join(hidden_BTd, embedded_BTd), cos_TP, sin_TP, softmax_scale, real_BT, cache
        )
        return rms_norm(x_BTd, self.norm, self.config.rms_norm_eps), statistics
