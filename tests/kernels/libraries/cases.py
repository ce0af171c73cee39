"""Operands and expected results shared by the tests of the adapters; the torch modules define the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from kernels import gemm, grouped
from kernels.quantize import Quantized, quantize_blocks, quantize_columns, quantize_rows
from tests.kernels.oracles import calc_diff

# (M, N, K): whole tiles, edges of every kind, one row, rows and widths that are no multiples of 128 or of 16 (M).
SHAPES = [(128, 256, 384), (64, 128, 512), (130, 144, 576), (1, 48, 80), (37, 576, 128), (0, 64, 96)]
COUNTS = [(128, 256), (3, 0, 130, 16), (0, 0, 7), (64, 0), (0, 0)]
# Rounding of the result alone: the operands are exactly those of the torch module.
TOLERANCE = {torch.float32: 1e-11, torch.bfloat16: 1e-5, torch.float16: 1e-7}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """BF16, of rows with very different sizes: a scale taken from another row or tile is a large error."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    return (x * torch.exp2(torch.randint(-5, 3, (*shape[:-1], 1), generator=generator).float())).bfloat16()


def weight(*shape: int) -> Quantized:
    """Blocks with the transposed copy; their scales differ from block to block."""
    q = quantize_blocks(numbers(*shape, seed=1))
    return replace(q, transposed=q.data.mT.contiguous())


def close(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    if not bool(expected.any()):
        return torch.equal(found, expected)
    return calc_diff(found, expected) < TOLERANCE[found.dtype]


def along_tokens(x: Tensor, counts: Sequence[int] | None, contiguous: bool) -> Quantized:
    """Tiles along tokens: the transposed view of the torch quantiser, or contiguous as other back ends write them."""
    q = quantize_columns(x, counts=counts)
    return replace(q, data=q.data.contiguous(), scale=q.scale.contiguous()) if contiguous else q


def dense_products(
    backend: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype | None, contiguous: bool
) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """kind -> (the adapter's call, the torch module's result) of one layer."""
    m, n, k = shape
    x, dy, w = quantize_rows(numbers(m, k)), quantize_rows(numbers(m, n, seed=2)), weight(n, k)
    dy_t, x_t = (along_tokens(numbers(m, c, seed=s), None, contiguous) for c, s in ((n, 2), (k, 0)))
    kept = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    return {
        "fprop": (lambda: backend.fprop(x, w, dtype, name="a"), gemm.fprop(x, w, dtype)),
        "dgrad": (lambda: backend.dgrad(dy, w, dtype, name="a"), gemm.dgrad(dy, w, dtype)),
        "wgrad": (lambda: backend.wgrad(dy_t, x_t, name="a"), gemm.wgrad(dy_t, x_t)),
        "into": (lambda: backend.wgrad(dy_t, x_t, into=kept.clone()), gemm.wgrad(dy_t, x_t, into=kept.clone())),
        "into a view": (
            lambda: backend.wgrad(dy_t, x_t, into=kept.t().contiguous().t()),
            gemm.wgrad(dy_t, x_t, into=kept.clone()),
        ),
    }


def grouped_products(
    backend: ModuleType, counts: tuple[int, ...], n: int, k: int, dtype: torch.dtype | None, contiguous: bool
) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """The same for experts."""
    m = sum(counts)
    x, dy, w = quantize_rows(numbers(m, k)), quantize_rows(numbers(m, n, seed=2)), weight(len(counts), n, k)
    dy_t, x_t = (along_tokens(numbers(m, c, seed=s), counts, contiguous) for c, s in ((n, 2), (k, 0)))
    kept = torch.randn(len(counts), n, k, generator=torch.Generator().manual_seed(3))
    return {
        "fprop": (lambda: backend.fprop(x, w, counts, dtype, name="a"), grouped.fprop(x, w, counts, dtype)),
        "dgrad": (lambda: backend.dgrad(dy, w, counts, dtype, name="a"), grouped.dgrad(dy, w, counts, dtype)),
        "wgrad": (lambda: backend.wgrad(dy_t, x_t, counts, name="a"), grouped.wgrad(dy_t, x_t, counts)),
        "into": (
            lambda: backend.wgrad(dy_t, x_t, counts, into=kept.clone()),
            grouped.wgrad(dy_t, x_t, counts, into=kept.clone()),
        ),
        "into a view": (
            lambda: backend.wgrad(dy_t, x_t, counts, into=kept.mT.contiguous().mT),
            grouped.wgrad(dy_t, x_t, counts, into=kept.clone()),
        ),
    }


def check(products: dict[str, tuple[Callable[[], Tensor], Tensor]]) -> None:
    for kind, (call, expected) in products.items():
        assert close(call(), expected), kind
