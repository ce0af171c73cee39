"""Grouped-query attention (LLM section 2.2; with as many key-value heads as heads it is plain multi-head attention).

Shape letters: B sequences, T query positions, S key positions (cached ones included), d hidden, H heads, G key-value
heads, h head dimensions, P rotary pairs, N tokens (= B x T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels import attention as kernel
from kernels.rope import rotate, rotate_back
from model.attention import causal_attention
from model.attention_core import Geometry
from model.cache import Cache
from model.config import ModelConfig
from model.operands import Input
from model.ops import Ops
from model.rope import apply_rope


class GroupedQueryAttention(nn.Module):
    """q [H*h, d], k [G*h, d], v [G*h, d], o [d, H*h]; query head i reads key-value head i // (H / G)."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        d, width = config.hidden_size, config.num_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.q, self.k, self.v = parameter(width, d), parameter(shared, d), parameter(shared, d)
        self.o = parameter(d, width)

    def forward(
        self,
        x_BTd: torch.Tensor,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        softmax_scale: float,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Causal self-attention over [B, T, d] (normalised input), without the residual. No mask between documents."""
        config = self.config

        def heads(weight: nn.Parameter, number: int) -> torch.Tensor:
            return F.linear(x_BTd, weight).unflatten(-1, (number, config.head_dim)).transpose(1, 2)

        query_BHTh = apply_rope(heads(self.q, config.num_heads), cos_TP, sin_TP, config.rope_interleaved)
        key_BGTh = heads(self.k, config.num_key_value_heads)
        key_BGTh = apply_rope(key_BGTh, cos_TP, sin_TP, config.rope_interleaved)
        value_BGTh = heads(self.v, config.num_key_value_heads)
        if cache is not None:
            key_BGTh, value_BGTh = cache.append(key_BGTh, value_BGTh)
        times = config.num_heads // config.num_key_value_heads
        key_BHSh, value_BHSh = (each(x, times) for x in (key_BGTh, value_BGTh))
        output_BHTh = causal_attention(query_BHTh, key_BHSh, value_BHSh, softmax_scale)
        return F.linear(output_BHTh.transpose(1, 2).flatten(-2), self.o)


def each(x_BGSh: torch.Tensor, times: int) -> torch.Tensor:
    """Every key-value head `times` over: [B, G * times, S, h]."""
    return x_BGSh[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


class GroupedQueryCore:
    """One layer's attention core on one chunk: keeps queries, keys and values before their rotation."""

    def __init__(self, module: GroupedQueryAttention, ops: Ops, geometry: Geometry, name: str) -> None:
        self.module, self.ops, self.geometry, self.name = module, ops, geometry, name
        config = module.config
        self.heads, self.shared, self.interleaved = (
            config.num_heads,
            config.num_key_value_heads,
            config.rope_interleaved,
        )

    def project(self, x: torch.Tensor, given: Input) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of all heads."""
        return tuple(
            self.ops.linear(x, getattr(self.module, part), given, f"{self.name}.{part}") for part in ("q", "k", "v")
        )

    def expand(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, of every query head: [B, H, T, h]."""
        g, times = self.geometry, self.heads // self.shared
        q, k, v = (g.heads(x, n) for x, n in zip(inputs, (self.heads, self.shared, self.shared), strict=True))
        q, k = (rotate(x, g.cos_TP, g.sin_TP, self.interleaved) for x in (q, k))
        return q, each(k, times), each(v, times)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [N, H * h], softmax statistics)."""
        out, statistics = kernel.attention(*self.expand(*inputs), self.geometry.softmax_scale)
        return self.geometry.flat(out), statistics

    def backward(
        self, dout: torch.Tensor, inputs: tuple[torch.Tensor, ...], out: torch.Tensor, statistics: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of queries, keys and values; those of a key-value head are summed over its query heads."""
        g = self.geometry
        q, k, v = self.expand(*inputs)
        dq, dk, dv = kernel.attention_backward(
            g.heads(dout, self.heads), q, k, v, g.heads(out, self.heads), statistics, g.softmax_scale
        )
        dtype, high = dout.dtype, torch.promote_types(dout.dtype, torch.float32)
        dk, dv = (x.unflatten(1, (self.shared, -1)).to(high).sum(2) for x in (dk, dv))
        dq, dk = (rotate_back(x, g.cos_TP, g.sin_TP, self.interleaved) for x in (dq, dk))
        return tuple(g.flat(x).to(dtype) for x in (dq, dk, dv))
