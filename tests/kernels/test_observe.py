"""What an observer sees of each product, and that it sees every product."""

from __future__ import annotations

import threading

import pytest
import torch

from kernels import gemm, grouped
from kernels.observe import AuditRecorder, OperandRecord, observing
from kernels.quantize import Quantized, quantize_blocks, quantize_columns, quantize_rows


def run_all() -> None:
    x, w, dy = torch.randn(256, 144).bfloat16(), torch.randn(48, 144).bfloat16(), torch.randn(256, 48).bfloat16()
    gemm.fprop(quantize_rows(x, True), quantize_blocks(w), name="o")
    gemm.dgrad(quantize_rows(dy), quantize_blocks(w), name="o")
    gemm.wgrad(quantize_columns(dy), quantize_columns(x, True), name="o")
    gemm.fprop(x, w, name="head")
    counts, stack = [56, 200], torch.randn(2, 48, 144)
    grouped.fprop(quantize_rows(x), quantize_blocks(stack), counts, name="experts")
    grouped.dgrad(quantize_rows(dy), quantize_blocks(stack), counts, name="experts")
    grouped.wgrad(quantize_columns(dy, counts=counts), quantize_columns(x, counts=counts), counts, name="experts")


def test_records_say_what_reached_the_product() -> None:
    audit = AuditRecorder()
    with observing(audit):
        run_all()
    assert [(r.name, r.kind) for r in audit.records] == [
        ("o", "fprop"),
        ("o", "dgrad"),
        ("o", "wgrad"),
        ("head", "fprop"),
        ("experts", "fprop"),
        ("experts", "dgrad"),
        ("experts", "wgrad"),
    ]
    (fprop,) = audit.select("o", "fprop")
    assert (fprop.a.dtype, fprop.a.shape, fprop.a.tile) == (torch.float8_e4m3fn, (256, 144), "1x128")
    assert (fprop.a.scale_dtype, fprop.a.scale_shape, fprop.a.power_of_two) == (torch.float32, (256, 2), True)
    assert (fprop.b.scale_shape, fprop.b.tile, fprop.b.power_of_two) == ((1, 2), "128x128", False)
    assert fprop.a.codes_valid and 30 < (fprop.a.distinct_codes or 0) <= 254
    assert (fprop.out_dtype, fprop.out_shape) == (torch.bfloat16, (256, 48))
    (wgrad,) = audit.select("o", "wgrad")
    assert (wgrad.a.shape, wgrad.b.shape, wgrad.out_dtype) == ((48, 256), (144, 256), torch.float32)
    assert (wgrad.a.power_of_two, wgrad.b.power_of_two) == (False, True)
    (head,) = audit.select("head")
    assert head.a == OperandRecord(torch.bfloat16, (256, 144))
    assert audit.select("experts", "wgrad")[0].a.shape == (48, 384)
    assert audit.select("experts", "fprop")[0].b.scale_shape == (2, 1, 2)


def test_one_scale_per_tensor_and_foreign_codes_show() -> None:
    x = torch.randn(256, 256)
    q = quantize_rows(x)
    assert OperandRecord.of(Quantized(q.data, torch.ones(1, 1))).tile == "other"
    assert OperandRecord.of(Quantized(q.data, torch.full_like(q.scale, 0.3))).distinct_scales == 1
    assert (OperandRecord.of(q).distinct_scales or 0) > 400
    broken = q.data.view(torch.uint8).clone()
    broken[3, 3] = 0xFF
    assert OperandRecord.of(Quantized(broken.view(torch.float8_e4m3fn), q.scale)).codes_valid is False
    assert OperandRecord.of(Quantized(q.data.view(torch.float8_e5m2), q.scale)).codes_valid is False


def test_observers_nest_see_other_threads_and_leave() -> None:
    outer, inner = AuditRecorder(), AuditRecorder()
    x = torch.randn(4, 16)
    with observing(outer):
        with observing(inner):
            thread = threading.Thread(target=gemm.fprop, args=(x, x))
            thread.start()
            thread.join()
        gemm.fprop(x, x)
        with pytest.raises(RuntimeError, match="inside"), observing(inner):
            raise RuntimeError("inside")
        gemm.fprop(x, x)
    gemm.fprop(x, x)
    assert (len(outer.records), len(inner.records)) == (3, 1)
