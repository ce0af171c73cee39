"""Causal attention core: head width of q and k may differ from that of v.

Shapes: B sequences, H heads, T positions, K query/key width, V value width (V <= K).
Computed in FP32 at least (float64 stays; BF16 attention takes four times as long on a CPU), rounded once to q's dtype.
The fast path takes blocks of queries against the keys up to the block's end, some heads at a time, so that scores stay
in the cache and half of them are never made; other devices take the plain path. `attention_reference` and its backward
are the definition. Results are [B, H, T, ...] views of [B, T, H, ...] memory, as projections want them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Queries of a block, and most scores of one tile.
BLOCK = 64
TILE = 1 << 19


def attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, H, T, V] in q's dtype, and lse [B, H, T]: log of each row's sum of exp(scale * q.k), FP32 at least."""
    _check(q_BHTK, k_BHTK, v_BHTV)
    if q_BHTK.device.type != "cpu":
        return attention_reference(q_BHTK, k_BHTK, v_BHTV, scale)
    compute = torch.promote_types(q_BHTK.dtype, torch.float32)
    q, k, v = q_BHTK.to(compute), k_BHTK.to(compute), v_BHTV.to(compute)
    out, lse_BHT1 = _like(v_BHTV, q_BHTK.dtype), q.new_empty((*q.shape[:-1], 1))
    future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=compute, device=q.device).triu_(1)
    scratch = q.new_empty(_scratch(q))
    for at in _groups(q):
        keys, values, last = k[at].mT, v[at], 0
        for q_i, out_i, lse_i in zip(*(x[at].split(BLOCK, 1) for x in (q, out, lse_BHT1)), strict=True):
            first, last = last, last + q_i.shape[1]
            score = _tile(scratch, q_i, last)
            torch.baddbmm(score, q_i, keys[..., :last], beta=0, alpha=scale, out=score)
            score[..., first:].add_(future[: last - first, : last - first])
            highest = score.amax(-1, keepdim=True)
            total = score.sub_(highest).exp_().sum(-1, keepdim=True)
            torch.div(torch.bmm(score, values[:, :last]), total, out=out_i)
            torch.add(total.log_(), highest, out=lse_i)
    return out, lse_BHT1.squeeze(-1)


def attention_backward(
    dout_BHTV: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk [B, H, T, K], dv [B, H, T, V]) in q's dtype; `out` and `lse` as `attention` returned them."""
    _check(q_BHTK, k_BHTK, v_BHTV)
    if q_BHTK.device.type != "cpu":
        return attention_backward_reference(dout_BHTV, q_BHTK, k_BHTK, v_BHTV, out_BHTV, lse_BHT, scale)
    dtype = q_BHTK.dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v, dout = q_BHTK.to(compute), k_BHTK.to(compute), v_BHTV.to(compute), dout_BHTV.to(compute)
    negative_lse = lse_BHT.to(compute).neg().unsqueeze(-1)
    negative_delta = torch.linalg.vecdot(dout, out_BHTV.to(compute)).neg_().unsqueeze(-1)
    dq, dk, dv = _like(q, dtype), _like(k, dtype), _like(v, dtype)
    future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=compute, device=q.device).triu_(1)
    probabilities, dscores = q.new_empty(2, _scratch(q)).unbind()
    for at in _groups(q):
        keys, values, last = k[at], v[at], 0
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        by_block = (x[at].split(BLOCK, 1) for x in (q, dout, dq, negative_lse, negative_delta))
        for q_i, dout_i, dq_i, lse_i, delta_i in zip(*by_block, strict=True):
            first, last = last, last + q_i.shape[1]
            keys_i = keys[:, :last]
            probability = _tile(probabilities, q_i, last).copy_(lse_i)
            torch.baddbmm(probability, q_i, keys_i.mT, alpha=scale, out=probability)
            probability[..., first:].add_(future[: last - first, : last - first])
            probability.exp_()
            dvalues[:, :last] += torch.bmm(probability.mT, dout_i)
            dscore = _tile(dscores, q_i, last).copy_(delta_i)
            torch.baddbmm(dscore, dout_i, values[:, :last].mT, out=dscore).mul_(probability)
            torch.mul(torch.bmm(dscore, keys_i), scale, out=dq_i)
            dkeys[:, :last] += torch.bmm(dscore.mT, q_i)
        torch.mul(dkeys, scale, out=dk[at])
        dv[at] = dvalues
    return dq, dk, dv


def _groups(q: Tensor) -> Iterator[tuple[int, slice]]:
    """(sequence, heads) of every group of tiles that are worked off together."""
    B, H, T, _ = q.shape
    together = max(1, TILE // (BLOCK * max(T, 1)))
    return ((b, slice(head, min(head + together, H))) for b in range(B) for head in range(0, H, together))


def _scratch(q: Tensor) -> int:
    """Elements of the largest tile."""
    return min(q.shape[1], max(1, TILE // (BLOCK * max(q.shape[2], 1)))) * BLOCK * q.shape[2]


def _tile(scratch: Tensor, q_hiK: Tensor, keys: int) -> Tensor:
    """[heads, queries, keys] of the scratch memory."""
    shape = (*q_hiK.shape[:2], keys)
    return scratch[: shape[0] * shape[1] * keys].view(shape)


def _like(x_BHTW: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, H, T, W], laid out [B, T, H, W]."""
    B, H, T, W = x_BHTW.shape
    return x_BHTW.new_empty((B, T, H, W), dtype=dtype).transpose(1, 2)


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


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or v.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; needed are q and k [B, H, T, K] "
            "and v [B, H, T, V] with V <= K"
        )
