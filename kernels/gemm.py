"""The three products of a linear layer, Y = X W^T, for plain tensors and for block-scaled FP8.

Shapes: M tokens (rows), N output features, K input features.

    fprop  Y  [M, N] = X [M, K] . W [N, K]^T          sums over K
    dgrad  dX [M, K] = dY [M, N] . W [N, K]           sums over N
    wgrad  dW [N, K] = dY [M, N]^T . X [M, K]         sums over tokens, FP32 out

Both operands of a product are plain or both are `Quantized`. Plain operands are promoted to FP32 at least (float64
stays), multiplied, and rounded once: this is what a tensor core does with BF16, and several times faster on a CPU than
a BF16 product. On a GPU its tensor cores are given BF16 and FP16 as they are, and sum in FP32.

FP8 is defined by `product_reference` (V3 section 3.3.2): exact products of codes, summed in FP32 over 128 elements,
then multiplied by both scales and added to an FP32 sum. The functions here scale first and multiply once. The
difference is FP32 rounding: two roundings of 2^-24 per term, and another order of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.observe import Operand, report
from kernels.quantize import BLOCK_TILE, ROW_TILE, Quantized, dequantize
from kernels.tiles import TILE


def fprop(x: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """x [M, K] (FP8: 1x128), w [N, K] (FP8: 128x128) -> [M, N]. out_dtype: x's dtype by default, BF16 for FP8."""
    check_pair("fprop", x, w, (ROW_TILE, BLOCK_TILE), ndim=(2, 2))
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"fprop {name}: x {tuple(x.shape)} and w {tuple(w.shape)} differ in K, their last dimension")
    out = multiply(x, w, result_dtype(x, out_dtype), transpose=True)
    report(name, "fprop", x, w, out)
    return out


def dgrad(dy: Operand, w: Operand, out_dtype: torch.dtype | None = None, *, name: str = "") -> Tensor:
    """dy [M, N] (FP8: 1x128), w [N, K] (FP8: 128x128) -> dX [M, K]. out_dtype: dy's dtype by default, BF16 for FP8."""
    check_pair("dgrad", dy, w, (ROW_TILE, BLOCK_TILE), ndim=(2, 2))
    if dy.shape[1] != w.shape[0]:
        raise ValueError(
            f"dgrad {name}: dy {tuple(dy.shape)} and w {tuple(w.shape)} differ in N (dy's columns, w's rows)"
        )
    out = multiply(dy, w, result_dtype(dy, out_dtype), transpose=False)
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, *, into: Tensor | None = None, name: str = "") -> Tensor:
    """dW [N, K] in FP32 (float64 for float64) from plain rows dy [M, N], x [M, K], or from FP8 dy^T [N, M], x^T [K, M].

    The FP8 operands are transposed because both have 1x128 tiles along tokens (`quantize_columns`). With `into` the
    product is added to it, in its precision, and it is returned.
    """
    check_pair("wgrad", dy, x, (ROW_TILE, ROW_TILE), ndim=(2, 2))
    tokens = [operand.shape[1 if isinstance(operand, Quantized) else 0] for operand in (dy, x)]
    if tokens[0] != tokens[1]:
        raise ValueError(f"wgrad {name}: operands {tuple(dy.shape)} and {tuple(x.shape)} differ in M, the tokens")
    if isinstance(dy, Tensor) and isinstance(x, Tensor) and on_tensor_cores(dy):
        out = torch.mm(dy.t(), x, out_dtype=torch.float32)
    else:
        out = _tokens_last(dy) @ _tokens_last(x).t()
    report(name, "wgrad", dy, x, out)
    return out if into is None else into.add_(out)


