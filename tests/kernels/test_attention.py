"""Attention with a value width of its own: the fast path against the plain one, the plain one against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import attention as module
from kernels.attention import attention, attention_backward, attention_backward_reference, attention_reference
from tests.kernels.oracles import gradients, largest_error

LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHAPES = [(2, 3, 17, 24, 16), (1, 2, 130, 48, 32), (1, 1, 1, 16, 16), (1, 2, 600, 24, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout laid out [B, T, H, ...] in memory, as a model's projections leave them."""
    b, h, t, width, value_width = shape
    generator = torch.Generator().manual_seed(t)
    made = [torch.randn(b, t, h, w, generator=generator) for w in (width, width, value_width, value_width)]
    return tuple(tensor.to(dtype).transpose(1, 2) for tensor in made)  # type: ignore[return-value]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("forward", "backward"),
    [(attention, attention_backward), (attention_reference, attention_backward_reference)],
    ids=["fast", "reference"],
)
def test_against_autograd(forward: object, backward: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(shape, dtype)
    out, lse = forward(q, k, v, 0.3)  # type: ignore[operator]
    assert out.shape == v.shape and out.dtype == dtype
    assert lse.shape == q.shape[:-1] and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert largest_error(out, sdpa(q.double(), k.double(), v.double())) < LIMIT[dtype]
    found = backward(dout, q, k, v, out, lse, 0.3)  # type: ignore[operator]
    for gradient, expected, tensor in zip(found, gradients(sdpa, (q, k, v), dout), (q, k, v), strict=True):
        assert gradient.dtype == dtype and gradient.shape == tensor.shape
        # A single position has no score to learn from: dq and dk are zero up to rounding.
        if shape[2] == 1 and tensor is not v:
            assert gradient.abs().max() < LIMIT[dtype]
        else:
            assert largest_error(gradient, expected) < LIMIT[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_of_exponentials(shape: tuple[int, ...]) -> None:
    q, k, v, _ = inputs(shape, torch.float64)
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(shape[2], shape[2]).triu(1).bool(), float("-inf"))
    for function in (attention, attention_reference):
        assert largest_error(function(q, k, v, 0.3)[1], scores.logsumexp(-1)) < 1e-13


def test_the_future_is_not_seen() -> None:
    q, k, v, _ = inputs((1, 2, 40, 24, 16), torch.float32)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 25:], changed_v[:, :, 25:] = 9.0, 1e4
    before, after = attention(q, k, v, 0.3)[0], attention(q, changed_k, changed_v, 0.3)[0]
    assert largest_error(after[:, :, :25], before[:, :, :25]) < 1e-6
    assert largest_error(after[:, :, 25:], before[:, :, 25:]) > 1


@pytest.mark.parametrize("tile", [1, 2 * 64 * 130, 1 << 30])
def test_heads_one_by_one_in_pairs_or_all_together(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    q, k, v, dout = inputs((2, 3, 130, 24, 16), torch.float64)
    out, lse = attention(q, k, v, 0.3)
    expected, expected_lse = attention_reference(q, k, v, 0.3)
    assert largest_error(out, expected) < 1e-13 and largest_error(lse, expected_lse) < 1e-13
    found = attention_backward(dout, q, k, v, out, lse, 0.3)
    for gradient, expected in zip(found, attention_backward_reference(dout, q, k, v, out, lse, 0.3), strict=True):
        assert largest_error(gradient, expected) < 1e-13


def test_widths_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = inputs((1, 2, 4, 16, 24), torch.float32)
    with pytest.raises(ValueError, match="V <= K"):
        attention(q, k, v, 1.0)
    with pytest.raises(ValueError, match=r"k \(1, 2, 3, 16\)"):
        attention(q, k[:, :, :3], v, 1.0)
