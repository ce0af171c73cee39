"""RMSNorm as Triton kernels beside the torch definition, and its gradients beside float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import norm as definition
from kernels.hopper import norm, quantize
from kernels.quantize import dequantize
from tests.kernels.hopper.closeness import assert_close, assert_columns, assert_rows
from tests.kernels.hopper.memory import guarded, surrounded
from tests.kernels.oracles import gradients, largest_error

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# One row, widths of every block and edge tiles, more rows than a program's and than a tile's.
SHAPES = [(1, 16), (21, 576), (130, 144), (3, 1040), (2, 7168)]
EPS = 1e-6


@pytest.fixture(autouse=True)
def bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded(monkeypatch, quantize):
        yield


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of several sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-3, 4, (shape[0], 1), generator=generator))
    if shape[0] > 1:
        x[shape[0] // 2] = 0.0
    return surrounded(x.to(dtype))


def gains(width: int, dtype: torch.dtype) -> Tensor:
    return 1.0 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(9)).to(dtype)


def plain(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, gain = normal(*shape, dtype=dtype), gains(shape[1], dtype)
    power_of_two = shape[0] % 2 == 0
    expected, expected_rows = definition.rmsnorm_rows(x, gain, EPS, power_of_two)
    y, rows = norm.rmsnorm_rows(x, gain, EPS, power_of_two)
    assert y.dtype == dtype and y.is_contiguous()
    assert largest_error(y, plain(x.double(), gain.double())) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert int((y != expected).sum()) <= (1e-3 * y.numel() if dtype == torch.bfloat16 else y.numel())
    assert_rows(rows, expected_rows)
    assert torch.equal(norm.rmsnorm(x, gain, EPS), y)
    # The codes are those of the y that was written.
    again = quantize.quantize_rows(y, power_of_two)
    assert torch.equal(again.data.view(torch.uint8), rows.data.view(torch.uint8))
    assert torch.equal(again.scale, rows.scale)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (129, 576), (127, 80)])
def test_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, gain = normal(*shape, dtype=dtype), gains(shape[1], dtype)
    columns = norm.rmsnorm_columns(x, gain, EPS)
    assert_columns(columns, definition.rmsnorm_columns(x, gain, EPS))
    # Along tokens of the y that the forward took.
    assert_close(columns, quantize.quantize_columns(norm.rmsnorm(x, gain, EPS)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (37, 576), (5, 1040)])
def test_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy, gain = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), gains(shape[1], dtype)
    expected_dx, expected_dgain = gradients(plain, (x, gain), dy)
    found = []
    # As many programs as row blocks, and two, which then take several each.
    for num_sms in (None, 2):
        dx, dgain = norm.rmsnorm_backward(dy, x, gain, EPS, num_sms=num_sms)
        assert dx.dtype == dtype and dgain.dtype == torch.float32
        assert largest_error(dx, expected_dx) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert largest_error(dgain, expected_dgain) < 1e-5
        found.append(dx)
    assert torch.equal(*found)


def test_more_dimensions_slices_and_no_rows() -> None:
    x, gain = normal(6, 80, dtype=torch.float32), gains(48, torch.float32)
    part = x.reshape(2, 3, 80)[..., 16:64]
    y = norm.rmsnorm(part, gain, EPS)
    assert y.shape == (2, 3, 48) and largest_error(y, plain(part.double(), gain.double())) < 1e-6
    dx, dgain = norm.rmsnorm_backward(torch.ones_like(part), part, gain, EPS)
    expected_dx, expected_dgain = gradients(plain, (part, gain), torch.ones_like(part))
    assert dx.shape == part.shape and largest_error(dx, expected_dx) < 1e-5
    assert largest_error(dgain, expected_dgain) < 1e-5

    y, rows = norm.rmsnorm_rows(x[:0], gains(80, torch.float32), EPS)
    assert y.shape == rows.shape == (0, 80) and norm.rmsnorm_columns(x[:0], gains(80, torch.float32), EPS).shape == (
        80,
        0,
    )
    dx, dgain = norm.rmsnorm_backward(x[:0], x[:0], gains(80, torch.float32), EPS)
    assert dx.shape == (0, 80) and torch.equal(dgain, torch.zeros(80))


def test_numbers_that_are_not_finite_stay_so() -> None:
    x, gain = normal(3, 144, dtype=torch.bfloat16), gains(144, torch.bfloat16)
    x[0, 3] = float("nan")
    y, rows = norm.rmsnorm_rows(x, gain, EPS)
    assert bool(y[0].isnan().all()) and not bool(dequantize(rows)[0].isfinite().any())
    assert bool(dequantize(rows)[1:].isfinite().all())


def test_float64_is_the_definition_s() -> None:
    x, gain = normal(5, 48, dtype=torch.float64), gains(48, torch.float64)
    y, _ = norm.rmsnorm_rows(x, gain, EPS)
    assert y.dtype == torch.float64 and torch.equal(y, definition.rmsnorm(x, gain, EPS))
    assert torch.equal(norm.rmsnorm_backward(y, x, gain, EPS)[0], definition.rmsnorm_backward(y, x, gain, EPS)[0])
    # Nothing of this came from a kernel; the guard wants something to look at.
    norm.rmsnorm(x.float(), gain.float(), EPS)


def test_what_cannot_be_done_is_said() -> None:
    x = normal(2, 48, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"rmsnorm: x \(2, 48\).*gain \(16,\).*allowed"):
        norm.rmsnorm(x, gains(16, torch.float32), EPS)
    with pytest.raises(ValueError, match=r"D up to 8192: choose kernels.norm=torch"):
        norm.rmsnorm(torch.zeros(1, 8208), torch.ones(8208), EPS)
    with pytest.raises(ValueError, match=r"rmsnorm_rows.*multiple of 16"):
        norm.rmsnorm_rows(x[:, :40], gains(40, torch.float32), EPS)
    norm.rmsnorm(x[:, :40], gains(40, torch.float32), EPS)


def test_a_gain_may_be_strided() -> None:
    x, gain = torch.randn(5, 32), torch.randn(32, 2)[:, 0]
    for function in ("rmsnorm", "rmsnorm_rows", "rmsnorm_columns"):
        found, wanted = (getattr(module, function)(x, gain, EPS) for module in (norm, definition))
        if function == "rmsnorm":
            found, wanted = (found, None), (wanted, None)
        elif function == "rmsnorm_columns":
            found, wanted = (dequantize(found), None), (dequantize(wanted), None)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    for found, wanted in zip(norm.rmsnorm_backward(x, x, gain, EPS), definition.rmsnorm_backward(x, x, gain, EPS)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
