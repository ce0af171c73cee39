"""Differentiable operations of the segments: dX at once, dW handed to the pipeline's store.

The recipe (V3 section 3.3) in one place: with FP8 on, a linear's three products take E4M3 operands: activations and
gradients in 1x128 tiles, weights in 128x128 blocks. What is kept for the weight gradient is said by an `Input`: FP8
tiles as they were used, E5M6 (attention output), or a cell that computes the activation again (RMSNorm, SwiGLU).

Shape letters: N tokens, K width in, O width out, X expanded rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from kernels import e5m6, gemm, grouped, norm, swiglu
from kernels.cross_entropy import cross_entropy_and_gradient
from kernels.quantize import (
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    requantize_columns,
)
from model.recompute import Cell
from parallel.pipeline.store import WeightGradStore

Operand = torch.Tensor | Quantized
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


class Box:
    """Where a gradient in FP8 waits for the linear whose output it belongs to (autograd carries an empty stand-in).
    `exact`: the gradient before its rounding, during an audit only."""

    def __init__(self) -> None:
        self._value: tuple[Quantized, torch.Tensor | None] | None = None

    def put(self, value: Quantized, exact: torch.Tensor | None) -> None:
        self._value = value, exact

    def take(self) -> tuple[Quantized | None, torch.Tensor | None]:
        value, self._value = self._value, None
        return value or (None, None)


def stand_in(rows: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of their shape and device and no storage, for autograd where FP8 rows travel beside it."""
    return torch.zeros((), dtype=dtype, device=rows.device).expand(rows.rows, rows.columns)


def _remembered(q: Quantized) -> Quantized:
    """A CPU multiplies in FP32: there the widened numbers serve all products that `q` enters."""
    return q.remember() if q.device.type == "cpu" else q