def multiply(rows: Operand, weight: Operand, dtype: torch.dtype, transpose: bool) -> Tensor:
    """rows [M, A] . weight [A, B] (or [B, A] transposed) -> [M, B], summed in FP32 at least and rounded once."""
    if isinstance(rows, Tensor) and isinstance(weight, Tensor) and on_tensor_cores(rows):
        matrix = weight.t() if transpose else weight
        if dtype == rows.dtype:
            return torch.mm(rows, matrix)
        return torch.mm(rows, matrix, out_dtype=torch.float32).to(dtype)
    wide = widen(weight)
    return (widen(rows) @ (wide.t() if transpose else wide)).to(dtype)


def on_tensor_cores(operand: Tensor) -> bool:
    """Whether a product takes this operand as it is and sums in FP32."""
    return operand.device.type == "cuda" and operand.dtype in (torch.bfloat16, torch.float16)


def product_reference(a: Quantized, b: Quantized) -> Tensor:
    """FP32 [M, N] = a [M, K] . b [N, K]^T as the FP8 GEMM defines it: promotion to FP32 after every 128 of K."""
    scale_a, scale_b = _row_scales(a), _row_scales(b)
    total = torch.zeros((a.rows, b.rows), dtype=torch.float32, device=a.device)
    for tile, first in enumerate(range(0, a.columns, TILE)):
        block = slice(first, first + TILE)
        partial = a.data[:, block].float() @ b.data[:, block].float().t()
        total += partial * scale_a[:, tile, None] * scale_b[None, :, tile]
    return total


def transpose_blocks(w: Quantized) -> Quantized:
    """128x128 blocks of W [N, K] -> the same numbers as W^T [K, N]; with it `product_reference` defines dgrad."""
    if not w.has_tile(BLOCK_TILE):
        raise ValueError(f"only 128x128 blocks may be transposed; data {tuple(w.shape)} has {w.tile} tiles")
    return Quantized(w.data.mT, w.scale.mT)


def _tokens_last(operand: Operand) -> Tensor:
    """An operand of the weight gradient as [features, tokens], in the precision of the product."""
    return widen(operand) if isinstance(operand, Quantized) else widen(operand).t()


def _row_scales(q: Quantized) -> Tensor:
    """Scales [rows, ceil(K/128)] of either tile kind."""
    return q.scale if q.has_tile(ROW_TILE) else q.scale.repeat_interleave(TILE, 0)[: q.rows]


def widen(operand: Operand) -> Tensor:
    """The operand in the precision of the product: FP32, or float64 for float64."""
    if isinstance(operand, Quantized):
        return dequantize(operand)
    return operand.to(torch.promote_types(operand.dtype, torch.float32))


def result_dtype(operand: Operand, asked: torch.dtype | None) -> torch.dtype:
    """What `out_dtype` None means."""
    if asked is not None:
        return asked
    return torch.bfloat16 if isinstance(operand, Quantized) else operand.dtype


def check_pair(kind: str, a: Operand, b: Operand, tiles: tuple[str, str], ndim: tuple[int, int]) -> None:
    """Refuse a plain operand with a quantised one, wrong tiles, wrong ranks, other dtypes or devices."""
    if isinstance(a, Quantized) != isinstance(b, Quantized):
        raise TypeError(f"{kind}: one operand is FP8 and the other a plain tensor; quantise both or none")
    for operand, tile, dimensions in zip((a, b), tiles, ndim, strict=True):
        if len(operand.shape) != dimensions:
            raise ValueError(f"{kind}: operand of shape {tuple(operand.shape)}; {dimensions} dimensions are needed")
        if isinstance(operand, Quantized) and not operand.has_tile(tile):
            raise ValueError(
                f"{kind}: data {tuple(operand.shape)} with scale {tuple(operand.scale.shape)} has {operand.tile} tiles"
                f"; {tile} are needed"
            )
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        raise TypeError(f"{kind}: operands are {a.dtype} and {b.dtype}; they must be of one dtype")
    if a.device != b.device:
        raise ValueError(f"{kind}: operands are on {a.device} and {b.device}; they must be on one device")
