"""Differentiable operations of the segments: dX at once, dW handed to the pipeline's store.

The recipe (V3 section 3.3) in one place: with FP8 on, a linear's three products take E4M3 operands: activations and
gradients in 1x128 tiles, weights in 128x128 blocks. What is kept for the weight gradient is said by an `Input`: FP8
tiles as they were used, E5M6 (attention output), or a cell that computes the activation again (RMSNorm, SwiGLU).

Shape letters: N tokens, K width in, O width out, X expanded rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from kernels import gemm, grouped
from kernels.backends import Kernels, torch_kernels
from kernels.observe import Operand
from kernels.quantize import Quantized
from model.operands import USED, Arrived, Box, Check, Input, Kept, stand_in
from model.recompute import Cell
from parallel.pipeline.store import WeightGradStore


def _remembered(q: Quantized) -> Quantized:
    """A CPU multiplies in FP32: there the widened numbers serve all products that `q` enters."""
    return q.remember() if q.device.type == "cpu" else q


class Ops:
    """The arithmetic of one rank: precision, store, back ends, and weights quantised once per step.

    kernels: back ends of the FP8 recipe's ops, the definitions if None.

    recompute: what RMSNorm, SwiGLU and MLA's up-projections give is not kept for the backward but computed again (V3
    section 3.2.3); False keeps it: less time, more memory.

    check: when set, called as check(name, kind, result, unquantised) for every FP8 product; `unquantised(f)` computes
    it from f of operands that never were in FP8. To have them, inputs are kept as they were and dispatched rows cross a
    second time in plain form: for single steps, and on all ranks at once.
    """

    def __init__(
        self,
        store: WeightGradStore,
        dtype: torch.dtype,
        fp8: bool,
        eps: float,
        recompute: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        self.store, self.dtype, self.fp8, self.eps, self.recompute = store, dtype, fp8, eps, recompute
        self.kernels = kernels or torch_kernels()
        self.check: Check | None = None
        self._weights: dict[nn.Parameter, Quantized] = {}

    @property
    def auditing(self) -> bool:
        """Whether unquantised operands are to be kept for `check`."""
        return self.fp8 and self.check is not None

    @property
    def _fused(self) -> bool:
        """Whether norm and SwiGLU are quantised as they are computed, their unquantised results never kept."""
        return self.fp8 and self.recompute

    def new_step(self) -> None:
        """The weights have changed: quantise them again on first use."""
        self._weights.clear()

    def weight(self, parameter: nn.Parameter) -> Operand:
        """128x128 blocks of a weight (FP8), or the weight."""
        if not self.fp8:
            return parameter.detach()
        if parameter not in self._weights:
            self._weights[parameter] = _remembered(self.kernels.quantize.quantize_blocks(parameter.detach()))
        return self._weights[parameter]

    # Inputs ---------------------------------------------------------------------------------------------------------

    def again(self, value: torch.Tensor, compute: Callable[[], torch.Tensor]) -> Cell[torch.Tensor]:
        """What gives `value` in the backward: `compute`, or where nothing is recomputed the value itself."""
        return Cell(compute) if self.recompute else Cell.of(value.detach())

    def recomputed(self, x: torch.Tensor, again: Callable[[], torch.Tensor], counts: list[int] | None = None) -> Input:
        """`x` itself is not kept: `again` gives it for the weight gradient."""
        if not self.fp8:
            return Input(x.detach(), again)
        quantize = self.kernels.quantize
        columns = Cell(lambda: _remembered(quantize.quantize_columns(again(), counts=counts)))
        rows = _remembered(quantize.quantize_rows(x.detach()))
        return Input(rows, columns, x.detach() if self.auditing else None)

    def norm_input(self, x: torch.Tensor, gain: torch.Tensor) -> Input:
        """RMSNorm of x, outside autograd, as a linear's input."""
        kernel, eps = self.kernels.norm, self.eps
        if not self._fused:
            y = kernel.rmsnorm(x, gain, eps)
            return self.recomputed(y, self.again(y, lambda: kernel.rmsnorm(x, gain, eps)))
        value, rows = kernel.rmsnorm_rows(x, gain, eps)
        columns = Cell(lambda: _remembered(kernel.rmsnorm_columns(x, gain, eps)))
        return Input(_remembered(rows), columns, value if self.auditing else None)

    def dispatched(self, rows: Operand, counts: list[int], exact: torch.Tensor | None) -> Input:
        """Rows as they came over the wire: power-of-two scales, kept as they are."""
        if not isinstance(rows, Quantized):
            return Input(rows, lambda: rows)
        requantize = self.kernels.quantize.requantize_columns
        return Input(rows, Cell(lambda: requantize(rows, power_of_two=True, counts=counts)), exact)

    def attention_output(self, kept: Kept, x: torch.Tensor) -> Input:
        """Input of the output projection: power-of-two scales, kept as E5M6 (V3 section 3.3.3)."""
        if not self.fp8:
            return Input(x.detach(), kept)
        rows = self.kernels.quantize.quantize_rows(x.detach(), power_of_two=True)
        return Input(rows, Cell(kept.columns), x.detach() if self.auditing else None)

    def payload(self, x: torch.Tensor) -> Operand:
        """What is dispatched: FP8 rows with power-of-two scales, or the rows."""
        return self.kernels.quantize.quantize_rows(x, power_of_two=True) if self.fp8 else x

    # Products -------------------------------------------------------------------------------------------------------

    def multiply(self, given: Input, weight: nn.Parameter, name: str) -> torch.Tensor:
        """[N, K] x [O, K]^T -> [N, O]."""
        w = self.weight(weight)
        y = self.kernels.gemm.fprop(given.rows, w, self.dtype, name=name)
        if self.check and given.exact is not None:
            exact = given.exact
            self.check(name, "fprop", y, lambda f: gemm.fprop(f(exact), f(weight.detach()), torch.float32))
        return y

    def multiply_backward(
        self, dy: torch.Tensor, given: Input, weight: nn.Parameter, name: str, box: Box | None = None
    ) -> torch.Tensor:
        """dX of `multiply`; its dW goes to the store. `box` may hold dy in FP8."""
        product, columns = self.kernels.gemm, given.columns
        if not self.fp8:
            dy = dy.detach().contiguous()
            self.store.put(weight, lambda: product.wgrad(dy, columns(), name=name))
            return product.dgrad(dy, weight.detach(), self.dtype, name=name)
        arrived = self._arrived(dy, box, None)
        dy_columns, exact_dy, exact, check = arrived.columns, arrived.exact, given.exact, self.check
        assert dy_columns is not None
        dx = product.dgrad(arrived.rows, self.weight(weight), self.dtype, name=name)
        if check is None or exact is None or exact_dy is None:
            self.store.put(weight, lambda: product.wgrad(dy_columns, columns(), name=name))
            return dx
        check(name, "dgrad", dx, lambda f: gemm.dgrad(f(exact_dy), f(weight.detach()), torch.float32))

        def grad() -> torch.Tensor:
            dw = product.wgrad(dy_columns, columns(), name=name)
            check(name, "wgrad", dw, lambda f: gemm.wgrad(f(exact_dy), f(exact)))
            return dw

        self.store.put(weight, grad)
        return dx

    def _arrived(self, dy: torch.Tensor, box: Box | None, counts: list[int] | None) -> Arrived:
        """A linear's output gradient as its two products take it: what the box holds, or dy quantised."""
        arrived = box.take() if box is not None else None
        if arrived is None:
            dy = dy.detach().contiguous()
            rows, columns = self.kernels.quantize.quantize_both(dy, counts=counts)
            return Arrived(rows, columns, dy if self.auditing else None)
        if arrived.columns is not None:
            return arrived
        columns = self.kernels.quantize.requantize_columns(arrived.rows, power_of_two=True, counts=counts)
        return replace(arrived, columns=columns)

    # Autograd entry points ------------------------------------------------------------------------------------------

    def linear(
        self, x: torch.Tensor, weight: nn.Parameter, given: Input, name: str, box: Box | None = None
    ) -> torch.Tensor:
        """A linear of the FP8 set. `x` is there for autograd; the product takes `given.rows`. `box` may hold the
        output's gradient in FP8."""
        return _Linear.apply(x, weight, given, self, name, box)

    def high_linear(
        self, x: torch.Tensor, weight: nn.Parameter, again: Callable[[], torch.Tensor], name: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """A linear outside the FP8 set (router, MTP projection), all three products and the result in `dtype`."""
        return _HighLinear.apply(x, weight, again, self, name, dtype)

    def grouped_linear(
        self,
        x: torch.Tensor,
        weight: nn.Parameter,
        given: Input,
        counts: list[int],
        name: str,
        box: Box | None = None,
    ) -> torch.Tensor:
        """Rows sorted by local expert: y[e] = x[e] w[e]^T, weight [E, O, K]. `box` may hold the output's gradient in
        FP8."""
        return _GroupedLinear.apply(x, weight, given, counts, self, name, box)

    def rmsnorm(self, x: torch.Tensor, gain: nn.Parameter) -> tuple[torch.Tensor, Cell[torch.Tensor]]:
        """(normed x, cell that gives it again)."""
        kept = x.detach()
        y = _RMSNorm.apply(x, gain, self, None)
        return y, self.again(y, lambda: self.kernels.norm.rmsnorm(kept, gain.detach(), self.eps))

    def rmsnorm_linear(
        self, x: torch.Tensor, gain: nn.Parameter, others: bool
    ) -> tuple[torch.Tensor, Cell[torch.Tensor], Input]:
        """(normed x, cell that gives it again, the same as input of linears of the FP8 set).

        others: somebody else takes the normed x too. Without, and with FP8, autograd carries an empty stand-in.
        """
        if not self._fused:
            y, again = self.rmsnorm(x, gain)
            return y, again, self.recomputed(y, again)
        kernel, kept, detached, eps = self.kernels.norm, x.detach(), gain.detach(), self.eps
        value, rows = kernel.rmsnorm_rows(kept, detached, eps)
        y = _RMSNorm.apply(x, gain, self, [value if others else stand_in(rows, x.dtype)])
        again = Cell(lambda: kernel.rmsnorm(kept, detached, eps))
        if others:
            columns = Cell(lambda: _remembered(self.kernels.quantize.quantize_columns(again())))
        else:
            columns = Cell(lambda: _remembered(kernel.rmsnorm_columns(kept, detached, eps)))
        return y, again, Input(_remembered(rows), columns, value if self.auditing else None)

    def swiglu(
        self, gate_up: torch.Tensor, row_weight: torch.Tensor | None, counts: list[int] | None, box: Box
    ) -> tuple[torch.Tensor, Input]:
        """silu(gate) * up (times the router weight) as the down-projection's input: for autograd, and for its products.

        With FP8, gate_up is cached in FP8 tiles (the paper says so of MoE; here dense layers do the same) and the
        result computed again from them; `box` then takes the gradient of gate_up to the linear that made it.
        """
        kernel, w = self.kernels.swiglu, None if row_weight is None else row_weight.detach()
        if self._fused:
            dtype = gate_up.dtype
            kept, rows = kernel.swiglu_tiles(gate_up.detach(), w)
            box.promise()
            hidden = _FusedSwiGLU.apply(gate_up, row_weight, kept, self, counts, box)
            columns = Cell(lambda: _remembered(kernel.swiglu_columns(kept, w, counts, dtype)))
            return hidden, Input(
                _remembered(rows), columns, kernel.swiglu(gate_up.detach(), w) if self.auditing else None
            )
        keep = self.keep(gate_up.detach())
        hidden = _SwiGLU.apply(gate_up, row_weight, keep, self)
        again = self.again(hidden, lambda: kernel.swiglu(keep(), w))
        return hidden, self.recomputed(hidden, again, counts)

    def keep(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Cache for the backward: FP8 tiles, or the tensor itself."""
        if not self.fp8:
            return lambda: x
        quantize, dtype = self.kernels.quantize, x.dtype
        tiles = quantize.quantize_rows(x)
        return lambda: quantize.dequantize(tiles, dtype)

    def keep_attention_output(self, x: torch.Tensor) -> Kept:
        """Cache of the attention output, for attention's backward and the output projection's weight gradient."""
        return Kept(x, self.kernels if self.fp8 else None)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, given: Input, ops: Ops, name: str, box: Box | None
    ) -> torch.Tensor:
        ctx.kept = weight, replace(given, rows=USED), ops, name, box
        return ops.multiply(given, weight, name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, given, ops, name, box = ctx.kept
        return ops.multiply_backward(grads[0], given, weight, name, box), None, None, None, None, None


class _HighLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, again: Any, ops: Ops, name: str, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.kept = weight, again, ops, name, x.dtype
        return gemm.fprop(x.detach().to(dtype), weight.detach().to(dtype), name=name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, again, ops, name, dtype = ctx.kept
        dy = grads[0].detach().contiguous()
        ops.store.put(weight, lambda: gemm.wgrad(dy, again().to(dy.dtype), name=name))
        return gemm.dgrad(dy, weight.detach().to(dy.dtype), dtype, name=name), None, None, None, None, None


class _GroupedLinear(Function):
    """An expert without rows still reports a (zero) gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        given: Input,
        counts: list[int],
        ops: Ops,
        name: str,
        box: Box | None,
    ) -> torch.Tensor:
        exact = given.exact
        ctx.kept = weight, given.columns, exact, counts, ops, name, box
        y = ops.kernels.grouped_gemm.fprop(given.rows, ops.weight(weight), counts, ops.dtype, name=name)
        if ops.check and exact is not None:
            ops.check(name, "fprop", y, lambda f: grouped.fprop(f(exact), f(weight.detach()), counts, torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, columns, exact, counts, ops, name, box = ctx.kept
        product, dy, nothing = ops.kernels.grouped_gemm, grads[0].detach(), (None,) * 6
        if not ops.fp8:
            dy = dy.contiguous()
            ops.store.put(weight, lambda: product.wgrad(dy, columns(), counts, name=name))
            return product.dgrad(dy, weight.detach(), counts, ops.dtype, name=name), *nothing
        arrived = ops._arrived(dy, box, counts)
        dy_columns, exact_dy, check = arrived.columns, arrived.exact, ops.check
        dx = product.dgrad(arrived.rows, ops.weight(weight), counts, ops.dtype, name=name)
        if check is None or exact is None or exact_dy is None:
            ops.store.put(weight, lambda: product.wgrad(dy_columns, columns(), counts, name=name))
            return dx, *nothing
        check(name, "dgrad", dx, lambda f: grouped.dgrad(f(exact_dy), f(weight.detach()), counts, torch.float32))

        def grad() -> torch.Tensor:
            dw = product.wgrad(dy_columns, columns(), counts, name=name)
            check(name, "wgrad", dw, lambda f: grouped.wgrad(f(exact_dy), f(exact), counts))
            return dw

        ops.store.put(weight, grad)
        return dx, *nothing


class _RMSNorm(Function):
    """`made`: the result, where it exists already."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: nn.Parameter, ops: Ops, made: list[torch.Tensor] | None
    ) -> torch.Tensor:
        ctx.kept = x.detach(), gain, ops
        return made.pop() if made else ops.kernels.norm.rmsnorm(x.detach(), gain.detach(), ops.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain, ops = ctx.kept
        dx, dgain = ops.kernels.norm.rmsnorm_backward(grads[0], x, gain.detach(), ops.eps)
        ops.store.put(gain, lambda: dgain)
        return dx, None, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, row_weight: torch.Tensor | None, keep: Any, ops: Ops) -> torch.Tensor:
        ctx.kept = keep, None if row_weight is None else row_weight.detach(), ops
        return ops.kernels.swiglu.swiglu(gate_up.detach(), ctx.kept[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        keep, row_weight, ops = ctx.kept
        dgate_up, drow_weight = ops.kernels.swiglu.swiglu_backward(grads[0], keep(), row_weight)
        return dgate_up, drow_weight, None, None


class _FusedSwiGLU(Function):
    """The values are in FP8 beside it: the backward reads the FP8 cache and leaves its result in the box."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: torch.Tensor,
        row_weight: torch.Tensor | None,
        kept: Quantized,
        ops: Ops,
        counts: list[int] | None,
        box: Box,
    ) -> torch.Tensor:
        ctx.kept = kept, None if row_weight is None else row_weight.detach(), ops, counts, box
        return gate_up.new_zeros(()).expand(gate_up.shape[0], gate_up.shape[1] // 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, row_weight, ops, counts, box = ctx.kept
        dy = grads[0]
        rows, columns, drow_weight = ops.kernels.swiglu.swiglu_backward_tiles(dy, kept, row_weight, counts)
        exact = None
        if ops.auditing:
            exact, _ = ops.kernels.swiglu.swiglu_backward(
                dy, ops.kernels.quantize.dequantize(kept, dy.dtype), row_weight
            )
        box.put(Arrived(rows, columns, exact))
        return stand_in(rows, dy.dtype), drow_weight, None, None, None, None
