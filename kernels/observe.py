"""Watching matrix products at the product itself, as the operands reach it.

`with observing(recorder):` makes every fprop, dgrad and wgrad in `kernels.gemm` and `kernels.grouped` report to the
recorder. Observers live in a module-level stack and not in a context variable: backward may run in another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.quantize import Quantized

Operand = Tensor | Quantized


class ProductObserver(Protocol):
    def product(self, name: str, kind: str, a: Operand, b: Operand, out: Tensor) -> None:
        """One product. kind: "fprop" (a=x, b=w), "dgrad" (a=dy, b=w) or "wgrad" (a=dy, b=x; FP8: transposed)."""
        ...


_observers: list[ProductObserver] = []


@contextmanager
def observing(recorder: ProductObserver) -> Iterator[ProductObserver]:
    """Report every product to `recorder` until the block ends; may be nested."""
    _observers.append(recorder)
    try:
        yield recorder
    finally:
        position = next(i for i in reversed(range(len(_observers))) if _observers[i] is recorder)
        del _observers[position]


def report(name: str, kind: str, a: Operand, b: Operand, out: Tensor) -> None:
    """Called by every product once its output exists."""
    for observer in _observers:
        observer.product(name, kind, a, b, out)


@dataclass(frozen=True)
class OperandRecord:
    """What reached the product. The scale fields are None for a tensor that is not quantised.

    tile: as shapes tell it ("1x128", "128x128", "other"). power_of_two: every scale is one. distinct_scales and
    distinct_codes: how many different values occur. codes_valid: the bytes are FP8 numbers (dtype E4M3, no NaN code).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    scale_dtype: torch.dtype | None = None
    scale_shape: tuple[int, ...] | None = None
    tile: str | None = None
    power_of_two: bool | None = None
    distinct_scales: int | None = None
    distinct_codes: int | None = None
    codes_valid: bool | None = None

    @classmethod
    def of(cls, operand: Operand) -> OperandRecord:
        """Read everything from the operand itself, never from configuration."""
        if isinstance(operand, Tensor):
            return cls(operand.dtype, tuple(operand.shape))
        codes = operand.data.contiguous().view(torch.uint8).unique()
        mantissa, _ = torch.frexp(operand.scale)
        return cls(
            dtype=operand.data.dtype,
            shape=tuple(operand.shape),
            scale_dtype=operand.scale.dtype,
            scale_shape=tuple(operand.scale.shape),
            tile=operand.tile,
            power_of_two=bool((mantissa == 0.5).all()),
            distinct_scales=operand.scale.unique().numel(),
            distinct_codes=codes.numel(),
            codes_valid=operand.data.dtype == torch.float8_e4m3fn and not bool(((codes & 0x7F) == 0x7F).any()),
        )


@dataclass(frozen=True)
class ProductRecord:
    """One product: its name (of the linear layer), its kind, both operands as they reached it, and the result."""

    name: str
    kind: str
    a: OperandRecord
    b: OperandRecord
    out_dtype: torch.dtype
    out_shape: tuple[int, ...]


class AuditRecorder:
    """Keeps a `ProductRecord` of every product, in order."""

    def __init__(self) -> None:
        self.records: list[ProductRecord] = []

    def product(self, name: str, kind: str, a: Operand, b: Operand, out: Tensor) -> None:
        self.records.append(
            ProductRecord(name, kind, OperandRecord.of(a), OperandRecord.of(b), out.dtype, tuple(out.shape))
        )

    def select(self, name: str, kind: str | None = None) -> list[ProductRecord]:
        """Records of one layer, of one kind when given."""
        return [r for r in self.records if r.name == name and kind in (None, r.kind)]
