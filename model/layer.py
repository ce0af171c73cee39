"""One transformer layer, dense or MoE. Shape letters: B sequences, T positions, d hidden, E experts, P rotary pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model.attention import Attention
from model.balance import balance_losses
from model.cache import Cache
from model.config import ModelConfig
from model.experts import Experts
from model.grouped_query import GroupedQueryAttention
from model.mlp import MLP
from model.norm import rms_norm
from model.router import Router, expert_load


@dataclass(frozen=True)
class MoEStatistics:
    """balance: each balance loss of each sequence [B], without its weight, differentiable. load_E: real tokens per
    expert, int64.
    """

    balance: dict[str, torch.Tensor]
    load_E: torch.Tensor


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP dense, or shared expert plus routed experts.

    attn_norm, mlp_norm [d]; attention; mlp (dense) or router, shared, experts (MoE). `experts`: the slice [first,
    last) of routed experts held here. Parameters are uninitialised; see `model.initialize`.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: bool,
        experts: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.moe = moe
        d = config.hidden_size
        self.attn_norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))
        self.attention: Attention | GroupedQueryAttention
        if config.attention == "gqa":
            self.attention = GroupedQueryAttention(config, dtype, device)
        else:
            self.attention = Attention(config, dtype, device)
        self.mlp_norm = nn.Parameter(torch.empty(d, dtype=dtype, device=device))
        if moe:
            self.router = Router(config, dtype, device)
            self.shared = MLP(d, config.num_shared_experts * config.moe_intermediate_size, dtype, device)
            self.experts = Experts(config, experts, dtype, device)
        else:
            self.mlp = MLP(d, config.intermediate_size, dtype, device)

    def forward(
        self,
        x_BTd: torch.Tensor,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        softmax_scale: float,
        real_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, MoEStatistics | None]:
        """[B, T, d] -> [B, T, d], and the MoE statistics (None for a dense layer) over the tokens marked real."""
        eps = self.config.rms_norm_eps
        attended = self.attention(rms_norm(x_BTd, self.attn_norm, eps), cos_TP, sin_TP, softmax_scale, cache)
        x_BTd = x_BTd + attended
        normed_BTd = rms_norm(x_BTd, self.mlp_norm, eps)
        if not self.moe:
            return x_BTd + self.mlp(normed_BTd), None
        routing = self.router(normed_BTd)
        routed_Td = self.experts(
            normed_BTd.flatten(0, 1), routing.index_TK.flatten(0, 1), routing.weight_TK.flatten(0, 1)
        )
        statistics = MoEStatistics(
            balance_losses(routing.score_TE, routing.index_TK, self.config, real_BT),
            expert_load(routing.index_TK, self.config.num_routed_experts, real_BT),
        )
        return x_BTd + self.shared(normed_BTd) + routed_Td.view_as(x_BTd), statistics
