"""FP8 products in two tiers (against the BF16 product, and the exact product of what was quantised); plain products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import gemm, grouped
from kernels.quantize import Quantized, dequantize, quantize_blocks, quantize_columns, quantize_rows, requantize_columns
from tests.kernels.oracles import calc_diff

AGAINST_BF16 = 1e-3
AGAINST_DEQUANTIZED = 1e-6
SHAPES = [(512, 128, 256), (64, 576, 256), (130, 256, 576), (200, 80, 48), (1, 48, 80), (257, 144, 1024)]


def operands(m: int, n: int, k: int, outliers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 x [m, k], w [n, k], dy [m, n] with a zero row (where there are several) and, when asked, outliers."""
    generator = torch.Generator().manual_seed(m + n + k)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (m, n)))
    w *= 0.02
    dy *= 1e-3
    if m > 1:
        x[m // 2] = 0.0
        dy[m // 3] = 0.0
    if outliers:
        x[:, 7] *= 300.0
        dy[m // 2] *= 1000.0
        w[3] *= 50.0
    return x.bfloat16(), w.bfloat16(), dy.bfloat16()


def exact(a: Quantized, b: Quantized) -> Tensor:
    """a b^T of what is stored, in float64, by torch's own conversion from FP8."""
    return dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()


def products(x: Tensor, w: Tensor, dy: Tensor, power_of_two: bool) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """kind -> (fast, by definition, exact product of the stored numbers, exact product of the BF16 operands)."""
    qx, qw, qdy = quantize_rows(x, power_of_two), quantize_blocks(w), quantize_rows(dy, power_of_two)
    x_t, dy_t = quantize_columns(x, power_of_two), quantize_columns(dy, power_of_two)
    w_t = gemm.transpose_blocks(qw)
    wide_x, wide_w, wide_dy = x.double(), w.double(), dy.double()
    fast = {
        "fprop": gemm.fprop(qx, qw, torch.float32),
        "dgrad": gemm.dgrad(qdy, qw, torch.float32),
        "wgrad": gemm.wgrad(dy_t, x_t),
    }
    pairs = {"fprop": (qx, qw), "dgrad": (qdy, w_t), "wgrad": (dy_t, x_t)}
    plain = {"fprop": wide_x @ wide_w.t(), "dgrad": wide_dy @ wide_w, "wgrad": wide_dy.t() @ wide_x}
    return {k: (fast[k], gemm.product_reference(*pairs[k]), exact(*pairs[k]), plain[k]) for k in fast}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_tiers(shape: tuple[int, int, int], power_of_two: bool) -> None:
    for kind, (fast, defined, stored, plain) in products(*operands(*shape), power_of_two).items():
        assert fast.dtype == defined.dtype == torch.float32 and fast.shape == plain.shape
        assert calc_diff(fast, stored) < AGAINST_DEQUANTIZED, kind
        assert calc_diff(defined, stored) < AGAINST_DEQUANTIZED, kind
        assert calc_diff(fast, plain) < AGAINST_BF16, kind


@pytest.mark.parametrize("shape", SHAPES)
def test_outliers_keep_the_second_tier(shape: tuple[int, int, int]) -> None:
    for kind, (fast, defined, stored, _) in products(*operands(*shape, outliers=True), False).items():
        assert calc_diff(fast, stored) < AGAINST_DEQUANTIZED, kind
        assert calc_diff(defined, stored) < AGAINST_DEQUANTIZED, kind


def test_bf16_output_is_the_fp32_result_rounded_once() -> None:
    x, w, dy = operands(64, 128, 256)
    qx, qw, qdy = quantize_rows(x), quantize_blocks(w), quantize_rows(dy)
    assert gemm.fprop(qx, qw).dtype == torch.bfloat16
    assert torch.equal(gemm.fprop(qx, qw), gemm.fprop(qx, qw, torch.float32).bfloat16())
    assert torch.equal(gemm.dgrad(qdy, qw, torch.bfloat16), gemm.dgrad(qdy, qw, torch.float32).bfloat16())
    assert calc_diff(gemm.fprop(qx, qw), exact(qx, qw)) < 1e-5


def test_a_single_row_is_as_in_a_batch() -> None:
    x, w, _ = operands(4, 48, 576)
    qx, qw = quantize_rows(x), quantize_blocks(w)
    alone = gemm.fprop(qx.index_rows(slice(1, 2)), qw, torch.float32)
    assert calc_diff(alone, gemm.fprop(qx, qw, torch.float32)[1:2]) < 1e-12


def test_zero_rows_give_zero_results() -> None:
    x, w, dy = operands(30, 48, 80)
    assert not gemm.fprop(quantize_rows(x), quantize_blocks(w))[15].any()
    none = quantize_rows(x[:0])
    assert gemm.fprop(none, quantize_blocks(w)).shape == (0, 48)
    dw = gemm.wgrad(quantize_columns(dy[:0]), quantize_columns(x[:0]))
    assert dw.shape == (48, 80) and not dw.any()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_wgrad_of_requantised_tiles(power_of_two: bool) -> None:
    x, _, dy = operands(512, 128, 256)
    stored_x, stored_dy = quantize_rows(x, power_of_two), quantize_rows(dy, power_of_two)
    dw = gemm.wgrad(requantize_columns(stored_dy, power_of_two), requantize_columns(stored_x, power_of_two))
    plain = dy.double().t() @ x.double()
    assert calc_diff(dw, plain) < (1e-3 if power_of_two else 2e-3)


def shifted_scale(q: Quantized) -> Quantized:
    return Quantized(q.data, q.scale.roll(1, -1))


def dropped_element(q: Quantized) -> Quantized:
    data = q.data.view(torch.uint8).clone()
    data[:, 77] = 0
    return Quantized(data.view(torch.float8_e4m3fn), q.scale)


@pytest.mark.parametrize("mutate", [shifted_scale, dropped_element])
def test_mutants_fail_the_second_tier(mutate: Callable[[Quantized], Quantized]) -> None:
    x, w, dy = operands(512, 256, 576)
    qx, qw, qdy = quantize_rows(x), quantize_blocks(w), quantize_rows(dy)
    x_t, dy_t = quantize_columns(x), quantize_columns(dy)
    wrong = {
        "fprop": (gemm.fprop(mutate(qx), qw, torch.float32), exact(qx, qw)),
        "dgrad": (gemm.dgrad(mutate(qdy), qw, torch.float32), exact(qdy, gemm.transpose_blocks(qw))),
        "wgrad": (gemm.wgrad(dy_t, mutate(x_t)), exact(dy_t, x_t)),
    }
    for kind, (found, stored) in wrong.items():
        assert calc_diff(found, stored) > AGAINST_DEQUANTIZED, kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_products(dtype: torch.dtype) -> None:
    x, w, dy = (tensor.to(dtype) for tensor in operands(33, 20, 50))
    wide_x, wide_w, wide_dy = x.double(), w.double(), dy.double()
    results = gemm.fprop(x, w), gemm.dgrad(dy, w), gemm.wgrad(dy, x)
    expected = wide_x @ wide_w.t(), wide_dy @ wide_w, wide_dy.t() @ wide_x
    high = torch.promote_types(dtype, torch.float32)
    limit = {torch.float64: 1e-30, torch.float32: 1e-13, torch.bfloat16: 1e-5}
    for found, wanted, found_dtype in zip(results, expected, (dtype, dtype, high), strict=True):
        assert found.dtype == found_dtype and calc_diff(found, wanted) < limit[dtype]
    assert calc_diff(results[2], expected[2]) < limit[high]
    assert gemm.fprop(x, w, torch.float64).dtype == torch.float64


def test_wgrad_adds_into_an_accumulator() -> None:
    x, _, dy = operands(33, 32, 48)
    total = torch.ones(32, 48)
    assert gemm.wgrad(dy, x, into=total) is total
    assert torch.equal(total, 1.0 + gemm.wgrad(dy, x))


def test_bad_pairs_are_refused() -> None:
    x, w, dy = operands(32, 48, 80)
    qx, qw = quantize_rows(x), quantize_blocks(w)
    one_scale = Quantized(qx.data, qx.scale[:1, :1])
    for error, message, call in (
        (TypeError, "one operand is FP8", lambda: gemm.fprop(qx, w)),
        (TypeError, "one dtype", lambda: gemm.fprop(x, w.float())),
        (ValueError, "128x128 are needed", lambda: gemm.fprop(qx, quantize_rows(w))),
        (ValueError, "1x128 are needed", lambda: gemm.fprop(one_scale, qw)),
        (ValueError, "1x128 are needed", lambda: gemm.wgrad(quantize_blocks(w), quantize_blocks(w))),
        (ValueError, r"gate.*\(32, 48\).*\(48, 80\) differ in K", lambda: gemm.fprop(dy, w, name="gate")),
        (ValueError, "differ in N", lambda: gemm.dgrad(x, w)),
        (ValueError, "differ in M", lambda: gemm.wgrad(dy[:5], x)),
        (ValueError, "2 dimensions", lambda: gemm.fprop(x[None], w)),
        (ValueError, "one device", lambda: gemm.fprop(x, w.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_tensor_cores_get_plain_operands_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which products a GPU is asked for, its `mm` played by a CPU: BF16 operands, never widened, FP32 where FP32 is
    wanted."""
    asked: list[tuple[torch.dtype, torch.dtype, torch.dtype | None]] = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        asked.append((a.dtype, b.dtype, out_dtype))
        return (a.double() @ b.double()).to(out_dtype or a.dtype)

    x, w, dy = operands(130, 48, 80)
    counts, experts = [100, 0, 30], torch.stack((w, -w, w * 3))
    calls: list[Callable[[], Tensor]] = [
        lambda: gemm.fprop(x, w),
        lambda: gemm.fprop(x, w, torch.float32),
        lambda: gemm.dgrad(dy, w),
        lambda: gemm.wgrad(dy, x),
        lambda: grouped.fprop(x, experts, counts),
        lambda: grouped.dgrad(dy, experts, counts, torch.float32),
        lambda: grouped.wgrad(dy, x, counts),
    ]
    wanted = [call() for call in calls]
    for module in (gemm, grouped):
        monkeypatch.setattr(module, "on_tensor_cores", lambda operand: operand.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    for call, expected in zip(calls, wanted, strict=True):
        found = call()
        assert found.dtype == expected.dtype and calc_diff(found, expected) < 1e-5
    half, full = torch.bfloat16, torch.float32
    kinds = [None, full, None, full, *[None] * 3, *[full] * 3, *[full] * 3]
    assert asked == [(half, half, kind) for kind in kinds]
