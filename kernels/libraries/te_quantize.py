"""The quantisers by transformer-engine's `Float8BlockQuantizer`.

Its numbers are ours but for two things. A tile's factor is 448 / amax and its scale the reciprocal of that, where ours
are the reciprocal of amax / 448, and amax / 448: real scales may differ in the last bit, and with them a code that lies
at a tie. And a tile with an infinity or NaN gets the scale 1: NaN stays a NaN code, but infinity becomes 448, and the
tile no longer says that it was not finite.

Shapes: M tokens (rows), K and N features, E experts, P rows of all groups padded to multiples of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.libraries.layout import Groups, round_up
from kernels.libraries.requirements import check_shapes
from kernels.libraries.te_tensors import MULTIPLE, problem
from kernels.quantize import ROW_TILE, WIDTH_MULTIPLE, Quantized, dequantize
from kernels.tiles import AMAX_FLOOR, TILE, tile_count

__all__ = [
    "check_shapes",
    "dequantize",
    "problem",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "quantize_rows",
    "requantize_columns",
]


def quantize_rows(x_MK: Tensor, power_of_two: bool = False) -> Quantized:
    """`kernels.quantize.quantize_rows`; FP32, BF16 or FP16 in."""
    _check_matrix(x_MK, "quantize_rows")
    return _rows(_quantize(_padded(x_MK), power_of_two, rowwise=True), x_MK.shape[0])


def quantize_columns(x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """`kernels.quantize.quantize_columns`, contiguous along the tokens where their number is a multiple of 16."""
    _check_matrix(x_MK, "quantize_columns")
    groups = _groups(x_MK, counts)
    padded = _padded(x_MK) if groups is None else groups.pad(x_MK)
    return _columns(_quantize(padded, power_of_two, columnwise=True), x_MK.shape[0], groups)


def quantize_both(
    x_MK: Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
) -> tuple[Quantized, Quantized]:
    """(rows, columns), of one read unless a group has to be padded."""
    _check_matrix(x_MK, "quantize_both")
    groups = _groups(x_MK, counts)
    if groups is not None and not groups.whole:
        return quantize_rows(x_MK, power_of_two), quantize_columns(x_MK, power_of_two, counts)
    parts = _quantize(_padded(x_MK), power_of_two, rowwise=True, columnwise=True)
    return _rows(parts, x_MK.shape[0]), _columns(parts, x_MK.shape[0], groups)


def quantize_blocks(w_NK: Tensor) -> Quantized:
    """`kernels.quantize.quantize_blocks` with the transposed copy; [N, K] or stacked [E, N, K]."""
    if w_NK.ndim not in (2, 3) or w_NK.shape[-1] % WIDTH_MULTIPLE or w_NK.shape[-2] % WIDTH_MULTIPLE:
        raise ValueError(
            f"quantize_blocks: weight of shape {tuple(w_NK.shape)}; allowed is [N, K] or [E, N, K] with N and K "
            f"multiples of {WIDTH_MULTIPLE}: choose such widths or leave this layer unquantised"
        )
    _check_dtype(w_NK, "quantize_blocks")
    if w_NK.ndim == 3:
        experts = [quantize_blocks(expert) for expert in w_NK.unbind()]
        transposed = torch.stack([_bytes(q.transposed) for q in experts if q.transposed is not None])
        data = torch.stack([_bytes(q.data) for q in experts])
        return Quantized(_codes(data), torch.stack([q.scale for q in experts]), transposed=_codes(transposed))
    parts = _quantize(w_NK, False, rowwise=True, columnwise=True, dimensions=2)
    scale = parts["rowwise_scale_inv"][:, : tile_count(w_NK.shape[1], TILE)].contiguous()
    return Quantized(_codes(parts["rowwise_data"]), scale, transposed=_codes(parts["columnwise_data"]))


def requantize_columns(q_MK: Quantized, power_of_two: bool = False, counts: Sequence[int] | None = None) -> Quantized:
    """`quantize_columns` of stored 1x128 tiles."""
    if not q_MK.has_tile(ROW_TILE):
        raise ValueError(f"requantize_columns takes 1x128 tiles; data {tuple(q_MK.shape)} has {q_MK.tile} tiles")
    return quantize_columns(dequantize(q_MK), power_of_two, counts)


def _quantize(
    x: Tensor, power_of_two: bool, *, rowwise: bool = False, columnwise: bool = False, dimensions: int = 1
) -> dict[str, Tensor]:
    """The library's bytes and scales by name, in its own layouts (see `te_tensors`)."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        DType.kFloat8E4M3,
        rowwise=rowwise,
        columnwise=columnwise,
        amax_epsilon=AMAX_FLOOR,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=dimensions,
    )
    # Plain storage: no tensor subclass, no autograd.
    quantizer.internal = True
    parts: dict[str, Tensor] = quantizer.quantize(x.detach().contiguous()).get_metadata()
    return parts


def _rows(parts: dict[str, Tensor], rows: int) -> Quantized:
    return Quantized(_codes(parts["rowwise_data"])[:rows], parts["rowwise_scale_inv"][:, :rows].t())


def _columns(parts: dict[str, Tensor], tokens: int, groups: Groups | None) -> Quantized:
    data_KP = _codes(parts["columnwise_data"])
    scale = parts["columnwise_scale_inv"][:, : data_KP.shape[0]].t()
    if groups is not None:
        return Quantized(data_KP, scale, groups.counts)
    return Quantized(data_KP[:, :tokens], scale)


def _groups(x_MK: Tensor, counts: Sequence[int] | None) -> Groups | None:
    if counts is None:
        return None
    groups = Groups.of(counts, TILE)
    if sum(groups.counts) != x_MK.shape[0] or min(groups.counts, default=0) < 0:
        raise ValueError(
            f"quantize_columns: counts {groups.counts} sum to {sum(groups.counts)}; the matrix has {x_MK.shape[0]} rows"
        )
    return groups


def _padded(x_MK: Tensor) -> Tensor:
    """Rows to a multiple of 16: the library's kernels write whole vectors."""
    missing = round_up(x_MK.shape[0], MULTIPLE) - x_MK.shape[0]
    return torch.nn.functional.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK


def _codes(data: Tensor) -> Tensor:
    return data.view(torch.float8_e4m3fn)


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8)


def _check_matrix(x_MK: Tensor, name: str) -> None:
    if x_MK.ndim != 2 or x_MK.shape[1] % WIDTH_MULTIPLE or not x_MK.is_floating_point():
        raise ValueError(
            f"{name}: {x_MK.dtype} of shape {tuple(x_MK.shape)}; allowed is a float matrix [rows, columns], columns "
            f"a multiple of {WIDTH_MULTIPLE}: choose such a width or leave this layer unquantised"
        )
    _check_dtype(x_MK, name)


def _check_dtype(x: Tensor, name: str) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: transformer-engine quantises FP32, BF16 and FP16; found {x.dtype}")
