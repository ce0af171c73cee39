"""Grouped products equal the dense ones expert by expert; groups, padding and empty experts."""

from __future__ import annotations

import pytest
import torch

from kernels import gemm, grouped
from kernels.quantize import Quantized, quantize_blocks, quantize_columns, quantize_rows, requantize_columns
from tests.kernels.oracles import calc_diff

COUNTS = [70, 0, 130, 1, 128, 55, 0]
N, K = 80, 144
LIMIT = 1e-12  # the same FP32 product over other row counts may sum in another order


def operands(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(len(counts))
    rows = sum(counts)
    return tuple(torch.randn(shape).to(dtype) for shape in ((rows, K), (len(counts), N, K), (rows, N)))  # type: ignore[return-value]


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 3], [128]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain(counts: list[int], dtype: torch.dtype) -> None:
    x, w, dy = operands(counts, dtype)
    y, dx, dw = grouped.fprop(x, w, counts), grouped.dgrad(dy, w, counts), grouped.wgrad(dy, x, counts)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.promote_types(dtype, torch.float32))
    assert dw.shape == w.shape
    limit = 1e-5 if dtype == torch.bfloat16 else LIMIT
    for expert, (xs, dys) in enumerate(zip(x.split(counts), dy.split(counts), strict=True)):
        rows = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
        if not counts[expert]:
            assert not dw[expert].any()
            continue
        assert calc_diff(y[rows], xs.double() @ w[expert].double().t()) < limit
        assert calc_diff(dx[rows], dys.double() @ w[expert].double()) < limit
        assert calc_diff(dw[expert], dys.double().t() @ xs.double()) < LIMIT


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 3], [128]])
def test_fp8_equals_each_expert_alone(counts: list[int]) -> None:
    x, w, dy = operands(counts, torch.bfloat16)
    qx, qw, qdy = quantize_rows(x, True), quantize_blocks(w), quantize_rows(dy)
    y = grouped.fprop(qx, qw, counts, torch.float32)
    dx = grouped.dgrad(qdy, qw, counts, torch.float32)
    columns = quantize_columns(dy, counts=counts), requantize_columns(qx, True, counts)
    dw = grouped.wgrad(*columns, counts)
    assert dw.dtype == torch.float32
    kept = qw.remember()
    for _ in range(2):
        assert torch.equal(grouped.fprop(qx, kept, counts, torch.float32), y)
        assert torch.equal(grouped.dgrad(qdy, kept, counts, torch.float32), dx)
    for expert, count in enumerate(counts):
        rows = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
        if not count:
            assert not dw[expert].any()
            continue
        weight = Quantized(qw.data[expert], qw.scale[expert])
        mine = qx.index_rows(rows)
        assert calc_diff(y[rows], gemm.fprop(mine, weight, torch.float32)) < LIMIT
        assert calc_diff(dx[rows], gemm.dgrad(qdy.index_rows(rows), weight, torch.float32)) < LIMIT
        alone = gemm.wgrad(quantize_columns(dy[rows]), requantize_columns(mine, True))
        assert calc_diff(dw[expert], alone) < LIMIT


def test_no_rows_at_all() -> None:
    counts = [0, 0]
    x, w, dy = operands(counts, torch.bfloat16)
    assert grouped.fprop(quantize_rows(x), quantize_blocks(w), counts).shape == (0, N)
    dw = grouped.wgrad(quantize_columns(dy, counts=counts), quantize_columns(x, counts=counts), counts)
    assert dw.shape == (2, N, K) and not dw.any()
    assert not grouped.wgrad(dy, x, counts).any()


def test_a_group_boundary_off_by_one_is_seen() -> None:
    x, w, dy = operands(COUNTS, torch.float32)
    moved = [71, 0, 129, 1, 128, 55, 0]
    for right, wrong in (
        (grouped.fprop(x, w, COUNTS), grouped.fprop(x, w, moved)),
        (grouped.wgrad(dy, x, COUNTS), grouped.wgrad(dy, x, moved)),
    ):
        assert calc_diff(wrong, right) > 1e-6


def test_wgrad_adds_into_an_accumulator() -> None:
    x, w, dy = operands(COUNTS, torch.float32)
    total = torch.ones_like(w)
    assert grouped.wgrad(dy, x, COUNTS, into=total) is total
    assert torch.equal(total, 1.0 + grouped.wgrad(dy, x, COUNTS))


def test_bad_counts_are_refused() -> None:
    x, w, dy = operands(COUNTS, torch.bfloat16)
    for message, call in (
        ("7 experts and 384 rows", lambda: grouped.fprop(x, w, [384])),
        ("7 experts and 384 rows", lambda: grouped.dgrad(dy, w, [1, *COUNTS[1:]])),
        (r"\[385, -1\]", lambda: grouped.wgrad(dy, x, [385, -1])),
        ("quantised for", lambda: grouped.wgrad(quantize_columns(dy), quantize_columns(x), COUNTS)),
        ("differ in K", lambda: grouped.fprop(dy, w, COUNTS)),
        ("differ in N", lambda: grouped.dgrad(x, w, COUNTS)),
        ("3 dimensions", lambda: grouped.fprop(x, w[0], COUNTS)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
