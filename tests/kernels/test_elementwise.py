"""RMSNorm, SwiGLU and RoPE against autograd of their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.norm import rmsnorm, rmsnorm_backward
from kernels.rope import rotate, rotate_, rotate_back, rotate_reference
from kernels.swiglu import swiglu, swiglu_backward
from tests.kernels.oracles import gradients, largest_error

LIMIT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = list(LIMIT)
EPS = 1e-3


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_rmsnorm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 80), (0, 16)])
def test_rmsnorm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    gain = normal(shape[-1], dtype=torch.promote_types(dtype, torch.float32), seed=2)
    y = rmsnorm(x, gain, EPS)
    dx, dgain = rmsnorm_backward(dy, x, gain, EPS)
    assert (y.dtype, dx.dtype, dgain.dtype) == (dtype, dtype, gain.dtype)
    assert dx.shape == x.shape and dgain.shape == gain.shape
    if not x.numel():
        assert not dgain.any()
        return
    expected_dx, expected_dgain = gradients(plain_rmsnorm, (x, gain), dy)
    assert largest_error(y, plain_rmsnorm(x.double(), gain.double())) < LIMIT[dtype]
    assert largest_error(dx, expected_dx) < LIMIT[dtype]
    assert largest_error(dgain, expected_dgain) < LIMIT[gain.dtype]


def test_rmsnorm_agrees_with_torch_and_survives_a_zero_row() -> None:
    x = normal(4, 32, dtype=torch.float32)
    x[1] = 0.0
    gain = normal(32, dtype=torch.float32, seed=2)
    assert largest_error(rmsnorm(x, gain, 1e-6), F.rms_norm(x, (32,), gain, 1e-6)) < 1e-6
    dx, dgain = rmsnorm_backward(torch.ones_like(x), x, gain, 1e-6)
    assert dx.isfinite().all() and dgain.isfinite().all()


def plain_swiglu(gate_up: Tensor, row_weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up * row_weight[:, None]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, weighted: bool) -> None:
    gate_up, dy = 3 * normal(7, 96, dtype=dtype), normal(7, 48, dtype=dtype, seed=1)
    high = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(7, dtype=high) if weighted else None
    plain_weight = torch.ones(7) if weight is None else weight
    y = swiglu(gate_up, weight)
    dgate_up, dweight = swiglu_backward(dy, gate_up, weight)
    expected = gradients(plain_swiglu, (gate_up, plain_weight), dy)
    assert (y.dtype, dgate_up.dtype) == (dtype, dtype)
    assert largest_error(y, plain_swiglu(gate_up.double(), plain_weight.double())) < LIMIT[dtype]
    assert largest_error(dgate_up, expected[0]) < LIMIT[dtype]
    if weight is None:
        assert dweight is None
    else:
        assert dweight is not None and dweight.dtype == high and largest_error(dweight, expected[1]) < LIMIT[high]


def test_swiglu_of_large_gates_and_no_rows() -> None:
    gate_up = torch.tensor([[200.0, -200.0, 1.0, 1.0]])
    assert swiglu(gate_up).tolist() == [[200.0, 0.0]]
    dgate_up, _ = swiglu_backward(torch.ones(1, 2), gate_up, None)
    assert dgate_up.tolist() == [[1.0, 0.0, 200.0, 0.0]]
    assert swiglu(torch.zeros(0, 8), torch.zeros(0)).shape == (0, 4)
    dgate_up, dweight = swiglu_backward(torch.zeros(0, 4), torch.zeros(0, 8), torch.zeros(0))
    assert dgate_up.shape == (0, 8) and dweight is not None and dweight.shape == (0,)


def angles(length: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype) -> None:
    x, cos_sin = normal(2, 3, 10, 8, dtype=dtype), angles(10, 4)
    turned = rotate(x, *cos_sin)
    assert turned.dtype == dtype and turned.shape == x.shape
    assert largest_error(turned, rotate_reference(x, *cos_sin)) < LIMIT[dtype]
    assert largest_error(rotate_back(turned, *cos_sin), x) < LIMIT[dtype]
    dy = normal(2, 3, 10, 8, dtype=dtype, seed=1)
    (expected,) = gradients(lambda x: rotate_reference(x, *cos_sin), (x,), dy)
    assert largest_error(rotate_back(dy, *cos_sin), expected) < LIMIT[dtype]


def test_rope_is_a_rotation_matrix_on_each_adjacent_pair() -> None:
    x, (cos, sin) = normal(10, 8, dtype=torch.float64), angles(10, 4)
    for position in range(10):
        for pair in range(4):
            c, s = cos[position, pair], sin[position, pair]
            two = slice(2 * pair, 2 * pair + 2)
            expected = torch.stack((torch.stack((c, -s)), torch.stack((s, c)))) @ x[position, two]
            assert torch.allclose(rotate(x, cos, sin)[position, two], expected, rtol=0, atol=1e-14)


def test_rope_of_slices_with_heads_behind_positions() -> None:
    wide, (cos, sin) = normal(2, 10, 3, 13, dtype=torch.float32), angles(10, 4)
    x = wide[..., 5:]
    expected = rotate(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)
    assert largest_error(rotate(x, cos[:, None], sin[:, None]), expected) < 1e-6


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("before", [4, 3])
def test_rope_in_place_changes_its_slice_alone(dtype: torch.dtype, interleaved: bool, before: int) -> None:
    """Of an even width before it, whose pairs are complex numbers as they lie, and of an odd one."""
    heads = torch.randn(2, 5, 3, before + 8, dtype=torch.float64).to(dtype).transpose(1, 2)
    cos, sin = torch.rand(2, 5, 4, dtype=torch.promote_types(dtype, torch.float32))
    beside, expected = heads[..., :before].clone(), rotate(heads[..., before:], cos, sin, interleaved)
    rotate_(heads[..., before:], cos, sin, interleaved)
    assert torch.equal(heads[..., :before], beside)
    assert largest_error(heads[..., before:], expected) < LIMIT[dtype]


def test_inputs_are_not_changed() -> None:
    x, gain, weight, (cos, sin) = torch.randn(6, 8), torch.rand(8), torch.rand(6), angles(6, 4)
    dy, half = torch.randn(6, 8), torch.randn(6, 4)
    before = [tensor.clone() for tensor in (x, gain, weight, dy, half)]
    rmsnorm(x, gain, EPS), rmsnorm_backward(dy, x, gain, EPS), rotate(x, cos, sin)
    swiglu(x, weight), swiglu_backward(half, x, weight)
    assert all(torch.equal(a, b) for a, b in zip((x, gain, weight, dy, half), before, strict=True))


def test_a_gradient_of_another_shape_is_refused() -> None:
    """Not reshaped to fit where it has as many elements."""
    x, gain = torch.ones(2, 48), torch.ones(48)
    for dy in (torch.ones(48, 2), x[:1], x.to("meta")):
        with pytest.raises(ValueError, match=r"rmsnorm_backward: dy \(.*x \(2, 48\) on cpu; allowed"):
            rmsnorm_backward(dy, x, gain, EPS)
