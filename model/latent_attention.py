"""MLA between its down- and output projections: a core that recomputes its up-projections.

Kept for the backward: the two latents, the attention output (E5M6 with FP8 on) and the softmax statistics. Queries,
keys and values are computed again (V3 section 3.2.3).

Shape letters: N tokens (= B sequences x T positions), H heads, R rotary width, P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels import attention as kernel
from kernels.rope import rotate, rotate_
from model.attention import Attention
from model.attention_core import Geometry
from model.operands import USED, Input
from model.ops import Ops


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
        self._expanded: _Expanded | None = None
        self.rope, self.latent, self.compressed = config.qk_rope_head_dim, config.kv_lora_rank, config.q_lora_rank > 0

    def project(self, x: torch.Tensor, given: Input) -> tuple[torch.Tensor, ...]:
        """Latent queries (the queries without compression), and latent keys and values with the rotary key."""
        m, ops = self.module, self.ops
        first = ("q_a", m.q_a) if self.compressed else ("q", m.q)
        q_latent = ops.linear(x, first[1], given, f"{self.name}.{first[0]}")
        return q_latent, ops.linear(x, m.kv_a, given, f"{self.name}.kv_a")

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        return rotate(x, g.cos_TP, g.sin_TP, self.module.config.rope_interleaved)

    def _rotate_in_place(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        g = self.geometry
        return rotate_(x, g.cos_TP, -g.sin_TP if back else g.sin_TP, self.module.config.rope_interleaved)

    def expand(self, q_latent: torch.Tensor, kv_latent: torch.Tensor) -> _Expanded:
        """Queries, keys and values from the latents ([N, q_rank], [N, kv_rank + R])."""
        m, ops, g = self.module, self.ops, self.geometry
        q_input: Input | None = None
        if self.compressed:
            q_input = ops.norm_input(q_latent, m.q_norm.detach())
            query = ops.multiply(q_input, m.q_b, f"{self.name}.q_b")
        else:
            query = q_latent.clone()
        q = g.heads(query, self.heads)
        self._rotate_in_place(q[..., self.nope :])
        latent, rope_key = kv_latent.split((self.latent, self.rope), -1)
        kv_input = ops.norm_input(latent, m.kv_norm.detach())
        k_nope, v = g.heads(ops.multiply(kv_input, m.kv_b, f"{self.name}.kv_b"), self.heads).split(
            (self.nope, self.value), -1
        )
        key = self._rotate(rope_key.view(g.sequences, 1, g.length, self.rope))
        k = torch.cat((k_nope, key.expand(-1, self.heads, -1, -1)), -1)
        return _Expanded(q, k, v, q_input, kv_input)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [N, H * C], softmax statistics)."""
        e = self.expand(*inputs)
        if not self.ops.recompute:
            # Products have used the rows of the inputs; their weight gradients take the columns.
            q_input = e.q_input and replace(e.q_input, rows=USED)
            self._expanded = replace(e, q_input=q_input, kv_input=replace(e.kv_input, rows=USED))
        out, statistics = kernel.attention(e.q_BHTx, e.k_BHTx, e.v_BHTC, self.geometry.softmax_scale)
        return self.geometry.flat(out), statistics

    def backward(
        self,
        dout: torch.Tensor,
        inputs: tuple[torch.Tensor, ...],
        out: torch.Tensor,
        statistics: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of the latents; weight gradients of the up-projections and norms go to the store."""
        m, ops, g = self.module, self.ops, self.geometry
        q_latent, kv_latent = inputs
        e, self._expanded = self._expanded or self.expand(q_latent, kv_latent), None
        dq, dk, dv = kernel.attention_backward(
            g.heads(dout, self.heads),
            e.q_BHTx,
            e.k_BHTx,
            e.v_BHTC,
            g.heads(out, self.heads),
            statistics,
            g.softmax_scale,
        )
        self._rotate_in_place(dq[..., self.nope :], back=True)
        dquery = g.flat(dq)
        dk_nope, dk_rope = dk.split((self.nope, self.rope), -1)
        high = torch.promote_types(dk.dtype, torch.float32)
        drope_key = self._rotate_in_place(dk_rope.to(high).sum(1), back=True).reshape(g.tokens, self.rope)
        dkv = torch.cat((dk_nope.transpose(1, 2), dv.transpose(1, 2)), -1).view(g.tokens, -1)
        dkv_normed = ops.multiply_backward(dkv, e.kv_input, m.kv_b, f"{self.name}.kv_b")
        backward = ops.kernels.norm.rmsnorm_backward
        dlatent, dkv_gain = backward(dkv_normed, kv_latent[:, : self.latent], m.kv_norm.detach(), ops.eps)
        ops.store.put(m.kv_norm, lambda: dkv_gain)
        dkv_latent = torch.cat((dlatent, drope_key.to(dlatent.dtype)), -1)
        if e.q_input is None:
            return dquery, dkv_latent
        dq_normed = ops.multiply_backward(dquery, e.q_input, m.q_b, f"{self.name}.q_b")
        dq_latent, dq_gain = backward(dq_normed, q_latent, m.q_norm.detach(), ops.eps)
        ops.store.put(m.q_norm, lambda: dq_gain)
        return dq_latent, dkv_latent
