"""The fused ops as torch defines them: RMSNorm and SwiGLU with quantisation, and rows taken and summed by index."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.norm import rmsnorm, rmsnorm_columns, rmsnorm_rows
from kernels.permute import _sum_sorted, row_lists, sum_rows, take_rows
from kernels.quantize import Quantized, dequantize, dequantize_groups, quantize_columns, quantize_rows
from kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_tiles, swiglu_columns, swiglu_tiles
from tests.kernels.oracles import calc_diff, gradients, largest_error, quantize_tiles

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers with rows of several sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-3, 4, (shape[0], *(1,) * (len(shape) - 1)), generator=generator))
    x[shape[0] // 2] = 0.0
    return x.to(dtype)


def codes(q: Quantized) -> Tensor:
    return q.data.view(torch.uint8)


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert found.data.shape == expected.data.shape and found.counts == expected.counts
    assert torch.equal(codes(found), codes(expected)) and torch.equal(found.scale, expected.scale)


def assert_searched(found: Quantized, x: Tensor, power_of_two: bool = False) -> None:
    """Codes and scales are those of a search over the value table."""
    expected, scales = quantize_tiles(x.float().numpy(), 1, 128, power_of_two)
    assert np.array_equal(codes(found).numpy(), expected) and np.array_equal(found.scale.numpy(), scales)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (7, 576), (130, 80)])
def test_rmsnorm_quantises_what_it_rounded(shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    x, gain = normal(*shape, dtype=dtype), normal(shape[1], dtype=torch.promote_types(dtype, torch.float32), seed=1)
    y, rows = rmsnorm_rows(x, gain, EPS, power_of_two)
    assert y.dtype == dtype and torch.equal(y, rmsnorm(x, gain, EPS))
    assert_searched(rows, y, power_of_two)
    assert_searched(rmsnorm_columns(x, gain, EPS), y.t())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "width"), [((1,), 16), ((5, 0, 129, 0), 48), ((0, 3), 288)])
def test_swiglu_equals_its_parts(counts: tuple[int, ...], width: int, dtype: torch.dtype, weighted: bool) -> None:
    """The forward takes gate_up as it is; columns and backward take the cache in its dtype."""
    rows = sum(counts)
    gate_up, dy = normal(rows, 2 * width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    weight = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    kept, tiles = swiglu_tiles(gate_up, weight)
    assert_searched(kept, gate_up)
    assert_searched(tiles, swiglu(gate_up, weight))

    cached = dequantize(quantize_rows(gate_up), dtype)
    hidden = swiglu(cached, weight)
    assert_searched(swiglu_columns(kept, weight, dtype=dtype), hidden.t())
    assert_same(swiglu_columns(kept, weight, counts, dtype), quantize_columns(hidden, counts=counts))

    expected, expected_dweight = swiglu_backward(dy, cached, weight)
    d_rows, d_columns, dweight = swiglu_backward_tiles(dy, kept, weight, counts)
    assert_searched(d_rows, expected)
    assert_same(d_columns, quantize_columns(expected, counts=counts))
    assert_searched(swiglu_backward_tiles(dy, kept, weight)[1], expected.t())
    if weighted:
        assert dweight is not None and expected_dweight is not None and torch.equal(dweight, expected_dweight)
    else:
        assert dweight is None


def test_swiglu_gradients_are_those_of_the_cache() -> None:
    """Against autograd at the cached numbers: what FP8 takes from each number is all that differs."""

    def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up * weight[:, None]

    gate_up, dy = 2 * torch.randn(200, 320, dtype=torch.float64), torch.randn(200, 160, dtype=torch.float64)
    weight = torch.rand(200, dtype=torch.float64)
    kept, tiles = swiglu_tiles(gate_up, weight)
    assert calc_diff(dequantize(tiles), plain(gate_up, weight)) < 1e-3
    cached = dequantize(kept, torch.float64)
    assert calc_diff(cached, gate_up) < 1e-3
    counts = (70, 0, 130)
    assert (
        calc_diff(dequantize_groups(swiglu_columns(kept, weight, counts, torch.float64)).t(), plain(cached, weight))
        < 1e-3
    )
    expected, expected_dweight = gradients(plain, (cached, weight), dy)
    d_rows, d_columns, dweight = swiglu_backward_tiles(dy, kept, weight, counts)
    assert calc_diff(dequantize(d_rows), expected) < 1e-3
    assert calc_diff(dequantize_groups(d_columns).t(), expected) < 1e-3
    assert dweight is not None and dweight.dtype == torch.float64 and largest_error(dweight, expected_dweight) < 1e-12


INDEX = torch.tensor([3, 0, 3, 5, 0, 3, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_taken_with_their_scales(dtype: torch.dtype) -> None:
    x = normal(6, 144, dtype=dtype)
    taken = take_rows(x, INDEX)
    assert taken.dtype == dtype and torch.equal(taken, torch.stack([x[int(i)] for i in INDEX]))
    assert_same(take_rows(quantize_rows(x), INDEX), quantize_rows(taken))
    assert take_rows(quantize_rows(x), INDEX[:0]).shape == (0, 144)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 80])
def test_rows_are_summed_in_their_order(width: int, dtype: torch.dtype) -> None:
    rows = normal(len(INDEX), width, dtype=dtype)
    expected = torch.zeros(7, width, dtype=torch.promote_types(dtype, torch.float32))
    for row, target in zip(rows, INDEX.tolist(), strict=True):
        expected[target] += row
    found = sum_rows(rows, INDEX, 7)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert torch.equal(_sum_sorted(rows.to(expected.dtype), INDEX, 7), expected)
    assert torch.equal(sum_rows(rows[:0], INDEX[:0], 3), torch.zeros(3, width, dtype=dtype))
    assert torch.equal(
        _sum_sorted(rows[:0].to(expected.dtype), INDEX[:0], 3), torch.zeros(3, width, dtype=expected.dtype)
    )


def test_lists_of_rows() -> None:
    order, first = row_lists(INDEX, 7)
    assert [order[a:b].tolist() for a, b in pairwise(first.tolist())] == [
        [1, 4], [6], [], [0, 2, 5], [], [3], [],
    ]  # fmt: skip


def test_summing_is_the_transpose_of_taking() -> None:
    x, dy = normal(6, 32, dtype=torch.float64), normal(len(INDEX), 32, dtype=torch.float64, seed=1)
    (expected,) = gradients(lambda x: x[INDEX], (x,), dy)
    assert largest_error(sum_rows(dy, INDEX, 6), expected) < 1e-14
