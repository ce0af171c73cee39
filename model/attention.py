"""Multi-head latent attention (V3 equations 1-11), naive and absorbed.

Naive: latents are projected up to full keys and values; the definition, and the form of training. Absorbed (V2 section
2.1.2, `absorb` in DeepSeek's inference code): the key projection is applied to the query and the value projection to
the weighted sum of latents, so that decoding reads the cached latents as they are.

Shape letters: B sequences, T query positions, S key positions (cached ones included), d hidden, H heads, Q query rank,
L key-value rank, N nope dimensions, R rotary dimensions, P rotary pairs, C value dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.cache import Cache, LatentCache
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


def absorbed_attention(
    query_BTHL: torch.Tensor,
    rope_query_BTHR: torch.Tensor,
    latent_BSL: torch.Tensor,
    rope_key_BSR: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """`causal_attention` of all heads to the same S latents, keys and values at once: [B, T, H, L].

    A query-key pair costs 2L + R multiplications per head instead of N + R + C, and nothing per key besides: less than
    the naive form for few queries, more for many.
    """
    T, S = query_BTHL.shape[1], latent_BSL.shape[1]
    blocks = []
    for first in range(0, T, QUERY_BLOCK):
        query, rope_query = (q[:, first : first + QUERY_BLOCK] for q in (query_BTHL, rope_query_BTHR))
        seen = S - T + first + query.shape[1]
        latent, rope_key = latent_BSL[:, :seen], rope_key_BSR[:, :seen]
        # Heads are rows beside positions: one product per sequence, and no copy of the latents for each head.
        score = query.flatten(1, 2) @ latent.transpose(-1, -2) + rope_query.flatten(1, 2) @ rope_key.transpose(-1, -2)
        score_BtHS = score.to(promoted(query.dtype)).unflatten(1, query.shape[1:3]) * softmax_scale
        future = torch.ones(query.shape[1], seen, dtype=torch.bool, device=score.device).triu(S - T + first + 1)
        probability = score_BtHS.masked_fill(future[:, None], float("-inf")).softmax(-1).to(latent.dtype)
        blocks.append((probability.flatten(1, 2) @ latent).unflatten(1, query.shape[1:3]))
    return torch.cat(blocks, dim=1)


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
        return torch.cat((nope, apply_rope(rope, cos_TP, sin_TP, config.rope_interleaved)), dim=-1)

    def compress(
        self, x_BTd: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latent [B, T, L] and rotated shared key [B, T, R]: all that a cache needs."""
        config = self.config
        latent, rope = F.linear(x_BTd, self.kv_a).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return rms_norm(latent, self.kv_norm, config.rms_norm_eps), apply_rope(
            rope, cos_TP, sin_TP, config.rope_interleaved
        )

    def expand(self, latent_BSL: torch.Tensor, rope_key_BSR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, S, N+R] and values [B, H, S, C] of every head."""
        config = self.config
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        up_BHSx = F.linear(latent_BSL, self.kv_b).unflatten(-1, (config.num_heads, sum(widths))).transpose(1, 2)
        nope_BHSN, value_BHSC = up_BHSx.split(widths, dim=-1)
        rope_BHSR = rope_key_BSR[:, None].expand(-1, config.num_heads, -1, -1)
        return torch.cat((nope_BHSN, rope_BHSR), dim=-1), value_BHSC

    def reads_latents(self, cache: LatentCache, T: int, S: int) -> bool:
        """Whether T queries to S keys take the absorbed form; a cache that leaves it open gets what multiplies less."""
        if cache.absorbed is not None:
            return cache.absorbed
        c = self.config
        up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        return T * up + T * S * (2 * c.kv_lora_rank + c.qk_rope_head_dim) < S * up + T * S * (
            c.qk_head_dim + c.v_head_dim
        )

    def absorbed(
        self, query_BHTx: torch.Tensor, latent_BSL: torch.Tensor, rope_key_BSR: torch.Tensor, softmax_scale: float
    ) -> torch.Tensor:
        """`causal_attention` over what `expand` gives, [B, H, T, C], without keys or values of any head."""
        config = self.config
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        key_HNL, value_HCL = self.kv_b.unflatten(0, (config.num_heads, sum(widths))).split(widths, dim=1)
        nope, rope = query_BHTx.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        query_BTHL = (nope @ key_HNL).transpose(1, 2)
        summed_BTHL = absorbed_attention(query_BTHL, rope.transpose(1, 2), latent_BSL, rope_key_BSR, softmax_scale)
        return summed_BTHL.transpose(1, 2) @ value_HCL.transpose(-1, -2)

    def forward(
        self,
        x_BTd: torch.Tensor,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        softmax_scale: float,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Causal self-attention over [B, T, d] (normalised input), without the residual. No mask between documents
        (V3). A cache says by `absorbed` in which form it is read.
        """
        query_BHTx = self.query(x_BTd, cos_TP, sin_TP)
        latent, rope_key = self.compress(x_BTd, cos_TP, sin_TP)
        if cache is not None:
            latent, rope_key = cache.append(latent, rope_key)
        if isinstance(cache, LatentCache) and self.reads_latents(cache, x_BTd.shape[1], latent.shape[1]):
            output_BHTC = self.absorbed(query_BHTx, latent, rope_key, softmax_scale)
        else:
            key_BHSx, value_BHSC = self.expand(latent, rope_key)
            output_BHTC = causal_attention(query_BHTx, key_BHSx, value_BHSC, softmax_scale)
        return F.linear(output_BHTC.transpose(1, 2).flatten(-2), self.o)