class Ops:
    """The arithmetic of one rank: precision, store, and weights quantised once per step.

    recompute: what RMSNorm, SwiGLU and MLA's up-projections give is not kept for the backward but computed again (V3
    section 3.2.3); False keeps it: less time, more memory.

    check: when set, called as check(name, kind, result, unquantised) for every FP8 product; `unquantised(f)` computes
    it from f of operands that never were in FP8. To have them, inputs are kept as they were and dispatched rows cross a
    second time in plain form: for single steps, and on all ranks at once.
    """

    def __init__(
        self, store: WeightGradStore, dtype: torch.dtype, fp8: bool, eps: float, recompute: bool = True
    ) -> None:
        self.store, self.dtype, self.fp8, self.eps, self.recompute = store, dtype, fp8, eps, recompute
        self.check: Check | None = None
        self._weights: dict[nn.Parameter, Quantized] = {}

    @property
    def auditing(self) -> bool:
        """Whether unquantised operands are to be kept for `check`."""
        return self.fp8 and self.check is not None

    def new_step(self) -> None:
        """The weights have changed: quantise them again on first use."""
        self._weights.clear()

    def weight(self, parameter: nn.Parameter) -> Operand:
        """128x128 blocks of a weight (FP8), or the weight."""
        if not self.fp8:
            return parameter.detach()
        if parameter not in self._weights:
            self._weights[parameter] = _remembered(quantize_blocks(parameter.detach()))
        return self._weights[parameter]

    # Inputs ---------------------------------------------------------------------------------------------------------

    def again(self, value: torch.Tensor, compute: Callable[[], torch.Tensor]) -> Cell[torch.Tensor]:
        """What gives `value` in the backward: `compute`, or where nothing is recomputed the value itself."""
        return Cell(compute) if self.recompute else Cell.of(value.detach())

    def recomputed(self, x: torch.Tensor, again: Callable[[], torch.Tensor], counts: list[int] | None = None) -> Input:
        """`x` itself is not kept: `again` gives it for the weight gradient."""
        if not self.fp8:
            return Input(x.detach(), again)
        # Remembered for the two down-projections of attention, which share their input.
        columns = Cell(lambda: _remembered(quantize_columns(again(), counts=counts)))
        return Input(_remembered(quantize_rows(x.detach())), columns, x.detach() if self.auditing else None)

    def dispatched(self, rows: Operand, counts: list[int], exact: torch.Tensor | None) -> Input:
        """Rows as they came over the wire: power-of-two scales, kept as they are."""
        if isinstance(rows, Quantized):
            return Input(rows, Cell(lambda: requantize_columns(rows, power_of_two=True, counts=counts)), exact)
        return Input(rows, lambda: rows)

    def attention_output(self, kept: Kept, x: torch.Tensor) -> Input:
        """Input of the output projection: power-of-two scales, kept as E5M6 (V3 section 3.3.3)."""
        if not self.fp8:
            return Input(x.detach(), kept)
        columns = Cell(lambda: quantize_columns(kept(), power_of_two=True))
        return Input(quantize_rows(x.detach(), power_of_two=True), columns, x.detach() if self.auditing else None)

    def payload(self, x: torch.Tensor) -> Operand:
        """What is dispatched: FP8 rows with power-of-two scales, or the rows."""
        return quantize_rows(x, power_of_two=True) if self.fp8 else x

    # Products -------------------------------------------------------------------------------------------------------

    def multiply(self, given: Input, weight: nn.Parameter, name: str) -> torch.Tensor:
        """[N, K] x [O, K]^T -> [N, O]."""
        w = self.weight(weight)
        y = gemm.fprop(given.rows, w, self.dtype, name=name)
        if self.check and given.exact is not None:
            exact = given.exact
            self.check(name, "fprop", y, lambda f: gemm.fprop(f(exact), f(weight.detach()), torch.float32))
        return y

    def multiply_backward(self, dy: torch.Tensor, given: Input, weight: nn.Parameter, name: str) -> torch.Tensor:
        """dX of `multiply`; its dW goes to the store."""
        dy = dy.detach().contiguous()
        columns, exact = given.columns, given.exact
        if not self.fp8:
            self.store.put(weight, lambda: gemm.wgrad(dy, columns(), name=name))
            return gemm.dgrad(dy, weight.detach(), self.dtype, name=name)
        wide = dy.to(torch.float32)
        dy_columns = quantize_columns(wide)
        dx = gemm.dgrad(quantize_rows(wide), self.weight(weight), self.dtype, name=name)
        if self.check is None or exact is None:
            self.store.put(weight, lambda: gemm.wgrad(dy_columns, columns(), name=name))
            return dx
        check = self.check
        check(name, "dgrad", dx, lambda f: gemm.dgrad(f(dy), f(weight.detach()), torch.float32))

        def grad() -> torch.Tensor:
            dw = gemm.wgrad(dy_columns, columns(), name=name)
            check(name, "wgrad", dw, lambda f: gemm.wgrad(f(dy), f(exact)))
            return dw

        self.store.put(weight, grad)
        return dx

    # Autograd entry points ------------------------------------------------------------------------------------------

    def linear(self, x: torch.Tensor, weight: nn.Parameter, given: Input, name: str) -> torch.Tensor:
        """A linear of the FP8 set. `x` is there for autograd; the product takes `given.rows`."""
        return _Linear.apply(x, weight, given, self, name)

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
        y = _RMSNorm.apply(x, gain, self)
        return y, self.again(y, lambda: norm.rmsnorm(kept, gain.detach(), self.eps))

    def swiglu(
        self, gate_up: torch.Tensor, row_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """silu(gate) * up (times the router weight); its input is cached in FP8 (the paper
        says so of MoE; here dense layers do the same), its value computed again."""
        kept = self.keep(gate_up.detach())
        w = None if row_weight is None else row_weight.detach()
        hidden = _SwiGLU.apply(gate_up, row_weight, kept)
        return hidden, self.again(hidden, lambda: swiglu.swiglu(kept(), w))

    def keep(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Cache for the backward: FP8 tiles, or the tensor itself."""
        if not self.fp8:
            return lambda: x
        tiles, dtype = quantize_rows(x), x.dtype
        return lambda: dequantize(tiles, dtype)

    def keep_attention_output(self, x: torch.Tensor) -> Kept:
        """Cache of the attention output, for attention's backward and the output projection's weight gradient."""
        return Kept(x, self.fp8)


class Kept:
    """The attention output between forward and backward: E5M6 with power-of-two scales, or as it is."""

    def __init__(self, x: torch.Tensor, fp8: bool) -> None:
        self._dtype = x.dtype
        self._value = e5m6.encode(x) if fp8 else x

    def __call__(self) -> torch.Tensor:
        if isinstance(self._value, torch.Tensor):
            return self._value
        return e5m6.decode(self._value, self._dtype)


# In place of rows that the forward product has used: they must not live on until the backward.
USED = torch.empty(0)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, given: Input, ops: Ops, name: str) -> torch.Tensor:
        ctx.kept = weight, replace(given, rows=USED), ops, name
        return ops.multiply(given, weight, name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, given, ops, name = ctx.kept
        return ops.multiply_backward(grads[0], given, weight, name), None, None, None, None


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
        y = grouped.fprop(given.rows, ops.weight(weight), counts, ops.dtype, name=name)
        if ops.check and exact is not None:
            ops.check(name, "fprop", y, lambda f: grouped.fprop(f(exact), f(weight.detach()), counts, torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, columns, exact, counts, ops, name, box = ctx.kept
        arrived, exact_dy = box.take() if box is not None else (None, None)
        dy = grads[0].detach()
        nothing = (None,) * 6
        if not ops.fp8:
            dy = dy.contiguous()
            ops.store.put(weight, lambda: grouped.wgrad(dy, columns(), counts, name=name))
            return grouped.dgrad(dy, weight.detach(), counts, ops.dtype, name=name), *nothing
        if arrived is not None:
            rows, dy_columns = arrived, requantize_columns(arrived, power_of_two=True, counts=counts)
        else:
            rows, dy_columns, exact_dy = quantize_rows(dy), quantize_columns(dy, counts=counts), dy
        dx = grouped.dgrad(rows, ops.weight(weight), counts, ops.dtype, name=name)
        check = ops.check
        if check is None or exact is None or exact_dy is None:
            ops.store.put(weight, lambda: grouped.wgrad(dy_columns, columns(), counts, name=name))
            return dx, *nothing
        check(name, "dgrad", dx, lambda f: grouped.dgrad(f(exact_dy), f(weight.detach()), counts, torch.float32))

        def grad() -> torch.Tensor:
            dw = grouped.wgrad(dy_columns, columns(), counts, name=name)
            check(name, "wgrad", dw, lambda f: grouped.wgrad(f(exact_dy), f(exact), counts))
            return dw

        ops.store.put(weight, grad)
        return dx, *nothing


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: nn.Parameter, ops: Ops) -> torch.Tensor:
        ctx.kept = x.detach(), gain, ops
        return norm.rmsnorm(x.detach(), gain.detach(), ops.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain, ops = ctx.kept
        dx, dgain = norm.rmsnorm_backward(grads[0], x, gain.detach(), ops.eps)
        ops.store.put(gain, lambda: dgain)
        return dx, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, row_weight: torch.Tensor | None, kept: Any) -> torch.Tensor:
        ctx.kept = kept, None if row_weight is None else row_weight.detach()
        return swiglu.swiglu(gate_up.detach(), ctx.kept[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, row_weight = ctx.kept
        dgate_up, drow_weight = swiglu.swiglu_backward(grads[0], kept(), row_weight)
        return dgate_up, drow_weight, None


class Embedding(Function):
    """table[tokens]; the table's gradient is handed to the store."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, table: nn.Parameter, tokens_N: torch.Tensor, ops: Ops) -> torch.Tensor:
        ctx.kept = table, tokens_N, ops
        return table.detach()[tokens_N]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        table, tokens_N, ops = ctx.kept
        dy = grads[0].detach()

        def grad() -> torch.Tensor:
            high = torch.promote_types(dy.dtype, torch.float32)
            return dy.new_zeros(table.shape, dtype=high).index_add_(0, tokens_N, dy.to(high))

        ops.store.put(table, grad)
        return None, None, None, None


class HeadLoss(Function):
    """Output head and cross-entropy: (n [N, K], head [V, K]) -> scalar `scale * sum of token losses`.

    The gradient of the logits is made in the forward and replaces them (DeepSeek LLM section 2.4). `losses` receives
    the per-token losses [N] (0 where the label is IGNORE).
    """

    @staticmethod
    def forward(
        ctx: Any,
        n: torch.Tensor,
        head: nn.Parameter,
        labels_N: torch.Tensor,
        scale: float,
        again: Callable[[], torch.Tensor],
        ops: Ops,
        name: str,
        losses: list[torch.Tensor],
    ) -> torch.Tensor:
        high = torch.promote_types(n.dtype, torch.float32)
        logits = gemm.fprop(n.detach(), head.detach(), high, name=name)
        token_losses, gradient = cross_entropy_and_gradient(logits, labels_N, scale, in_place=True)
        dlogits = gradient.to(n.dtype)
        losses.append(token_losses)
        ctx.kept = dlogits, head, again, ops, name
        return token_losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The gradient of the scalar is 1: its scale is already in dlogits.
        dlogits, head, again, ops, name = ctx.kept
        ops.store.put(head, lambda: gemm.wgrad(dlogits, again(), name=name))
        dn = gemm.dgrad(dlogits, head.detach(), ops.dtype, name=name)
        return (dn,) + (None,) * 7
