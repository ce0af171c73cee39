"""Block-scaled E4M3: codes and scales bit-equal to a search over the value table; edges, groups, non-finite input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import e5m6
from kernels.quantize import (
    Quantized,
    dequantize,
    dequantize_groups,
    dequantize_reference,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_rows,
    requantize_columns,
)
from tests.kernels.oracles import minifloat_values, quantize_tiles


def sample(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose size varies over rows and columns, with a zero row and an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (rows, 1), generator=generator))
    x *= torch.exp2(torch.randint(-4, 4, (1, columns), generator=generator))
    x[rows // 2] = 0.0
    x[0, 0] = 3e4
    return x.to(dtype)


def codes(q: Quantized) -> np.ndarray:
    return q.data.view(torch.uint8).numpy()


def assert_same(q: Quantized, expected: Quantized) -> None:
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 128), (3, 576), (130, 80), (1, 48), (7, 256)])
def test_rows_and_columns_equal_table_search(shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    x = sample(*shape, dtype)
    plain = x.float().numpy()
    q = quantize_rows(x, power_of_two)
    expected, scales = quantize_tiles(plain, 1, 128, power_of_two)
    assert np.array_equal(codes(q), expected) and np.array_equal(q.scale.numpy(), scales)
    assert q.has_tile("1x128") and q.tile == "1x128"

    q = quantize_columns(x, power_of_two)
    expected, scales = quantize_tiles(plain.T, 1, 128, power_of_two)
    assert np.array_equal(codes(q), expected) and np.array_equal(q.scale.numpy(), scales)
    assert q.has_tile("1x128")


@pytest.mark.parametrize("shape", [(128, 256), (576, 80), (48, 144), (16, 16)])
def test_blocks_equal_table_search_alone_and_stacked(shape: tuple[int, int]) -> None:
    stack = torch.stack([sample(*shape, seed=seed) for seed in range(3)])
    together = quantize_blocks(stack)
    for expert in range(3):
        alone = quantize_blocks(stack[expert])
        expected, scales = quantize_tiles(stack[expert].numpy(), 128, 128)
        assert np.array_equal(codes(alone), expected) and np.array_equal(alone.scale.numpy(), scales)
        assert_same(Quantized(together.data[expert], together.scale[expert]), alone)
    assert together.tile == alone.tile == "128x128"


def test_kv_a_has_five_row_blocks() -> None:
    assert quantize_blocks(torch.randn(576, 256)).scale.shape == (5, 2)


def test_power_of_two_scale_is_kept_when_exact_and_rounded_up_else() -> None:
    x = torch.zeros(3, 16)
    x[:, 0] = torch.tensor([448.0 * 0.25, np.nextafter(np.float32(112), np.float32(200)), 0.0])
    assert quantize_rows(x, power_of_two=True).scale.flatten().tolist() == [0.25, 0.5, 2.0**-108]


class _NoDivisionByNumbers(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "div" not in str(func) or all(isinstance(arg, Tensor) for arg in args), (func, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_are_quotients_on_every_device(power_of_two: bool) -> None:
    """torch divides a CUDA tensor by a Python number as a product with its reciprocal: every second scale would be
    another there than here."""
    x = sample(40, 144)
    with _NoDivisionByNumbers():
        quantize_both(x, power_of_two, counts=(30, 10))
        quantize_blocks(x[:32])
        e5m6.encode(x)


def test_every_code_decodes_to_its_value() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scale = torch.tensor([[1.5], [2.0**-20]])
    q = Quantized(data, scale)
    ordinary = torch.arange(128) != 127
    table = torch.from_numpy(minifloat_values(4, 3, 7)).view(2, 128)
    expected = (table * scale.double())[:, ordinary]
    assert torch.equal(dequantize_reference(q, torch.float64)[:, ordinary], expected)
    assert torch.equal(dequantize(q, torch.float64)[:, ordinary], expected)
    assert torch.equal(dequantize(q)[:, ordinary], expected.float())
    assert torch.equal(dequantize(q, torch.bfloat16)[:, ordinary], expected.float().bfloat16())
    assert dequantize_reference(q)[:, ~ordinary].isnan().all()


SHAPES = [(144, 576), (128, 128), (16, 48), (1, 16)]


@pytest.mark.parametrize(
    ("make", "shape"),
    # Weights have row counts divisible by 16: the last shape is none.
    [(make, shape) for make in (quantize_rows, quantize_columns) for shape in SHAPES]
    + [(quantize_blocks, shape) for shape in SHAPES[:-1]],
)
def test_fast_dequantisation_equals_the_definition(make: object, shape: tuple[int, int]) -> None:
    q = make(sample(*shape))  # type: ignore[operator]
    assert torch.equal(dequantize(q), dequantize_reference(q))
    contiguous = Quantized(q.data.view(torch.uint8).contiguous().view(torch.float8_e4m3fn), q.scale.contiguous())
    assert torch.equal(dequantize(contiguous), dequantize(q))


def test_stacked_dequantisation_equals_the_definition() -> None:
    q = quantize_blocks(torch.randn(3, 144, 80))
    assert torch.equal(dequantize(q), dequantize_reference(q))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("counts", [[0, 130, 0, 1, 128, 77, 0], [256], [0, 0], []])
def test_groups_are_quantised_apart_and_padded(counts: list[int], power_of_two: bool) -> None:
    x = sample(max(sum(counts), 1), 48)[: sum(counts)]
    q = quantize_columns(x, power_of_two, counts)
    assert q.counts == tuple(counts)
    first = start = 0
    for count in counts:
        end = start + -(-count // 128) * 128
        if count:
            alone = quantize_columns(x[first : first + count], power_of_two)
            assert np.array_equal(codes(q)[:, start : start + count], codes(alone))
            assert torch.equal(q.scale[:, start // 128 : end // 128], alone.scale)
            assert not codes(q)[:, start + count : end].any()
        first, start = first + count, end
    assert q.data.shape == (48, start) and q.scale.shape == (48, start // 128)
    kept = torch.cat([torch.zeros(0, dtype=torch.int64), *padded_columns(counts)])
    assert torch.equal(dequantize_groups(q), dequantize(q)[:, kept])


def padded_columns(counts: list[int]) -> list[Tensor]:
    starts = np.cumsum([0] + [-(-count // 128) * 128 for count in counts])
    return [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]


def test_requantisation_goes_through_the_stored_tiles() -> None:
    x = sample(200, 144, torch.bfloat16)
    stored = quantize_rows(x, power_of_two=True)
    for counts in (None, [100, 0, 100]):
        again = requantize_columns(stored, True, counts)
        assert_same(again, quantize_columns(dequantize_reference(stored), True, counts))
        assert not torch.equal(again.data.view(torch.uint8), quantize_columns(x, True, counts).data.view(torch.uint8))


def test_both_are_rows_and_columns() -> None:
    x = sample(200, 144)
    for counts in (None, [100, 0, 100]):
        rows, columns = quantize_both(x, True, counts)
        assert_same(rows, quantize_rows(x, True))
        assert_same(columns, quantize_columns(x, True, counts))
        assert columns.counts == (None if counts is None else tuple(counts))


def test_rows_travel_as_bytes_and_by_index() -> None:
    q = quantize_rows(sample(9, 144))
    packed = q.to_bytes()
    assert packed.dtype == torch.uint8 and packed.shape == (9, 144 + 8) and Quantized.row_bytes(144) == 152
    assert_same(Quantized.from_bytes(packed, 144), q)
    index = torch.tensor([3, 3, 0, 8])
    taken = q.index_rows(index)
    assert_same(Quantized.from_bytes(packed[index], 144), taken)
    assert torch.equal(dequantize(taken), dequantize(q)[index])
    assert_same(q.index_rows(slice(2, 5)), q.index_rows(torch.arange(2, 5)))
    assert q.index_rows(index[:0]).shape == (0, 144)
    with pytest.raises(ValueError, match="152 bytes"):
        Quantized.from_bytes(packed[:, :150], 144)
    with pytest.raises(ValueError, match="1x128"):
        quantize_blocks(torch.randn(144, 144)).to_bytes()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_poisons_its_tile_and_no_other(bad: float, power_of_two: bool) -> None:
    x = torch.randn(130, 256)
    x[1, 200] = bad
    rows = dequantize(quantize_rows(x, power_of_two))
    assert not rows[1, 200].isfinite()
    assert rows[1, :128].isfinite().all() and rows[0].isfinite().all()
    columns = dequantize(quantize_columns(x, power_of_two))
    assert not columns[200, 1].isfinite() and columns[200, 128:].isfinite().all()
    grouped = dequantize_groups(quantize_columns(x, power_of_two, [64, 66]))
    assert not grouped[200, 1].isfinite() and grouped[200, 64:].isfinite().all()
    if not power_of_two:
        assert not dequantize(quantize_blocks(x[:128]))[1, 200].isfinite()


def test_remembered_values_are_computed_once() -> None:
    q = quantize_blocks(torch.randn(3, 48, 80))
    kept = q.remember()
    first = dequantize(kept)
    assert dequantize(kept) is first and torch.equal(first, dequantize(q)) and dequantize(q) is not dequantize(q)
    assert torch.equal(dequantize(kept, torch.bfloat16), first.bfloat16())
    assert torch.equal(dequantize(kept, torch.float64), dequantize_reference(q, torch.float64))


def test_inputs_are_not_changed() -> None:
    x = sample(130, 144)
    before = x.clone()
    quantize_rows(x), quantize_columns(x), quantize_columns(x, counts=[130]), quantize_blocks(x[:128])
    assert torch.equal(x, before)


def test_zero_rows() -> None:
    empty = torch.zeros(0, 144)
    assert quantize_rows(empty).scale.shape == (0, 2)
    assert dequantize(quantize_rows(empty)).shape == (0, 144)
    assert quantize_columns(empty).data.shape == (144, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_rows(torch.zeros(4, 24)), r"\(4, 24\).*multiple of 16"),
        (lambda: quantize_rows(torch.zeros(2, 4, 32)), "matrix"),
        (lambda: quantize_rows(torch.zeros(4, 32, dtype=torch.int32)), "int32"),
        (lambda: quantize_blocks(torch.zeros(24, 32)), r"\(24, 32\).*multiples of 16"),
        (lambda: quantize_columns(torch.zeros(4, 32), counts=[1, 2]), "sum to 3; the matrix has 4 rows"),
        (lambda: quantize_columns(torch.zeros(4, 32), counts=[-1, 5]), "4 rows, each group 0 or more"),
        (lambda: quantize_blocks(torch.zeros(32, 32, dtype=torch.int8)), "weight torch.int8 of shape .* a float"),
        (lambda: quantize_columns(torch.zeros(4, 32), counts=[5, -1]), "-1"),
        (lambda: requantize_columns(quantize_blocks(torch.zeros(32, 32))), "128x128"),
        (lambda: dequantize_groups(quantize_columns(torch.zeros(4, 32))), "without counts"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
