"""AdamW against torch.optim.AdamW; BF16 moments are rounded to nearest when stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import adamw as module
from kernels.adamw import adamw
from tests.kernels.oracles import largest_error

OPTIONS: Any = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    torch.manual_seed(0)
    weight = torch.randn(257, dtype=dtype)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 8):
        grad = torch.randn(257, dtype=dtype) * 0.01
        grad[::7] = 0.0
        kept = grad.clone()
        theirs.grad = grad * 0.25
        optimizer.step()
        adamw(weight, first, second, grad, lr=3e-3, weight_decay=0.1, step=step, grad_scale=0.25, **OPTIONS)
        assert torch.equal(grad, kept)
    state = optimizer.state[theirs]
    limit = 1e-14 if dtype == torch.float64 else 1e-6
    for found, expected in ((weight, theirs), (first, state["exp_avg"]), (second, state["exp_avg_sq"])):
        assert largest_error(found, expected.detach()) < limit


def test_bf16_moments_are_widened_used_unrounded_and_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(300), torch.randn(300)
    stored = torch.randn(300).bfloat16(), torch.rand(300).bfloat16()
    wide = [moment.float() for moment in stored]
    expected = weight.clone()
    adamw(expected, wide[0], wide[1], grad, lr=1e-2, weight_decay=0.1, step=3, **OPTIONS)
    adamw(weight, *stored, grad, lr=1e-2, weight_decay=0.1, step=3, **OPTIONS)
    assert torch.equal(weight, expected)
    assert torch.equal(stored[0], wide[0].bfloat16()) and torch.equal(stored[1], wide[1].bfloat16())


def test_bf16_gradients_and_slices_of_a_buffer() -> None:
    buffer, grad = torch.ones(10), torch.ones(4, dtype=torch.bfloat16)
    moments = torch.zeros(2, 4, dtype=torch.bfloat16)
    adamw(buffer[3:7], moments[0], moments[1], grad, lr=0.5, weight_decay=0.0, step=1, **OPTIONS)
    assert torch.equal(buffer == 1.0, torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 1]).bool())
    assert torch.allclose(buffer[3:7], torch.full((4,), 0.5))


def test_bad_input_is_refused() -> None:
    ok = torch.zeros(4)
    rest: Any = {"lr": 1.0, "weight_decay": 0.0, **OPTIONS}
    with pytest.raises(ValueError, match=r"\(3,\)"):
        adamw(ok, ok, ok, torch.zeros(3), step=1, **rest)
    with pytest.raises(ValueError, match="contiguous"):
        adamw(ok, ok, ok, torch.zeros(8)[::2], step=1, **rest)
    with pytest.raises(ValueError, match="step 0"):
        adamw(ok, ok, ok, ok, step=0, **rest)
    with pytest.raises(TypeError, match="bfloat16"):
        adamw(ok.bfloat16(), ok, ok, ok, step=1, **rest)
