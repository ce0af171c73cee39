"""SwiGLU as Triton kernels beside the torch definition, and its gradients beside float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import quantize as quantize_definition
from kernels import swiglu as definition
from kernels.hopper import quantize, swiglu
from kernels.quantize import Quantized, dequantize, dequantize_groups
from tests.kernels.hopper.closeness import assert_columns, assert_rows
from tests.kernels.hopper.memory import guarded, surrounded
from tests.kernels.oracles import calc_diff, gradients, largest_error

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COUNTS = [0, 5, 0, 129, 1, 0]
# (rows per expert, None for one matrix; rows; F): tiles of gate_up within a half, and across its halves.
CASES = {
    "one row": (None, 1, 16),
    "whole tiles": (None, 37, 256),
    "across halves": (None, 131, 144),
    "groups": (COUNTS, sum(COUNTS), 128),
    "groups across halves": (COUNTS, sum(COUNTS), 80),
    "no rows": ([0, 0], 0, 128),
}


@pytest.fixture(autouse=True)
def bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded(monkeypatch, quantize):
        yield


def normal(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of several sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-3, 3, (rows, 1), generator=generator))
    if rows > 1:
        x[rows // 2] = 0.0
    return surrounded(x.to(dtype))


def weights(rows: int) -> Tensor:
    return surrounded(torch.rand(1, rows + 16, generator=torch.Generator().manual_seed(7)))[0, :rows]


def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up * weight[:, None]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_tiles_columns_and_gradients(case: str, dtype: torch.dtype, weighted: bool) -> None:
    counts, rows, features = CASES[case]
    gate_up, dy = normal(rows, 2 * features, dtype), normal(rows, features, dtype, seed=1)
    weight = weights(rows) if weighted else None

    expected_kept, expected_tiles = definition.swiglu_tiles(gate_up, weight)
    kept, tiles = swiglu.swiglu_tiles(gate_up, weight)
    assert torch.equal(kept.data.view(torch.uint8), expected_kept.data.view(torch.uint8))
    assert torch.equal(kept.scale, expected_kept.scale)
    assert_rows(kept, expected_kept)
    assert_rows(tiles, expected_tiles)

    columns = swiglu.swiglu_columns(kept, weight, counts, dtype)
    assert_columns(columns, definition.swiglu_columns(expected_kept, weight, counts, dtype))

    expected_rows, expected_columns, expected_dweight = definition.swiglu_backward_tiles(
        dy, expected_kept, weight, counts
    )
    d_rows, d_columns, dweight = swiglu.swiglu_backward_tiles(dy, kept, weight, counts)
    assert_rows(d_rows, expected_rows, padding=counts is None)
    assert_columns(d_columns, expected_columns)
    assert (dweight is None) == (expected_dweight is None)
    if dweight is not None and expected_dweight is not None:
        assert dweight.shape == (rows,) and dweight.dtype == torch.float32
        if rows:
            assert largest_error(dweight, expected_dweight) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (5, 20), (37, 144), (34, 256)])
def test_values(rows: int, features: int, dtype: torch.dtype) -> None:
    """Without FP8 any width is allowed."""
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    gate_up, dy, weight = normal(rows, 2 * features, dtype), normal(rows, features, dtype, seed=1), weights(rows)
    hidden = swiglu.swiglu(gate_up, weight)
    assert hidden.dtype == dtype and largest_error(hidden, plain(gate_up.double(), weight.double())) < limit
    dgate_up, dweight = swiglu.swiglu_backward(dy, gate_up, weight)
    expected, expected_dweight = gradients(plain, (gate_up, weight), dy)
    assert dgate_up.dtype == dtype and largest_error(dgate_up, expected) < limit
    assert dweight is not None and largest_error(dweight, expected_dweight) < 1e-5

    one = torch.ones(rows)
    assert largest_error(swiglu.swiglu(gate_up), plain(gate_up.double(), one.double())) < limit
    dgate_up, dweight = swiglu.swiglu_backward(dy, gate_up)
    assert dweight is None and largest_error(dgate_up, gradients(plain, (gate_up, one), dy)[0]) < limit


def test_gradients_are_those_of_the_cache() -> None:
    """Against autograd at the cached numbers: what FP8 takes from each number is all that differs."""
    gate_up, dy, weight = normal(135, 256, torch.float32), normal(135, 128, torch.float32, seed=1), weights(135)
    kept, tiles = swiglu.swiglu_tiles(gate_up, weight)
    assert calc_diff(dequantize(tiles), plain(gate_up, weight)) < 1e-3
    cached = dequantize(kept, torch.float64)
    d_rows, d_columns, dweight = swiglu.swiglu_backward_tiles(dy, kept, weight, COUNTS)
    expected, expected_dweight = gradients(plain, (cached, weight), dy)
    assert calc_diff(dequantize(d_rows), expected) < 1e-3
    assert calc_diff(dequantize_groups(d_columns).t(), expected) < 1e-3
    assert dweight is not None and largest_error(dweight, expected_dweight) < 1e-6


def test_a_cache_made_by_the_definition() -> None:
    """Its scales lie the other way."""
    gate_up, dy, weight = normal(9, 256, torch.bfloat16), normal(9, 128, torch.bfloat16, seed=1), weights(9)
    kept = quantize_definition.quantize_rows(gate_up)
    kept = Quantized(surrounded(kept.data), surrounded(kept.scale))
    assert_columns(swiglu.swiglu_columns(kept, weight), definition.swiglu_columns(kept, weight))
    expected = definition.swiglu_backward_tiles(dy, kept, weight)
    found = swiglu.swiglu_backward_tiles(dy, kept, weight)
    assert_rows(found[0], expected[0])
    assert_columns(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_and_numbers_that_are_not_finite() -> None:
    gate_up = torch.zeros(2, 256, dtype=torch.bfloat16)
    gate_up[:, 128:] = 1.0
    gate_up[0, 0], gate_up[0, 1], gate_up[1, 2] = 200.0, -200.0, float("nan")
    assert swiglu.swiglu(gate_up)[0, :3].tolist() == [200.0, 0.0, 0.0]
    kept, tiles = swiglu.swiglu_tiles(gate_up)
    assert dequantize(tiles)[0, :3].tolist() == [200.0, 0.0, 0.0]
    assert not bool(dequantize(tiles)[1].isfinite().any()) and not bool(dequantize(kept)[1, :128].isfinite().any())
    d_rows, d_columns, _ = swiglu.swiglu_backward_tiles(torch.ones_like(gate_up[:, :128]), kept)
    assert dequantize(d_rows)[0, :2].tolist() == [1.0, 0.0]
    assert not bool(dequantize(d_rows)[1, :128].isfinite().any())
    assert (
        not d_columns.data.view(torch.uint8).as_strided((256, 126), (128, 1), 2 + d_columns.data.storage_offset()).any()
    )


def test_float64_is_the_definition_s() -> None:
    gate_up, dy = normal(5, 64, torch.float64), normal(5, 32, torch.float64, seed=1)
    assert torch.equal(swiglu.swiglu(gate_up), definition.swiglu(gate_up))
    assert torch.equal(swiglu.swiglu_backward(dy, gate_up)[0], definition.swiglu_backward(dy, gate_up)[0])
    kept, _ = swiglu.swiglu_tiles(gate_up)
    assert torch.equal(kept.scale, quantize_definition.quantize_rows(gate_up).scale)
    # Nothing of this came from a kernel; the guard wants something to look at.
    swiglu.swiglu(gate_up.float())


def test_what_cannot_be_done_is_said() -> None:
    gate_up, dy = normal(3, 64, torch.float32), normal(3, 32, torch.float32)
    with pytest.raises(ValueError, match=r"swiglu: row weights \(4,\).*allowed is \(3,\)"):
        swiglu.swiglu(gate_up, torch.ones(4))
    with pytest.raises(ValueError, match=r"swiglu_backward: dy \(3, 16\).*allowed is \(3, 32\)"):
        swiglu.swiglu_backward(dy[:, :16], gate_up)
    with pytest.raises(ValueError, match=r"swiglu_tiles.*multiple of 32"):
        swiglu.swiglu_tiles(gate_up[:, :16])
    kept, _ = swiglu.swiglu_tiles(gate_up)
    with pytest.raises(ValueError, match=r"counts \(1, 1\) sum to 2; the matrix has 3 rows"):
        swiglu.swiglu_columns(kept, counts=[1, 1])
