"""MLA between its down- and output projections, as one differentiable operation that recomputes its up-projections.

Kept for the backward: the two latents, the attention output (E5M6 with FP8 on) and the softmax statistics. Queries,
keys and values are computed again (V3 section 3.2.3).

Shape letters: N tokens (= B sequences x T positions), H heads, R rotary width, P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function

from kernels import attention as kernel
from kernels import norm
from kernels.rope import rotate, rotate_back
from model.attention import Attention
from model.ops import Input, Kept, Ops
from model.recompute import Cell


@dataclass(frozen=True)
class Geometry:
    """A chunk's shape and rotary tables: sequences x length tokens; cos, sin [T, P]; softmax scale."""

    sequences: int
    length: int
    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    softmax_scale: float

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass
class _Expanded:
    q_BHTx: torch.Tensor
    k_BHTx: torch.Tensor
    v_BHTC: torch.Tensor
    q_input: Input | None
    kv_input: Input


class LatentAttention:
    """One layer's attention core on one chunk."""

    def __init__(self, module: Attention, ops: Ops, geometry: Geometry, name: str) -> None:
        self.module, self.ops, self.geometry, self.name = module, ops, geometry, name
        config = module.config
        self.heads, self.nope, self.value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
        self.rope, self.latent, self.compressed = config.qk_rope_head_dim, config.kv_lora_rank, config.q_lora_rank > 0

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H * width] -> [B, H, T, width]."""
        g = self.geometry
        return x.view(g.sequences, g.length, self.heads, -1).transpose(1, 2)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T, width] -> [N, H * width]."""
        return x.transpose(1, 2).reshape(self.geometry.tokens, -1)

    def expand(self, q_latent: torch.Tensor, kv_latent: torch.Tensor) -> _Expanded:
        """Queries, keys and values from the latents ([N, q_rank], [N, kv_rank + R])."""
        m, ops, g = self.module, self.ops, self.geometry
        q_input: Input | None = None
        if self.compressed:
            q_norm_gain = m.q_norm.detach()
            q_normed = norm.rmsnorm(q_latent, q_norm_gain, ops.eps)
            q_input = ops.recomputed(q_normed, Cell(lambda: norm.rmsnorm(q_latent, q_norm_gain, ops.eps)))
            query = ops.multiply(q_input, m.q_b, f"{self.name}.q_b")
        else:
            query = q_latent
        q_nope, q_rope = self._heads(query).split((self.nope, self.rope), -1)
        q = torch.cat((q_nope, rotate(q_rope, g.cos_TP, g.sin_TP)), -1)
        latent, rope_key = kv_latent.split((self.latent, self.rope), -1)
        gain = m.kv_norm.detach()
        kv_normed = norm.rmsnorm(latent, gain, ops.eps)
        kv_input = ops.recomputed(kv_normed, Cell(lambda: norm.rmsnorm(latent, gain, ops.eps)))
        k_nope, v = self._heads(ops.multiply(kv_input, m.kv_b, f"{self.name}.kv_b")).split((self.nope, self.value), -1)
        key = rotate(rope_key.view(g.sequences, 1, g.length, self.rope), g.cos_TP, g.sin_TP)
        k = torch.cat((k_nope, key.expand(-1, self.heads, -1, -1)), -1)
        return _Expanded(q, k, v, q_input, kv_input)

    def forward(self, q_latent: torch.Tensor, kv_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [N, H * C], softmax statistics)."""
        e = self.expand(q_latent, kv_latent)
        out, statistics = kernel.attention(e.q_BHTx, e.k_BHTx, e.v_BHTC, self.geometry.softmax_scale)
        return self._flat(out), statistics

    def backward(
        self,
        dout: torch.Tensor,
        q_latent: torch.Tensor,
        kv_latent: torch.Tensor,
        out: torch.Tensor,
        statistics: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the latents; weight gradients of the up-projections and norms go to the store."""
        m, ops, g = self.module, self.ops, self.geometry
        e = self.expand(q_latent, kv_latent)
        dq, dk, dv = kernel.attention_backward(
            self._heads(dout), e.q_BHTx, e.k_BHTx, e.v_BHTC, self._heads(out), statistics, g.softmax_scale
        )
        dq_nope, dq_rope = dq.split((self.nope, self.rope), -1)
        dquery = self._flat(torch.cat((dq_nope, rotate_back(dq_rope, g.cos_TP, g.sin_TP)), -1))
        dk_nope, dk_rope = dk.split((self.nope, self.rope), -1)
        high = torch.promote_types(dk.dtype, torch.float32)
        drope_key = rotate_back(dk_rope.to(high).sum(1), g.cos_TP, g.sin_TP).reshape(g.tokens, self.rope)
        dkv = self._flat(torch.cat((dk_nope, dv), -1))
        dkv_normed = ops.multiply_backward(dkv, e.kv_input, m.kv_b, f"{self.name}.kv_b")
        dlatent, dkv_gain = norm.rmsnorm_backward(dkv_normed, kv_latent[:, : self.latent], m.kv_norm.detach(), ops.eps)
        ops.store.put(m.kv_norm, lambda: dkv_gain)
        dkv_latent = torch.cat((dlatent, drope_key.to(dlatent.dtype)), -1)
        if e.q_input is None:
            return dquery, dkv_latent
        dq_normed = ops.multiply_backward(dquery, e.q_input, m.q_b, f"{self.name}.q_b")
        dq_latent, dq_gain = norm.rmsnorm_backward(dq_normed, q_latent, m.q_norm.detach(), ops.eps)
        ops.store.put(m.q_norm, lambda: dq_gain)
        return dq_latent, dkv_latent


class _LatentAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q_latent: torch.Tensor, kv_latent: torch.Tensor, core: LatentAttention, keeps: list[Kept]
    ) -> torch.Tensor:
        q_latent, kv_latent = q_latent.detach(), kv_latent.detach()
        out, statistics = core.forward(q_latent, kv_latent)
        # Detached: what this node returns will point back to the node, which keeps it, and neither would be freed.
        keeps.append(core.ops.keep_attention_output(out.detach()))
        ctx.kept = q_latent, kv_latent, core, keeps[-1], statistics
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q_latent, kv_latent, core, kept, statistics = ctx.kept
        dq, dkv = core.backward(grads[0].detach(), q_latent, kv_latent, kept(), statistics)
        return dq, dkv, None, None


def latent_attention(
    q_latent: torch.Tensor, kv_latent: torch.Tensor, core: LatentAttention
) -> tuple[torch.Tensor, Kept]:
    """(attention output [N, H * C], its cache, which the output projection shares)."""
    keeps: list[Kept] = []
    out = _LatentAttention.apply(q_latent, kv_latent, core, keeps)
    return out, keeps[0]
