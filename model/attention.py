"""Multi-head latent attention (V3 equations 1-11), in its naive form: latents are projected up to full keys and values.

Shape letters: B sequences, T query positions, S key positions (cached ones included), d hidden, H heads, Q query rank,
L key-value rank, N nope dimensions, R rotary dimensions, P rotary pairs, C value dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.cache import Cache
from model.config import ModelConfig
from model.norm import promoted, rms_norm
from model.rope import apply_rope

QUERY_BLOCK = 512


def causal_attention(
    query_BHTx: torch.Tensor, key_BHSx: torch.Tensor, value_BHSC: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v with the last query at the last key; softmax in promoted precision. Returns [B, H, T,
    C].

    Queries go in blocks, each against the keys up to its own last one, so that long texts do not need T x S scores at
    once.
    """
    T, S = query_BHTx.shape[-2], key_BHSx.shape[-2]
    blocks = []
    for first in range(0, T, QUERY_BLOCK):
        query = query_BHTx[..., first : first + QUERY_BLOCK, :]
        seen = S - T + first + query.shape[-2]
        score = (query @ key_BHSx[..., :seen, :].transpose(-1, -2)).to(promoted(query.dtype)) * softmax_scale
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(S - T + first + 1)
        probability = score.masked_fill(future, float("-inf")).softmax(-1)
        blocks.append(probability.to(value_BHSC.dtype) @ value_BHSC[..., :seen, :])
    return torch.cat(blocks, dim=-2)


class Attention(nn.Module):
    """q_a [Q, d], q_norm [Q], q_b [H*(N+R), Q] (or q [H*(N+R), d] when q_lora_rank is 0), kv_a [L+R, d], kv_norm [L],
    kv_b [H*(N+C), L] (per head N key rows, then C value rows), o [d, H*C].
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        d, heads = config.hidden_size, config.num_heads
        Q, L, R = config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        if Q:
            self.q_a = parameter(Q, d)
            self.q_norm = parameter(Q)
            self.q_b = parameter(heads * config.qk_head_dim, Q)
        else:
            self.q = parameter(heads * config.qk_head_dim, d)
        self.kv_a = parameter(L + R, d)
        self.kv_norm = parameter(L)
        self.kv_b = parameter(heads * (config.qk_nope_head_dim + config.v_head_dim), L)
        self.o = parameter(d, heads * config.v_head_dim)

    def query(self, x_BTd: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, T, N+R], rotary part rotated."""
        config = self.config
        if config.q_lora_rank:
            query = F.linear(rms_norm(F.linear(x_BTd, self.q_a), self.q_norm, config.rms_norm_eps), self.q_b)
        else:
            query = F.linear(x_BTd, self.q)
        query_BHTx = query.unflatten(-1, (config.num_heads, config.qk_head_dim)).transpose(1, 2)
        nope, rope = query_BHTx.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return torch.cat((nope, apply_rope(rope, cos_TP, sin_TP)), dim=-1)

    def compress(
        self, x_BTd: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latent [B, T, L] and rotated shared key [B, T, R]: all that a cache needs."""
        config = self.config
        latent, rope = F.linear(x_BTd, self.kv_a).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return rms_norm(latent, self.kv_norm, config.rms_norm_eps), apply_rope(rope, cos_TP, sin_TP)

    def expand(self, latent_BSL: torch.Tensor, rope_key_BSR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, S, N+R] and values [B, H, S, C] of every head."""
        config = self.config
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        up_BHSx = F.linear(latent_BSL, self.kv_b).unflatten(-1, (config.num_heads, sum(widths))).transpose(1, 2)
        nope_BHSN, value_BHSC = up_BHSx.split(widths, dim=-1)
        rope_BHSR = rope_key_BSR[:, None].expand(-1, config.num_heads, -1, -1)
        return torch.cat((nope_BHSN, rope_BHSR), dim=-1), value_BHSC

    def forward(
        self,
        x_BTd: torch.Tensor,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        softmax_scale: float,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Causal self-attention over [B, T, d] (normalised input), without the residual. No mask between documents
        (V3).
        """
        query_BHTx = self.query(x_BTd, cos_TP, sin_TP)
        latent, rope_key = self.compress(x_BTd, cos_TP, sin_TP)
        if cache is not None:
            latent, rope_key = cache.append(latent, rope_key)
        key_BHSx, value_BHSC = self.expand(latent, rope_key)
        output_BHTC = causal_attention(query_BHTx, key_BHSx, value_BHSC, softmax_scale)
        return F.linear(output_BHTC.transpose(1, 2).flatten(-2), self.o)
