"""The ops of the FP8 recipe that have several back ends, as protocols. A back end of an op is a module.

The torch modules (`kernels.quantize`, `kernels.gemm`, ...) define the numbers. Shapes: M tokens (rows), K and N
features, E experts, F expert width, P rows with every expert's group padded to a multiple of 128. `counts`: rows per
expert, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from kernels.e5m6 import E5M6
from kernels.observe import Operand
from kernels.quantize import Quantized

Rows = TypeVar("Rows", Tensor, Quantized)


class Quantize(Protocol):
    """Tiles of 1x128 along columns (`rows`) or along tokens (`columns`: transposed), blocks of 128x128."""

    def quantize_rows(self, x_MK: Tensor, power_of_two: bool = False) -> Quantized: ...

    def quantize_columns(
        self, x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
    ) -> Quantized: ...

    def quantize_both(
        self, x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
    ) -> tuple[Quantized, Quantized]:
        """(rows, columns) of one read."""
        ...

    def quantize_blocks(self, w_NK: Tensor) -> Quantized: ...

    def requantize_columns(
        self, q_MK: Quantized, power_of_two: bool = False, counts: Sequence[int] | None = None
    ) -> Quantized: ...

    def dequantize(self, q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor: ...


class Gemm(Protocol):
    """The three products of a linear; plain operands go to the library of the device in every back end."""

    def fprop(self, x: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor: ...

    def dgrad(self, dy: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor: ...

    def wgrad(self, dy: Operand, x: Operand, *, into: Tensor | None = None, name: str = "") -> Tensor: ...


class GroupedGemm(Protocol):
    """The same for the experts of a layer."""

    def fprop(
        self, x: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
    ) -> Tensor: ...

    def dgrad(
        self, dy: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
    ) -> Tensor: ...

    def wgrad(
        self, dy: Operand, x: Operand, counts: Sequence[int], *, into: Tensor | None = None, name: str = ""
    ) -> Tensor: ...


class Norm(Protocol):
    """RMSNorm, alone and with the quantisation of its result."""

    def rmsnorm(self, x: Tensor, gain_D: Tensor, eps: float) -> Tensor: ...

    def rmsnorm_rows(
        self, x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool = False
    ) -> tuple[Tensor, Quantized]:
        """(y in x's dtype, y's 1x128 tiles, quantised from the rounded y)."""
        ...

    def rmsnorm_columns(self, x_MD: Tensor, gain_D: Tensor, eps: float) -> Quantized:
        """y computed again and quantised along tokens; y itself is not written."""
        ...

    def rmsnorm_backward(self, dy: Tensor, x: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class SwiGLU(Protocol):
    """SwiGLU with the router's weight. The `tiles` forms cache the input in FP8 and never write the result in BF16."""

    def swiglu(self, gate_up: Tensor, row_weight_M: Tensor | None = None) -> Tensor: ...

    def swiglu_backward(
        self, dy: Tensor, gate_up: Tensor, row_weight_M: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def swiglu_tiles(self, gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Quantized, Quantized]:
        """gate_up [M, 2F] -> (its 1x128 tiles for the backward [M, 2F], tiles of the result [M, F])."""
        ...

    def swiglu_columns(
        self,
        kept: Quantized,
        row_weight_M: Tensor | None = None,
        counts: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Quantized:
        """The result computed again from the FP8 cache (rounded to `dtype`), quantised along tokens: [F, M or P]."""
        ...

    def swiglu_backward_tiles(
        self,
        dy: Tensor,
        kept: Quantized,
        row_weight_M: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Quantized, Quantized, Tensor | None]:
        """dy [M, F] -> (dgate_up's 1x128 tiles [M, 2F], the same along tokens [2F, M or P], drow_weight [M])."""
        ...


class Permute(Protocol):
    """Rows of tokens to rows of experts and back, without atomics."""

    def take_rows(self, rows: Rows, index_X: Tensor) -> Rows:
        """[V, D] tensor or FP8 rows with their scales -> [X, D]."""
        ...

    def sum_rows(self, rows_XD: Tensor, index_X: Tensor, count: int) -> Tensor:
        """[X, D] -> [count, D] in rows' dtype: row v is the sum, in FP32 at least, of the rows x with index_X[x] = v,
        in order of x."""
        ...


class Format(Protocol):
    """E5M6, the cache of the attention output."""

    def encode(self, x_MK: Tensor) -> E5M6: ...

    def decode(self, q: E5M6, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def decode_columns(self, q: E5M6, dtype: torch.dtype = torch.bfloat16) -> Quantized:
        """Decoded (rounded to `dtype`) and quantised along tokens with power-of-two scales."""
        ...
