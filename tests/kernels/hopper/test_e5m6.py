"""E5M6 as Triton kernels: codes, values and requantised tiles bit-equal to the torch definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import e5m6 as definition
from kernels.e5m6 import E5M6
from kernels.hopper import e5m6, quantize
from tests.kernels.hopper.memory import guarded, surrounded

FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sample(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Tiles that use all of E5M6's binades, its subnormals too, with a row of zeros, among NaN."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-28, 3, (rows, columns), generator=generator))
    x *= torch.exp2(torch.randint(-40, 40, (rows, 1), generator=generator))
    x[rows // 2] = 0.0
    x[0, 3:7] = torch.tensor([2.0**-100, 2.0**-107, -(2.0**-117), 2.0**-130])
    return surrounded(x.to(dtype))


def assert_same(q: E5M6, expected: E5M6) -> None:
    assert q.codes.dtype == torch.int16 and torch.equal(q.codes, expected.codes)
    assert torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [(1, 16), (130, 144), (3, 576), (65, 2112)])
def test_encoding_and_decoding(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(*shape, dtype)
    with guarded(monkeypatch, e5m6, quantize):
        q = e5m6.encode(x)
        values = e5m6.decode(q, dtype)
    assert_same(q, definition.encode(x))
    assert q.codes.is_contiguous() and q.scale.stride(0) == 1 and q.scale.stride(1) % 16 == 0
    assert torch.equal(values, definition.decode(q, dtype)) and values.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [(1, 16), (130, 144), (3, 576)])
def test_columns_of_stored_codes(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = definition.encode(sample(*shape, torch.float32))
    expected = definition.decode_columns(stored, dtype)
    around = E5M6(surrounded(stored.codes), surrounded(stored.scale))
    with guarded(monkeypatch, e5m6, quantize):
        q = e5m6.decode_columns(around, dtype)
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(q.scale, expected.scale) and q.counts is None
    padded = q.data.stride(0)
    assert padded % 128 == 0 and q.scale.stride() == (1, shape[1])
    assert not q.data.view(torch.uint8).as_strided((shape[1], padded), (padded, 1))[:, shape[0] :].any()


def test_largest_number_of_a_tile() -> None:
    # The floats around 65024 times a power of two, where the scale doubles.
    middle = torch.tensor([65024.0, 65024.0 * 2.0**-60, 65024.0 * 2.0**90]).view(torch.int32).unsqueeze(1)
    x = torch.zeros(9, 16)
    x[:, 0] = (middle + torch.tensor([-1, 0, 1], dtype=torch.int32)).view(torch.float32).flatten()
    q = e5m6.encode(x)
    assert_same(q, definition.encode(x))
    assert torch.equal(q.scale.view(3, 3)[:, 1:] / q.scale.view(3, 3)[:, :1], torch.tensor([[1.0, 2.0]] * 3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_every_code() -> None:
    codes = torch.arange(4096, dtype=torch.int16).view(32, 128)
    stored = E5M6(codes, torch.full((32, 1), 0.25))
    expected = definition.decode(stored)
    finite = expected.isfinite()
    assert torch.equal(e5m6.decode(stored).isfinite(), finite)
    assert torch.equal(e5m6.decode(stored)[finite], expected[finite])
    # The largest number of the format in every tile, so that the scale is one and codes come back.
    numbers = definition.from_codes(codes).where(finite, 0.0)
    numbers[:, 0] = definition.E5M6_MAX
    assert_same(e5m6.encode(numbers), definition.encode(numbers))
    assert bool((definition.encode(numbers).scale == 1).all())


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([16, 144]))
def test_any_finite_bits(seed: int, rows: int, columns: int) -> None:
    words = torch.randint(-(2**31), 2**31, (rows, columns), generator=torch.Generator().manual_seed(seed))
    x = words.to(torch.int32).view(torch.float32).nan_to_num(0.0, 0.0, 0.0)
    # Near the tile's largest number, where codes are not all zero.
    x = torch.ldexp(torch.frexp(x).mantissa, (words % 40 - 20).to(torch.int32))
    assert_same(e5m6.encode(x), definition.encode(x))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_poison_their_tile(bad: float) -> None:
    x = torch.randn(2, 256)
    x[1, 5] = bad
    q, expected = e5m6.encode(x), definition.encode(x)
    assert torch.equal(q.scale.isnan(), expected.scale.isnan()) and int(q.scale.isnan().sum()) == 1
    assert torch.equal(definition.from_codes(q.codes).isnan(), definition.from_codes(expected.codes).isnan())
    assert torch.equal(e5m6.decode(q).isfinite(), definition.decode(expected).isfinite())
    assert torch.equal(e5m6.decode_columns(q).scale.isnan(), definition.decode_columns(expected).scale.isnan())


def test_other_floats_go_to_the_definition() -> None:
    x = sample(5, 24, torch.float32).double()
    assert_same(e5m6.encode(x), definition.encode(x))
    assert torch.equal(e5m6.decode(e5m6.encode(x), torch.float64), definition.decode(definition.encode(x), x.dtype))


def test_no_rows() -> None:
    q = e5m6.encode(torch.zeros(0, 144))
    assert q.shape == e5m6.decode(q).shape == (0, 144) and e5m6.decode_columns(q).shape == (144, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e5m6.encode(torch.zeros(4, 24)), r"\(4, 24\).*multiples of 16"),
        (lambda: e5m6.decode(definition.encode(torch.zeros(4, 24))), "multiples of 16"),
        (lambda: e5m6.decode_columns(definition.encode(torch.zeros(4, 24))), "multiples of 16"),
        (lambda: e5m6.encode(torch.zeros(4, 2, 32)), "float matrix"),
        (lambda: e5m6.encode(torch.zeros(4, 32, dtype=torch.int32)), "float matrix"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_variants_name_every_argument_once() -> None:
    for variant in e5m6.variants():
        assert {*variant.signature, *variant.constants} == set(variant.kernel.arg_names)
        assert not {*variant.signature} & {*variant.constants} and {*variant.aligned} <= {*variant.signature}
    names = [variant.name for variant in e5m6.variants() + quantize.variants()]
    assert len(set(names)) == len(names)
