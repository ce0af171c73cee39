"""Causal attention core of MLA: head width of q and k may differ from that of v.

Shapes: B sequences, H heads, T positions, K query/key width, V value width (V <= K).
Computed in FP32 at least (float64 stays; BF16 attention takes four times as long on a CPU), rounded once to q's dtype.
The fast path is torch's CPU flash attention with v widened to K by zeros, which leaves scores and sums untouched;
other devices take the plain path. `attention_reference` and its backward are the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, H, T, V] in q's dtype, and lse [B, H, T]: log of each row's sum of exp(scale * q.k), FP32 at least."""
    _check(q_BHTK, k_BHTK, v_BHTV)
    if q_BHTK.device.type != "cpu":
        return attention_reference(q_BHTK, k_BHTK, v_BHTV, scale)
    compute = torch.promote_types(q_BHTK.dtype, torch.float32)
    width, value_width = q_BHTK.shape[-1], v_BHTV.shape[-1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTK.to(compute), k_BHTK.to(compute), _widen(v_BHTV, width, compute), 0.0, True, scale=scale
    )
    return out[..., :value_width].to(q_BHTK.dtype), lse


def attention_backward(
    dout_BHTV: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk [B, H, T, K], dv [B, H, T, V]) in q's dtype; `out` and `lse` as `attention` returned them."""
    _check(q_BHTK, k_BHTK, v_BHTV)
    if q_BHTK.device.type != "cpu":
        return attention_backward_reference(dout_BHTV, q_BHTK, k_BHTK, v_BHTV, out_BHTV, lse_BHT, scale)
    compute = torch.promote_types(q_BHTK.dtype, torch.float32)
    width, value_width = q_BHTK.shape[-1], v_BHTV.shape[-1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _widen(dout_BHTV, width, compute),
        q_BHTK.to(compute),
        k_BHTK.to(compute),
        _widen(v_BHTV, width, compute),
        _widen(out_BHTV, width, compute),
        lse_BHT.to(compute),
        0.0,
        True,
        scale=scale,
    )
    return dq.to(q_BHTK.dtype), dk.to(q_BHTK.dtype), dv[..., :value_width].to(q_BHTK.dtype)


def attention_reference(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition: softmax(scale * q k^T, masked) v."""
    compute = torch.promote_types(q_BHTK.dtype, torch.float32)
    scores = _masked_scores(q_BHTK.to(compute), k_BHTK.to(compute), scale)
    lse_BHT = scores.logsumexp(-1)
    return ((scores - lse_BHT.unsqueeze(-1)).exp() @ v_BHTV.to(compute)).to(q_BHTK.dtype), lse_BHT


def attention_backward_reference(
    dout_BHTV: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q."""
    compute = torch.promote_types(q_BHTK.dtype, torch.float32)
    q, k, v, dout, out = (t.to(compute) for t in (q_BHTK, k_BHTK, v_BHTV, dout_BHTV, out_BHTV))
    probability = (_masked_scores(q, k, scale) - lse_BHT.unsqueeze(-1)).exp()
    dscore = probability * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    dtype = q_BHTK.dtype
    return (dscore @ k).to(dtype), (dscore.mT @ q).to(dtype), (probability.mT @ dout).to(dtype)


def _masked_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu_(1)
    return (q @ k.mT).mul_(scale).masked_fill_(future, float("-inf"))


def _widen(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return F.pad(x.to(dtype), (0, width - x.shape[-1]))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or v.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; needed are q and k [B, H, T, K] "
            "and v [B, H, T, V] with V <= K"
        )
