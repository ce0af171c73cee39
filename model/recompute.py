"""Values that are not saved for the backward but computed again, once, and shared by all who need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Cell(Generic[T]):
    """Filled on first use by `compute`, then shared; dies with its last holder (V3 section 3.2.3: RMSNorm, MLA
    up-projection, SwiGLU)."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute: Callable[[], T] | None = compute
        self._value: T | None = None

    @classmethod
    def of(cls, value: T) -> Cell[T]:
        """A cell that holds `value` already."""
        cell = cls(lambda: value)
        cell._value, cell._compute = value, None
        return cell

    def __call__(self) -> T:
        if self._compute is not None:
            with torch.no_grad():
                self._value = self._compute()
            self._compute = None
        return self._value  # type: ignore[return-value]
