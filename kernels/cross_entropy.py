"""Cross entropy over the vocabulary, in FP32 at least: loss_m = log(sum_v exp(logit_mv)) - logit_m[label].

Shapes: M tokens, V vocabulary entries; labels int64 [M]. Rows are independent, so callers may work in chunks of rows;
here they are taken in pieces whose temporaries stay in the cache. A row whose label is `ignore_index` has loss 0 and
gradient 0, whatever its logits. `cross_entropy` and `cross_entropy_backward` are the definition;
`cross_entropy_and_gradient` gives both with one pass of exponentials, which are what costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
# Elements per piece of rows.
PIECE = 1 << 19


def cross_entropy(logits_MV: Tensor, labels_M: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """loss [M] of each token, FP32 at least."""
    compute = torch.promote_types(logits_MV.dtype, torch.float32)
    loss_M = logits_MV.new_empty(logits_MV.shape[0], dtype=compute)
    for rows in _pieces(logits_MV):
        wide = logits_MV[rows].to(compute)
        loss_M[rows] = F.cross_entropy(wide, labels_M[rows], ignore_index=ignore_index, reduction="none")
    return loss_M


def cross_entropy_backward(
    logits_MV: Tensor,
    labels_M: Tensor,
    scale: float | Tensor,
    ignore_index: int = IGNORE_INDEX,
    in_place: bool = False,
) -> Tensor:
    """dlogits [M, V] = (softmax(logits) - one_hot(label)) * scale, in logits' dtype.

    scale: a number or [M], the gradient that reaches each token's loss. in_place: write it over the logits.
    """
    compute = torch.promote_types(logits_MV.dtype, torch.float32)
    dlogits_MV = logits_MV if in_place else torch.empty_like(logits_MV)
    scale_M = _row_scale(scale, logits_MV, compute)
    for rows in _pieces(logits_MV):
        probability = torch.softmax(logits_MV[rows].to(compute), -1)
        dlogits_MV[rows] = _subtract_labels(probability, labels_M[rows], scale_M[rows], ignore_index)
    return dlogits_MV


def cross_entropy_and_gradient(
    logits_MV: Tensor,
    labels_M: Tensor,
    scale: float | Tensor,
    ignore_index: int = IGNORE_INDEX,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss [M] FP32 at least, dlogits [M, V] in logits' dtype), as the two functions above."""
    compute = torch.promote_types(logits_MV.dtype, torch.float32)
    loss_M = logits_MV.new_empty(logits_MV.shape[0], dtype=compute)
    dlogits_MV = logits_MV if in_place else torch.empty_like(logits_MV)
    scale_M = _row_scale(scale, logits_MV, compute)
    for rows in _pieces(logits_MV):
        wide, out, labels = logits_MV[rows].to(compute), dlogits_MV[rows], labels_M[rows]
        ignored = labels == ignore_index
        label_M1 = labels.masked_fill(ignored, 0).unsqueeze(1)
        highest = wide.amax(-1, keepdim=True)
        picked = wide.gather(1, label_M1)
        # The exponentials take the place of what they are made of wherever that is not wanted any more.
        target = out if out.dtype == compute else wide
        exponential = torch.sub(wide, highest, out=target).exp_()
        total = exponential.sum(-1, keepdim=True)
        scale_M1 = scale_M[rows].unsqueeze(1)
        exponential.mul_(scale_M1 / total).scatter_add_(1, label_M1, -scale_M1)
        loss = total.log_().add_(highest).sub_(picked).squeeze(1)
        loss_M[rows] = loss.masked_fill_(ignored, 0.0)
        _clear(exponential, ignored)
        if target is not out:
            out.copy_(exponential)
    return loss_M, dlogits_MV


def _pieces(logits_MV: Tensor) -> Iterator[slice]:
    count = max(1, PIECE // max(1, logits_MV.shape[1]))
    return (slice(first, first + count) for first in range(0, logits_MV.shape[0], count))


def _row_scale(scale: float | Tensor, logits_MV: Tensor, compute: torch.dtype) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.to(compute).expand(logits_MV.shape[0])
    return logits_MV.new_full((), scale, dtype=compute).expand(logits_MV.shape[0])


def _subtract_labels(probability: Tensor, labels_M: Tensor, scale_M: Tensor, ignore_index: int) -> Tensor:
    """In place: (probability - one_hot(label)) * scale, zero for ignored rows."""
    ignored = labels_M == ignore_index
    rows = torch.arange(labels_M.shape[0], device=labels_M.device)
    probability[rows, labels_M.masked_fill(ignored, 0)] -= 1.0
    return _clear(probability.mul_(scale_M.unsqueeze(-1)), ignored)


def _clear(x_MV: Tensor, ignored_M: Tensor) -> Tensor:
    """Zero the ignored rows, in place. Not by a factor of zero: an ignored row may hold anything, NaN too. Nor after a
    test for any, as the host would wait for it.
    """
    return x_MV.masked_fill_(ignored_M.unsqueeze(-1), 0.0)
