"""The products of a layer's experts by DeepGEMM's grouped kernels.

Shapes: M rows of all experts together, E experts, N output features, K input features, P rows with every expert's group
padded to a multiple of 128. On Hopper they write BF16 (`fprop`, `dgrad`) or add to FP32 (`wgrad`); an FP32 result of
`fprop` and `dgrad` is made expert by expert. `wgrad` wants each expert's tokens as a matrix of its own, one after the
other: one pass over the bytes of both operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import grouped
from kernels.gemm import result_dtype
from kernels.libraries.deep_gemm import TILES_BY_TILES, load, problem, rows_by_blocks
from kernels.libraries.layout import Groups, from_host
from kernels.libraries.operands import check_counts, dgrad_pair, fprop_pair, grouped_wgrad_pair, takes_sum
from kernels.libraries.requirements import check_shapes
from kernels.observe import Operand, report
from kernels.quantize import Quantized
from kernels.tiles import TILE

__all__ = ["check_shapes", "dgrad", "fprop", "problem", "wgrad"]


def fprop(
    x: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """`kernels.grouped.fprop`."""
    if isinstance(x, Tensor):
        return grouped.fprop(x, w, counts, out_dtype, name=name)
    x, w = fprop_pair("grouped fprop", x, w, name)
    check_counts("grouped fprop", counts, w.shape[0], x.rows)
    out = _by_expert(x, w.data.contiguous(), w.scale, counts, result_dtype(x, out_dtype))
    report(name, "fprop", x, w, out)
    return out


def dgrad(
    dy: Operand, w: Operand, counts: Sequence[int], out_dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """`kernels.grouped.dgrad`; FP8 weights with their transposed copy."""
    if isinstance(dy, Tensor):
        return grouped.dgrad(dy, w, counts, out_dtype, name=name)
    dy, w, transposed = dgrad_pair("grouped dgrad", dy, w, name)
    check_counts("grouped dgrad", counts, w.shape[0], dy.rows)
    out = _by_expert(dy, transposed, w.scale.mT, counts, result_dtype(dy, out_dtype))
    report(name, "dgrad", dy, w, out)
    return out


def wgrad(dy: Operand, x: Operand, counts: Sequence[int], *, into: Tensor | None = None, name: str = "") -> Tensor:
    """`kernels.grouped.wgrad`; an FP32 `into` is added to inside the products."""
    if isinstance(dy, Tensor):
        return grouped.wgrad(dy, x, counts, into=into, name=name)
    dy, x, experts = grouped_wgrad_pair(dy, x, counts, name)
    inside = into if takes_sum(into) else None
    out = inside if inside is not None else dy.scale.new_zeros((len(experts), dy.rows, x.rows))
    groups = Groups(experts, TILE)
    if dy.columns:
        tokens = list(groups.padded)
        # The names of the fourth and fifth argument differ between versions.
        load().k_grouped_fp8_gemm_nt_contiguous(
            (_matrices(dy, groups), dy.scale),
            (_matrices(x, groups), x.scale),
            out,
            tokens,
            from_host(tokens, torch.int32, dy.device),
            c=out,
            recipe=TILES_BY_TILES,
        )
    if into is not None and inside is None:
        out = into.add_(out)
    report(name, "wgrad", dy, x, out)
    return out


def _by_expert(rows: Quantized, data_EBA: Tensor, scale: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """rows [M, A] by each expert's blocks stored as [E, B, A] -> [M, B]."""
    groups = Groups.of(counts, TILE)
    if dtype != torch.bfloat16:
        spans = Groups.of(counts, 1).spans()
        parts = [rows_by_blocks(rows.index_rows(slice(a, b)), data_EBA[e], scale[e], dtype) for e, a, b in spans]
        return torch.cat(parts) if parts else rows.scale.new_empty((0, data_EBA.shape[1]), dtype=dtype)
    padded = groups.pad_tiles(rows)
    out = rows.scale.new_empty((padded.rows, data_EBA.shape[1]), dtype=dtype)
    if padded.rows:
        load().m_grouped_fp8_gemm_nt_contiguous(
            (padded.data, padded.scale), (data_EBA, scale.contiguous()), out, groups.expert_of_row(rows.device)
        )
    return groups.unpad(out)


def _matrices(q_FP: Quantized, groups: Groups) -> Tensor:
    """Codes [F, P] -> flat [F * P]: for one expert after the other its contiguous [F, tokens]."""
    codes = q_FP.data.view(torch.uint8)
    out = codes.new_empty(codes.numel())
    for _, first, end in groups.spans():
        out[first * q_FP.rows : end * q_FP.rows].view(q_FP.rows, end - first).copy_(codes[:, first:end])
    return out.view(torch.float8_e4m3fn)
