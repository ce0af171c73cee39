"""The quantisers as Triton kernels: codes and scales bit-equal to the torch definition, in the layouts promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import quantize as definition
from kernels.hopper import layout, quantize
from kernels.quantize import Quantized, dequantize_reference
from tests.kernels.hopper.memory import guarded, surrounded

FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMS = [(torch.bfloat16, False), (torch.float32, True)]
# One row, whole and edge tiles, the widths of V3's kv_a and q_a + kv_a.
SHAPES = [(1, 16), (130, 128), (129, 144), (3, 576), (2, 2112)]
COUNTS = [0, 130, 0, 1, 128, 77, 0]


def sample(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, with a row and a tile of zeros and an outlier, among NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (rows, 1), generator=generator))
    x *= torch.exp2(torch.randint(-4, 4, (1, columns), generator=generator))
    x[rows // 2] = 0.0
    x[:128, columns // 2] = 0.0
    x[0, 0] = 3e4
    return surrounded(x.to(dtype))


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def assert_same(q: Quantized, expected: Quantized) -> None:
    assert torch.equal(bits(q.data), bits(expected.data))
    assert torch.equal(q.scale, expected.scale)
    assert q.counts == expected.counts


def assert_row_layout(q: Quantized) -> None:
    rows = q.rows
    assert q.data.is_contiguous()
    assert q.scale.stride(0) == 1 and q.scale.stride(1) % 16 == 0 and q.scale.stride(1) >= rows
    padding = q.scale.t().as_strided((q.scale.shape[1], q.scale.stride(1)), (q.scale.stride(1), 1))[:, rows:]
    assert bool(padding.isfinite().all())


def assert_column_layout(q: Quantized) -> None:
    features, tokens = q.shape
    padded = q.data.stride(0)
    assert padded % 128 == 0 and padded >= tokens and q.data.stride(1) == 1
    whole = bits(q.data).as_strided((features, padded), (padded, 1))
    assert not whole[:, tokens:].any()
    assert q.scale.shape == (features, padded // 128) and q.scale.stride() == (1, features)


@pytest.mark.parametrize(
    ("shape", "dtype", "power_of_two"),
    [(shape, *form) for shape in SHAPES for form in FORMS] + [((4097, 16), torch.bfloat16, False)],
)
def test_rows_and_columns(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sample(*shape, dtype)
    expected_rows, expected_columns = definition.quantize_both(x, power_of_two)
    with guarded(monkeypatch, quantize):
        rows = quantize.quantize_rows(x, power_of_two)
        columns = quantize.quantize_columns(x, power_of_two)
        both = quantize.quantize_both(x, power_of_two)
    for q in (rows, both[0]):
        assert_same(q, expected_rows)
        assert_row_layout(q)
    for q in (columns, both[1]):
        assert_same(q, expected_columns)
        assert_column_layout(q)


@pytest.mark.parametrize(("dtype", "power_of_two"), FORMS)
@pytest.mark.parametrize("counts", [COUNTS, [256], [1, 1, 1], [0, 0]])
def test_groups(counts: list[int], dtype: torch.dtype, power_of_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(max(1, sum(counts)), 144, dtype)[: sum(counts)]
    expected_rows, expected = definition.quantize_both(x, power_of_two, counts)
    with guarded(monkeypatch, quantize):
        columns = quantize.quantize_columns(x, power_of_two, counts)
        rows, both = quantize.quantize_both(x, power_of_two, counts)
    for q in (columns, both):
        assert_same(q, expected)
        assert q.shape == (144, layout.padded_total(counts))
        if sum(counts):
            assert_column_layout(q)
    assert_same(rows, expected_rows)


def test_a_group_writes_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(sum(COUNTS), 48, torch.bfloat16)
    # The interpreter's programs run in order, a GPU's do not: what a tile writes too much comes last here.
    monkeypatch.setattr(quantize, "tile_table", lambda *given: layout.tile_table(*given).flip(1).contiguous())
    assert_same(quantize.quantize_both(x, counts=COUNTS)[0], definition.quantize_rows(x))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [(16, 16), (576, 80), (2, 144, 272)])
def test_blocks(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w = sample(shape[0] * shape[-2] if len(shape) == 3 else shape[0], shape[-1], dtype).reshape(shape)
    w[..., 15, 3] = 7e4
    with guarded(monkeypatch, quantize):
        q = quantize.quantize_blocks(w)
    assert_same(q, definition.quantize_blocks(w))
    assert q.transposed is not None and q.transposed.is_contiguous()
    assert torch.equal(bits(q.transposed), bits(q.data).transpose(-2, -1))
    assert q.tile == "128x128"


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_stored_tiles_along_tokens(
    counts: list[int] | None, power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = definition.quantize_rows(sample(336, 144, torch.bfloat16), power_of_two)
    expected = definition.requantize_columns(stored, power_of_two, counts)
    # Scales as the definition, as these kernels, and as a transport stores them.
    token_first = layout.row_scales(336, 144, stored.device)
    token_first.copy_(stored.scale)
    for scale in (surrounded(stored.scale), token_first):
        with guarded(monkeypatch, quantize):
            q = quantize.requantize_columns(Quantized(surrounded(stored.data), scale), power_of_two, counts)
        assert_same(q, expected)
        assert_column_layout(q)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_dequantisation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(70, 144, torch.float32)
    made = [
        definition.quantize_rows(x),
        definition.quantize_columns(x),
        quantize.quantize_rows(x),
        quantize.quantize_columns(x),
        quantize.quantize_columns(x, True, [1, 0, 69]),
        definition.quantize_blocks(x[:64]),
        definition.quantize_blocks(torch.randn(2, 144, 16)),
    ]
    for q in made:
        with guarded(monkeypatch, quantize):
            values = quantize.dequantize(q, dtype)
        assert torch.equal(values, dequantize_reference(q).to(dtype))
    assert quantize.dequantize(made[1]).stride() == made[1].data.stride()


def test_power_of_two_scale_is_kept_when_exact_and_rounded_up_else() -> None:
    x = torch.zeros(3, 16)
    x[:, 0] = torch.tensor([448.0 * 0.25, 448.0 * 0.25 * (1 + 2.0**-23), 0.0])
    assert quantize.quantize_rows(x, True).scale.flatten().tolist() == [0.25, 0.5, 2.0**-108]


def test_every_code_has_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    q = Quantized(codes, torch.tensor([[1.5], [2.0**-20]]))
    assert torch.equal(quantize.dequantize(q).nan_to_num(nan=9e9), dequantize_reference(q).nan_to_num(nan=9e9))


def test_remembered_values_are_computed_once() -> None:
    q = quantize.quantize_blocks(torch.randn(48, 80)).remember()
    first = quantize.dequantize(q)
    assert quantize.dequantize(q) is first and torch.equal(first, dequantize_reference(q))
    assert torch.equal(quantize.dequantize(q, torch.bfloat16), first.bfloat16())
    assert torch.equal(quantize.dequantize(q, torch.float64), dequantize_reference(q, torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_poison_what_the_definition_poisons(bad: float, power_of_two: bool) -> None:
    x = torch.randn(130, 144)
    x[1, 140] = bad
    x[129, 0] = bad
    pairs = [*zip(quantize.quantize_both(x, power_of_two), definition.quantize_both(x, power_of_two), strict=True)]
    counts = [64, 66]
    pairs.append(
        (quantize.quantize_columns(x, power_of_two, counts), definition.quantize_columns(x, power_of_two, counts))
    )
    if not power_of_two:
        pairs.append((quantize.quantize_blocks(x[:128]), definition.quantize_blocks(x[:128])))
    for q, expected in pairs:
        finite = expected.scale.isfinite()
        assert torch.equal(q.scale.isfinite(), finite) and not finite.all()
        assert torch.equal(q.scale[finite], expected.scale[finite])
        assert torch.equal(q.scale.isnan(), expected.scale.isnan())
        # Codes too, but for the sign of a NaN.
        nan = (bits(expected.data) & 0x7F) == 0x7F
        assert torch.equal((bits(q.data) & 0x7F) == 0x7F, nan)
        assert torch.equal(bits(q.data)[~nan], bits(expected.data)[~nan])
        values, reference = quantize.dequantize(q), dequantize_reference(expected)
        assert torch.equal(values.isfinite(), reference.isfinite())


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([16, 48, 144]), st.sampled_from(FORMS))
def test_any_finite_bits(seed: int, rows: int, columns: int, form: tuple[torch.dtype, bool]) -> None:
    dtype, power_of_two = form
    words = torch.randint(-(2**31), 2**31, (rows, columns), generator=torch.Generator().manual_seed(seed))
    x = words.to(torch.int32).view(torch.float32).nan_to_num(0.0, 0.0, 0.0)
    x *= torch.exp2(torch.arange(rows) * -60.0).unsqueeze(1)
    x = x.to(dtype).nan_to_num(0.0, 0.0, 0.0)
    q, expected = quantize.quantize_both(x, power_of_two), definition.quantize_both(x, power_of_two)
    assert_same(q[0], expected[0])
    assert_same(q[1], expected[1])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 400), max_size=9))
def test_table_of_tiles(counts: list[int]) -> None:
    table = layout.tile_table(counts, torch.device("cpu"))
    expected, first = [], 0
    for count in counts:
        expected += [(first + start, min(128, count - start)) for start in range(0, count, 128)]
        first += count
    assert table.t().tolist() == [list(pair) for pair in expected]
    assert 128 * table.shape[1] == layout.padded_total(counts)


def test_inputs_of_any_strides_and_alignment() -> None:
    wide = torch.randn(40, 160)
    for x in (wide[:, 3:35], wide[:, :32], wide.t()[:, :32], wide[:, ::2][:, :32], wide.view(-1)[1:1281].view(40, 32)):
        assert_same(quantize.quantize_rows(x), definition.quantize_rows(x))
        aligned = layout.readable(x)
        assert torch.equal(aligned, x) and aligned.data_ptr() % 16 == 0 and aligned.stride(0) % 16 == 0
    assert layout.readable(wide[:, 16:48]).data_ptr() == wide[:, 16:48].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_floats_go_to_the_definition(dtype: torch.dtype) -> None:
    x = sample(32, 48, torch.float32).clamp(-6e4, 6e4).to(dtype)
    for q, expected in zip(quantize.quantize_both(x), definition.quantize_both(x), strict=True):
        assert_same(q, expected)
        assert torch.equal(quantize.dequantize(q, dtype), definition.dequantize(q, dtype))
    assert_same(quantize.quantize_rows(x), definition.quantize_rows(x))
    assert_same(quantize.quantize_columns(x), definition.quantize_columns(x))
    assert_same(quantize.quantize_blocks(x), definition.quantize_blocks(x))


def test_no_rows() -> None:
    empty = torch.zeros(0, 144)
    for q, expected in zip(quantize.quantize_both(empty), definition.quantize_both(empty), strict=True):
        assert q.shape == expected.shape and q.scale.shape == expected.scale.shape
    assert quantize.quantize_rows(empty).shape == quantize.dequantize(quantize.quantize_rows(empty)).shape == (0, 144)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize.quantize_rows(torch.zeros(4, 24)), r"\(4, 24\).*multiple of 16"),
        (lambda: quantize.quantize_both(torch.zeros(2, 4, 32)), "matrix"),
        (lambda: quantize.quantize_rows(torch.zeros(4, 32, dtype=torch.int32)), "int32"),
        (lambda: quantize.quantize_blocks(torch.zeros(24, 32)), r"\(24, 32\).*multiples of 16"),
        (lambda: quantize.quantize_columns(torch.zeros(4, 32), counts=[1, 2]), "sum to 3; the matrix has 4 rows"),
        (lambda: quantize.quantize_columns(torch.zeros(4, 32), counts=[5, -1]), "-1"),
        (lambda: quantize.requantize_columns(definition.quantize_blocks(torch.zeros(32, 32))), "128x128"),
        (
            lambda: quantize.requantize_columns(
                Quantized(torch.zeros(2, 24).to(torch.float8_e4m3fn), torch.ones(2, 1))
            ),
            "multiple of 16",
        ),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_variants_name_every_argument_once() -> None:
    found = quantize.variants()
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        names = set(variant.kernel.arg_names)
        assert {*variant.signature, *variant.constants} == names and not {*variant.signature} & {*variant.constants}
        assert {*variant.aligned} <= {*variant.signature}
