"""Sums of the partial results of programs, in one order: what atomics would do in any."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hopper import layout
from kernels.hopper.variant import Variant

BLOCK_P, BLOCK_N = 32, 64


@triton.jit(do_not_specialize=["P"])
def partial_sums_kernel(PARTIAL, OUT, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """PARTIAL [P, N] FP32 -> OUT [N]. Grid: column blocks."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in tl.range(0, P, BLOCK_P):
        row = (first + tl.arange(0, BLOCK_P))[:, None].to(tl.int64)
        sums += tl.load(PARTIAL + row * N + column, mask=(row < P) & (column < N), other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(OUT + column, tl.sum(sums, 0), mask=column < N)


def sum_partials(partial_PN: Tensor) -> Tensor:
    """FP32 [P, N] -> [N], the sum over P, always added in the same order."""
    partials, width = partial_PN.shape
    out = layout.empty((width,), torch.float32, partial_PN.device)
    grid = (triton.cdiv(width, BLOCK_N),)
    partial_sums_kernel[grid](partial_PN, out, partials, width, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, num_warps=4)
    return out


def variants() -> list[Variant]:
    """The one compiled form."""
    return [
        Variant(
            name="partial sums",
            kernel=partial_sums_kernel,
            signature={"PARTIAL": "*fp32", "OUT": "*fp32", "P": "i32", "N": "i32"},
            constants={"BLOCK_P": BLOCK_P, "BLOCK_N": BLOCK_N},
            aligned=("PARTIAL", "OUT", "N"),
            num_warps=4,
        )
    ]
