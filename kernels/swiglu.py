"""SwiGLU with the router's weight: h = silu(gate) * up * weight (V3 section 2.1.2), in FP32 at least, rounded once.

Shapes: M rows, F hidden features; gate_up [M, 2F] holds gate in its first F columns, up in the rest; row_weight [M].
The weight multiplies here, before the down-projection, so that combining experts is a plain sum. Backward recomputes
from gate_up, which is all that is kept: as it is, or in FP8 (V3 section 3.3.3), where the forward takes the exact
numbers and everything in the backward those of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantize import Quantized, dequantize, quantize_columns, quantize_rows

# Elements per piece of rows: a piece and its temporaries stay in the cache.
PIECE = 1 << 19


def swiglu(gate_up: Tensor, row_weight_M: Tensor | None = None) -> Tensor:
    """[M, 2F] -> [M, F] in gate_up's dtype."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = wide.chunk(2, -1)
    hidden = F.silu(gate).mul_(up)
    if row_weight_M is not None:
        hidden.mul_(row_weight_M.to(wide.dtype).unsqueeze(-1))
    return hidden.to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dy [M, F] -> (dgate_up [M, 2F] in gate_up's dtype, drow_weight [M] in FP32 at least, None without weights).

    With s = sigmoid(gate), for a weight of 1: dup = dy s gate, drow_weight = sum(dup up),
    dgate = dy s (1 + gate (1 - s)) up = (dy s + dup (1 - s)) up.
    """
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    dgate_up = torch.empty_like(gate_up)
    drow_weight_M = None if row_weight_M is None else dy.new_empty(dy.shape[0], dtype=compute)
    for rows in _pieces(gate_up):
        gate, up = gate_up[rows].to(compute).chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        inner = dy[rows].to(compute) * sigmoid
        out = dgate_up[rows]
        wide_out = out if out.dtype == compute else torch.empty_like(out, dtype=compute)
        dgate, dup = wide_out.chunk(2, -1)
        torch.mul(inner, gate, out=dup)
        torch.mul(inner.addcmul_(dup, sigmoid.neg_().add_(1.0)), up, out=dgate)
        if row_weight_M is not None and drow_weight_M is not None:
            drow_weight_M[rows] = torch.linalg.vecdot(dup, up)
            wide_out.mul_(row_weight_M[rows].to(compute).unsqueeze(-1))
        if wide_out is not out:
            out.copy_(wide_out)
    return dgate_up, drow_weight_M


def swiglu_tiles(gate_up: Tensor, row_weight_M: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """gate_up [M, 2F] -> (its 1x128 tiles, all that the backward needs; 1x128 tiles of the result [M, F], quantised
    after rounding to gate_up's dtype). F: any multiple of 16."""
    return quantize_rows(gate_up), quantize_rows(swiglu(gate_up, row_weight_M))


def swiglu_columns(
    kept: Quantized,
    row_weight_M: Tensor | None = None,
    counts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """The result computed again from the cache of `swiglu_tiles` and quantised along tokens: [F, M], with `counts`
    [F, P] (see `quantize_columns`). `dtype`: of the gate_up that was cached; the result is rounded to it."""
    return quantize_columns(swiglu(dequantize(kept, dtype), row_weight_M), counts=counts)


def swiglu_backward_tiles(
    dy: Tensor, kept: Quantized, row_weight_M: Tensor | None = None, counts: Sequence[int] | None = None
) -> tuple[Quantized, Quantized, Tensor | None]:
    """`swiglu_backward` at the gate_up of the cache: dy [M, F], in the dtype of the gate_up that was cached ->
    (1x128 tiles of dgate_up [M, 2F], dgate_up quantised along tokens [2F, M], with `counts` [2F, P], drow_weight [M] in
    FP32 at least, None without weights). dgate_up is rounded to dy's dtype before it is quantised."""
    dgate_up, drow_weight_M = swiglu_backward(dy, dequantize(kept, dy.dtype), row_weight_M)
    wide = dgate_up.to(torch.float32)
    return quantize_rows(wide), quantize_columns(wide, counts=counts), drow_weight_M


def _pieces(gate_up: Tensor) -> Iterator[slice]:
    count = max(1, PIECE // max(1, gate_up.shape[1])) if gate_up.device.type == "cpu" else max(1, len(gate_up))
    return (slice(first, first + count) for first in range(0, len(gate_up), count))
