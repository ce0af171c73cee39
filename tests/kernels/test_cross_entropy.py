"""Cross entropy and its gradient against the formula and its autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels import cross_entropy as module
from kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient, cross_entropy_backward
from tests.kernels.oracles import gradients, largest_error

LIMIT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 301, (12,))
    labels[[0, 5]] = -100
    labels[3] = 0
    return (torch.randn(12, 301) * 5).to(dtype), labels


def by_formula(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept = labels >= 0
    picked = (logits * F.one_hot(labels.clamp_min(0), logits.shape[1])).sum(-1)
    return torch.where(kept, logits.exp().sum(-1).log() - picked, 0.0)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("per_row", [False, True])
def test_against_the_formula(dtype: torch.dtype, per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 5 * 301)
    logits, labels = inputs(dtype)
    high = torch.promote_types(dtype, torch.float32)
    scale = torch.rand(12, dtype=high) if per_row else 0.37
    upstream = scale if isinstance(scale, torch.Tensor) else torch.full((12,), scale, dtype=torch.float64)
    expected = by_formula(logits.double(), labels)
    (expected_gradient,) = gradients(lambda x: by_formula(x, labels), (logits,), upstream)
    loss, gradient = cross_entropy(logits, labels), cross_entropy_backward(logits, labels, scale)
    both = cross_entropy_and_gradient(logits, labels, scale)
    for found in (loss, both[0]):
        assert found.dtype == high and found.shape == (12,) and largest_error(found, expected) < LIMIT[high]
        assert found[0] == 0 and found[5] == 0
    in_place = logits.clone()
    returned = cross_entropy_backward(in_place, labels, scale, in_place=True)
    assert returned is in_place
    overwritten = logits.clone()
    assert cross_entropy_and_gradient(overwritten, labels, scale, in_place=True)[1] is overwritten
    for found in (gradient, both[1], returned, overwritten):
        assert found.dtype == dtype and largest_error(found, expected_gradient) < LIMIT[dtype]
        assert not found[[0, 5]].any()


def test_rows_can_be_worked_off_in_chunks() -> None:
    logits, labels = inputs(torch.float32)
    whole = cross_entropy_and_gradient(logits, labels, 0.5)
    parts = [cross_entropy_and_gradient(a, b, 0.5) for a, b in zip(logits.split(5), labels.split(5), strict=True)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_huge_logits_and_ignored_rows_that_hold_no_numbers() -> None:
    logits = torch.tensor([[3e4, 0.0, -3e4], [float("nan")] * 3])
    labels = torch.tensor([2, -1])
    loss, gradient = cross_entropy_and_gradient(logits, labels, 1.0, ignore_index=-1)
    assert loss.tolist() == [6e4, 0.0] and gradient.tolist() == [[1.0, 0.0, -1.0], [0.0] * 3]
    assert cross_entropy(logits, labels, -1).tolist() == [6e4, 0.0]
    assert torch.equal(cross_entropy_backward(logits, labels, 1.0, -1), gradient)
    assert torch.equal(cross_entropy_backward(logits, labels, 1.0, -1, in_place=True), gradient)


def test_no_rows() -> None:
    logits, labels = torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)
    assert cross_entropy(logits, labels).shape == (0,)
    assert cross_entropy_backward(logits, labels, 1.0).shape == (0, 7)
