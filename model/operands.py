"""What a product takes and what waits for its backward: inputs, gradients in FP8, the cached attention output.

Shape letters: N tokens, K features in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backends import Kernels
from kernels.e5m6 import E5M6
from kernels.observe import Operand
from kernels.quantize import Quantized

Elementwise = Callable[[torch.Tensor], torch.Tensor]
Check = Callable[[str, str, torch.Tensor, Callable[[Elementwise], torch.Tensor]], None]


@dataclass(frozen=True)
class Input:
    """A linear's input: `rows` as its forward product takes it, `columns` what its weight gradient will use
    (transposed FP8 tiles [K, N], or the plain [N, K] rows), `exact` the rows before any rounding to FP8, during an
    audit only."""

    rows: Operand
    columns: Callable[[], Operand]
    exact: torch.Tensor | None = None


@dataclass(frozen=True)
class Arrived:
    """A gradient that comes in FP8. columns: the same quantised along tokens; None where only the tiles exist (they
    came over the wire). exact: the gradient before its rounding, during an audit only."""

    rows: Quantized
    columns: Quantized | None = None
    exact: torch.Tensor | None = None


class Box:
    """Where a gradient in FP8 waits for the linear whose output it belongs to (autograd carries an empty stand-in)."""

    def __init__(self) -> None:
        self._value: Arrived | None = None
        self._promised = False

    def promise(self) -> None:
        """What autograd will carry is a stand-in: without its gradient here it would count as zeros."""
        self._promised = True

    def put(self, value: Arrived) -> None:
        self._value = value

    def take(self) -> Arrived | None:
        value, self._value = self._value, None
        if value is None and self._promised:
            raise RuntimeError("a gradient in FP8 was promised to a linear and did not come")
        return value


def stand_in(rows: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of their shape and device and no storage, for autograd where FP8 rows travel beside it."""
    return torch.zeros((), dtype=dtype, device=rows.device).expand(rows.rows, rows.columns)


class Kept:
    """The attention output between forward and backward: E5M6 with power-of-two scales, or as it is without
    `kernels`."""

    def __init__(self, x: torch.Tensor, kernels: Kernels | None) -> None:
        self._dtype, self._kernels = x.dtype, kernels
        self._value = kernels.e5m6.encode(x) if kernels else x

    def __call__(self) -> torch.Tensor:
        if isinstance(self._value, torch.Tensor):
            return self._value
        assert self._kernels is not None
        return self._kernels.e5m6.decode(self._value, self._dtype)

    def columns(self) -> Quantized:
        """Quantised along tokens, with power-of-two scales."""
        assert self._kernels is not None and isinstance(self._value, E5M6)
        return self._kernels.e5m6.decode_columns(self._value, self._dtype)


# In place of rows that the forward product has used: they must not live on until the backward.
USED = torch.empty(0)
