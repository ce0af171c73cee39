"""Cross entropy over the vocabulary, in FP32 at least: loss_m = log(sum_v exp(logit_mv)) - logit_m[label].

Shapes: M tokens, V vocabulary entries; labels int64 [M]. Rows are independent, so callers may work in chunks of rows.
A row whose label is `ignore_index` has loss 0 and gradient 0. `cross_entropy` and `cross_entropy_backward` are the
definition; `cross_entropy_and_gradient` gives both with one pass of exponentials, which are what costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy(logits_MV: Tensor, labels_M: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """loss [M] of each token, FP32 at least."""
    wide = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return _loss(wide, labels_M, wide.logsumexp(-1), ignore_index)


def cross_entropy_backward(
    logits_MV: Tensor,
    labels_M: Tensor,
    scale: float | Tensor,
    ignore_index: int = IGNORE_INDEX,
    in_place: bool = False,
) -> Tensor:
    """dlogits [M, V] = (softmax(logits) - one_hot(label)) * scale, in logits' dtype.

    scale: a number or [M], the gradient that reaches each token's loss. in_place: write it over FP32 or float64 logits.
    """
    wide = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    if in_place:
        probability = wide.sub_(wide.amax(-1, keepdim=True)).exp_()
        probability.div_(probability.sum(-1, keepdim=True))
    else:
        probability = torch.softmax(wide, -1)
    return _subtract_labels(probability, labels_M, scale, ignore_index).to(logits_MV.dtype)


def cross_entropy_and_gradient(
    logits_MV: Tensor, labels_M: Tensor, scale: float | Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """(loss [M] FP32 at least, dlogits [M, V] in logits' dtype), as the two functions above."""
    wide = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    probability = torch.softmax(wide, -1)
    # The largest probability is exp(0) / sum, so the sum comes back without another pass of exponentials.
    lse_M = wide.amax(-1) - probability.amax(-1).log_()
    loss_M = _loss(wide, labels_M, lse_M, ignore_index)
    return loss_M, _subtract_labels(probability, labels_M, scale, ignore_index).to(logits_MV.dtype)


def _loss(wide: Tensor, labels_M: Tensor, lse_M: Tensor, ignore_index: int) -> Tensor:
    ignored = labels_M == ignore_index
    picked = wide.gather(1, labels_M.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return (lse_M - picked).masked_fill_(ignored, 0.0)


def _subtract_labels(probability: Tensor, labels_M: Tensor, scale: float | Tensor, ignore_index: int) -> Tensor:
    """In place: (probability - one_hot(label)) * scale, zero for ignored rows."""
    ignored = labels_M == ignore_index
    rows = torch.arange(labels_M.shape[0], device=labels_M.device)
    probability[rows, labels_M.masked_fill(ignored, 0)] -= 1.0
    row_scale = torch.as_tensor(scale, dtype=probability.dtype, device=probability.device).expand(labels_M.shape[0])
    probability.mul_(row_scale.unsqueeze(-1))
    # Not a factor of zero: an ignored row may hold anything, NaN too.
    if bool(ignored.any()):
        probability[ignored] = 0.0
    return probability
