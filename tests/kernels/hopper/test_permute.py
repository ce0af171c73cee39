"""Rows by index as Triton kernels: the definition's bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import permute as definition
from kernels import quantize as quantize_definition
from kernels.hopper import permute, quantize
from kernels.quantize import Quantized
from tests.kernels.hopper.closeness import assert_rows
from tests.kernels.hopper.memory import guarded, surrounded
from tests.kernels.oracles import gradients, largest_error

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
INDICES = {
    "one": [0],
    "none": [],
    "repeated": [3, 0, 3, 5, 0, 3, 1],
    "many": [(7 * i * i) % 6 for i in range(131)],
}


@pytest.fixture(autouse=True)
def bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with guarded(monkeypatch):
        yield


def normal(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.exp2(torch.arange(rows) % 9 - 4)[:, None]
    return surrounded(x.to(dtype))


def same_bytes(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("width", [16, 144, 576])
def test_fp8_rows_with_their_scales(width: int, index: list[int]) -> None:
    stored = quantize_definition.quantize_rows(normal(6, width), power_of_two=True)
    index_X = torch.tensor(index, dtype=torch.int64)
    expected = definition.take_rows(stored, index_X)
    token_first = quantize.row_scales(6, width, stored.device)
    token_first.copy_(stored.scale)
    # Scales as a transport and as these kernels store them.
    for scale in (surrounded(stored.scale), token_first):
        taken = permute.take_rows(Quantized(surrounded(stored.data), scale), index_X)
        assert same_bytes(taken.data, expected.data) and torch.equal(taken.scale, expected.scale)
        assert_rows(taken, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int64])
@pytest.mark.parametrize("width", [1, 20, 576])
def test_rows_of_any_type(width: int, dtype: torch.dtype) -> None:
    rows = surrounded((100 * normal(6, width)).to(dtype))
    index_X = torch.tensor(INDICES["repeated"])
    taken = permute.take_rows(rows, index_X)
    assert taken.is_contiguous() and same_bytes(taken, definition.take_rows(rows, index_X))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("width", [1, 8, 576, 1040])
def test_rows_are_summed_in_their_order(width: int, index: list[int], dtype: torch.dtype) -> None:
    index_X = torch.tensor(index, dtype=torch.int64)
    rows = normal(max(1, len(index)), width, dtype)[: len(index)]
    # Row 2 and the last have nothing to add.
    found = permute.sum_rows(rows, index_X, 8)
    assert same_bytes(found, definition.sum_rows(rows, index_X, 8))
    assert not found[7].any()


def test_summing_is_the_transpose_of_taking() -> None:
    x, index_X = normal(6, 32, torch.float64), torch.tensor(INDICES["repeated"])
    dy = normal(len(index_X), 32, torch.float64, seed=1)
    (expected,) = gradients(lambda x: x[index_X], (x,), dy)
    assert largest_error(permute.sum_rows(dy, index_X, 6), expected) < 1e-14
    assert permute.sum_rows(dy[:0], index_X[:0], 0).shape == (0, 32)


def test_what_cannot_be_done_is_said() -> None:
    rows, index_X = normal(3, 32), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"sum_rows: rows \(3, 32\), indices \(2,\); allowed is one a row"):
        permute.sum_rows(rows, index_X, 3)
    with pytest.raises(ValueError, match=r"take_rows: indices torch.float32.*allowed are \[X\] integers"):
        permute.take_rows(rows, index_X.float())
    with pytest.raises(ValueError, match=r"take_rows: rows \(32,\)"):
        permute.take_rows(rows[0], index_X)
    permute.take_rows(rows, index_X)


def test_indices_may_be_strided_or_narrow() -> None:
    rows, index = torch.randn(6, 32), torch.tensor([[0, 9], [5, 9], [5, 9], [2, 9]])[:, 0]
    for chosen in (index, index.to(torch.int32)):
        assert torch.equal(permute.take_rows(rows, chosen), rows[index])
        found = permute.sum_rows(rows[:4], chosen, 6)
        assert torch.equal(found, definition.sum_rows(rows[:4], index.contiguous(), 6))
