"""What the Triton products refuse, in one line with the shape, the rule and the remedy, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.hopper import gemm, grouped, launch
from kernels.quantize import Quantized, quantize_blocks, quantize_columns, quantize_rows
from tests.kernels.hopper.gemm_cases import random, rows, weight

COUNTS = (30, 10)
X, W, DY = random(40, 48), random(80, 48), random(40, 80)
WS = random(2, 80, 48)
QX, QW, QDY, QWS = rows(X), weight(W), rows(DY), weight(WS)
X_T, DY_T = quantize_columns(X), quantize_columns(DY)
X_GROUPS, DY_GROUPS = quantize_columns(X, counts=COUNTS), quantize_columns(DY, counts=COUNTS)


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def tiles(*shape: int) -> Quantized:
    return Quantized(codes(*shape), torch.ones(*shape[:-1], -(-shape[-1] // 128)))


def blocks(*shape: int) -> Quantized:
    scale = torch.ones(*shape[:-2], *(-(-width // 128) for width in shape[-2:]))
    return Quantized(codes(*shape), scale, transposed=codes(*shape[:-2], shape[-1], shape[-2]))


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a plain operand and an FP8 one": (TypeError, "one operand is FP8", lambda: gemm.fprop(QX, W)),
    "tiles where blocks belong": (ValueError, "128x128 are needed", lambda: gemm.fprop(QX, quantize_rows(W))),
    "other K": (ValueError, r"gate.*\(40, 80\).*\(80, 48\) differ in K", lambda: gemm.fprop(QDY, QW, name="gate")),
    "other N": (ValueError, r"up.*\(40, 48\).*\(80, 48\) differ in N", lambda: gemm.dgrad(QX, QW, name="up")),
    "other M": (ValueError, r"\(80, 41\).*\(48, 40\).*differ in M", lambda: gemm.wgrad(tiles(80, 41), X_T)),
    "two devices": (
        ValueError,
        "cpu and meta.*one device",
        lambda: gemm.fprop(QX, Quantized(QW.data.to("meta"), QW.scale.to("meta"))),
    ),
    "scales elsewhere": (
        ValueError,
        r"gate.*\(80, 48\).*scales on meta.*cpu.*move both",
        lambda: gemm.fprop(QX, Quantized(QW.data, QW.scale.to("meta")), name="gate"),
    ),
    "codes of another format": (
        TypeError,
        r"gate.*\(40, 48\).*float8_e5m2.*float8_e4m3fn and float32 are needed",
        lambda: gemm.fprop(Quantized(X.to(torch.float8_e5m2), QX.scale), QW, name="gate"),
    ),
    "scales in BF16": (
        TypeError,
        r"\(48, 40\).*bfloat16.*float32 are needed",
        lambda: gemm.wgrad(DY_T, Quantized(X_T.data, X_T.scale.bfloat16())),
    ),
    "K not a multiple of 16": (
        ValueError,
        r"gate.*\(40, 40\).*\(80, 40\).*K = 40.*multiples of 16.*pad the layer",
        lambda: gemm.fprop(tiles(40, 40), blocks(80, 40), name="gate"),
    ),
    "N not a multiple of 16, forward": (ValueError, "N = 72.*multiples of 16", lambda: gemm.fprop(QX, blocks(72, 48))),
    "N not a multiple of 16, input gradient": (
        ValueError,
        "N = 72.*multiples of 16",
        lambda: gemm.dgrad(tiles(40, 72), blocks(72, 48)),
    ),
    "N not a multiple of 16, weight gradient": (
        ValueError,
        r"\(72, 40\).*N = 72.*multiples of 16",
        lambda: gemm.wgrad(tiles(72, 40), X_T),
    ),
    "no transposed copy": (
        ValueError,
        r"gate.*\(80, 48\) has no transposed copy.*writes both layouts",
        lambda: gemm.dgrad(QDY, quantize_blocks(W), name="gate"),
    ),
    "a strided weight": (
        ValueError,
        r"gate.*\(80, 48\) has strides \(1, 80\).*copy it once",
        lambda: gemm.fprop(QX, Quantized(codes(48, 80).t(), QW.scale), name="gate"),
    ),
    "a result in another dtype": (
        ValueError,
        "gate.*float16.*bfloat16, torch.float32",
        lambda: gemm.fprop(QX, QW, torch.float16, name="gate"),
    ),
    "an accumulator in BF16": (
        ValueError,
        r"gate.*bfloat16 \(80, 48\).*contiguous float32 \(80, 48\)",
        lambda: gemm.wgrad(DY_T, X_T, into=W.clone(), name="gate"),
    ),
    "an accumulator of another shape": (
        ValueError,
        r"\(48, 80\).*contiguous float32 \(80, 48\)",
        lambda: gemm.wgrad(DY_T, X_T, into=torch.zeros(48, 80)),
    ),
    "a strided accumulator": (
        ValueError,
        r"strides \(1, 80\).*contiguous float32",
        lambda: gemm.wgrad(DY_T, X_T, into=torch.zeros(48, 80).t()),
    ),
    "too few counts": (
        ValueError,
        r"experts.*\[40\] do not describe 2 experts and 40 rows",
        lambda: grouped.fprop(QX, QWS, [40], name="experts"),
    ),
    "counts of other rows": (
        ValueError,
        r"experts.*\[30, 11\] do not describe 2 experts and 40 rows",
        lambda: grouped.dgrad(QDY, QWS, [30, 11], name="experts"),
    ),
    "a negative count": (ValueError, "do not describe", lambda: grouped.fprop(QX, QWS, [-1, 41])),
    "operands without groups": (
        ValueError,
        r"called with groups \(30, 10\).*quantised for None",
        lambda: grouped.wgrad(DY_T, X_T, COUNTS),
    ),
    "operands for other groups": (
        ValueError,
        r"called with groups \(20, 20\).*quantised for \(30, 10\)",
        lambda: grouped.wgrad(DY_GROUPS, X_GROUPS, (20, 20)),
    ),
    "one weight for experts": (ValueError, "3 dimensions are needed", lambda: grouped.fprop(QX, QW, COUNTS)),
    "no transposed copy of the experts": (
        ValueError,
        r"\(2, 80, 48\) has no transposed copy",
        lambda: grouped.dgrad(QDY, quantize_blocks(WS), COUNTS),
    ),
    "experts of a width not a multiple of 16": (
        ValueError,
        r"\(2, 72, 48\) have N = 72.*multiples of 16",
        lambda: grouped.fprop(QX, blocks(2, 72, 48), COUNTS),
    ),
    "an accumulator for fewer experts": (
        ValueError,
        r"\(1, 80, 48\).*contiguous float32 \(2, 80, 48\)",
        lambda: grouped.wgrad(DY_GROUPS, X_GROUPS, COUNTS, into=torch.zeros(1, 80, 48)),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_it_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*arguments: Any) -> None:
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(launch, "_start", launched)
    error, message, call = BAD[what]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
