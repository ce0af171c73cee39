"""RMSNorm on Hopper: the functions of `kernels.norm`, which defines the numbers; equal to it but for the order of the
FP32 sums over a row.

BF16 and FP32 are computed here; other float types, float64 above all, by the definition itself. Shapes: M rows, D
features, 8192 at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import norm as definition
from kernels.hopper import layout
from kernels.hopper.norm_kernels import columns_kernel, gradient_kernel, inverse_kernel, rows_kernel
from kernels.hopper.partial_sums import sum_partials
from kernels.hopper.quantize import FLOATS
from kernels.hopper.variant import Variant
from kernels.quantize import Quantized, check_matrix, padded_rows

WIDTHS = (512, 1024, 2048, 4096, 8192)
# An H100's or H800's, and so the same partial sums of dgain wherever it runs.
MULTIPROCESSORS = 132
WARPS = 8
STAGES = 4


@dataclass(frozen=True)
class RowBlock:
    """Rows that a program holds at a time, and the warps that share them: 32 numbers for each of their threads."""

    width: int

    @property
    def warps(self) -> int:
        return min(WARPS, self.width // 256)

    @property
    def rows(self) -> int:
        return 1024 * self.warps // self.width

    @property
    def persistent_rows(self) -> int:
        """For the gradients, which keep sums of as many numbers beside: 16, where that is a row or more; 8 of 1024
        features, for which Triton 3.8 spills with 16."""
        return max(1, (256 if self.width == 1024 else 512) * WARPS // self.width)


def rmsnorm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """[..., D] -> [..., D] in x's dtype."""
    if x.dtype not in FLOATS:
        return definition.rmsnorm(x, gain_D, eps)
    return _rows(x, gain_D, eps, None)[0].view(x.shape)


def rmsnorm_rows(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool = False) -> tuple[Tensor, Quantized]:
    """[M, D] -> (y [M, D] in x's dtype, the rounded y's 1x128 tiles), of one read."""
    if x_MD.dtype not in FLOATS:
        return definition.rmsnorm_rows(x_MD, gain_D, eps, power_of_two)
    check_matrix(x_MD, "rmsnorm_rows")
    y_MD, tiles = _rows(x_MD, gain_D, eps, power_of_two)
    assert tiles is not None
    return y_MD, tiles


def rmsnorm_columns(x_MD: Tensor, gain_D: Tensor, eps: float) -> Quantized:
    """[M, D] -> y computed again and quantised along tokens: data [D, M], scale [D, ceil(M/128)]. Two reads: 1 / rms of
    every row first."""
    if x_MD.dtype not in FLOATS:
        return definition.rmsnorm_columns(x_MD, gain_D, eps)
    check_matrix(x_MD, "rmsnorm_columns")
    x, block = _matrix(x_MD, gain_D, "rmsnorm_columns")
    rows, width = x.shape
    inverse = layout.empty((rows,), torch.float32, x.device)
    inverse_kernel[(triton.cdiv(rows, block.rows),)](
        x, inverse, rows, width, x.stride(0), eps, ROWS=block.rows, WIDTH=block.width, num_warps=block.warps
    )
    padded = padded_rows(rows)
    data, scale = layout.column_tiles(width, padded, x.device)
    columns_kernel[(padded // 128 * triton.cdiv(width, 128),)](
        x, gain_D.contiguous(), inverse, data, scale, rows, width, x.stride(0), padded, num_warps=WARPS
    )
    return Quantized(data[:, :rows], scale)


def rmsnorm_backward(
    dy: Tensor, x: Tensor, gain_D: Tensor, eps: float, num_sms: int | None = None
) -> tuple[Tensor, Tensor]:
    """dy, x [..., D] -> (dx [..., D] in x's dtype, dgain [D] in FP32). No atomics: the same bits every time, for one
    `num_sms` (multiprocessors to occupy, None: 132)."""
    if x.dtype not in FLOATS:
        return definition.rmsnorm_backward(dy, x, gain_D, eps)
    if dy.shape != x.shape:
        raise ValueError(f"rmsnorm_backward: dy {tuple(dy.shape)}, x {tuple(x.shape)}; they must have one shape")
    matrix, block = _matrix(x, gain_D, "rmsnorm_backward")
    rows, width = matrix.shape
    wide_dy = layout.readable(dy.reshape(rows, width))
    dx = layout.empty((rows, width), x.dtype, x.device)
    programs = max(1, min(num_sms or MULTIPROCESSORS, triton.cdiv(rows, block.persistent_rows)))
    partial = layout.empty((programs, width), torch.float32, x.device)
    gradient_kernel[(programs,)](
        wide_dy, matrix, gain_D.contiguous(), dx, partial, rows, width, wide_dy.stride(0), matrix.stride(0), eps,
        ROWS=block.persistent_rows, WIDTH=block.width, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return dx.view(x.shape), sum_partials(partial)


def variants() -> list[Variant]:
    """Every width, with and without tiles, for BF16."""
    found = []
    matrix = {"X": "*bf16", "GAIN": "*bf16"}
    sizes = {"M": "i32", "D": "i32", "x_stride": "i32"}
    pointers = ("X", "GAIN", "Y", "CODES", "S", "INVERSE", "YT", "YTS", "DY", "DX", "PARTIAL")
    aligned = (*pointers, "D", "x_stride", "dy_stride", "s_stride", "padded")

    def add(name: str, kernel: object, signature: dict[str, str], constants: dict[str, Any], warps: int) -> None:
        given = tuple(argument for argument in aligned if argument in signature)
        found.append(Variant(name, kernel, signature, constants, given, num_warps=warps))

    for block in map(RowBlock, WIDTHS):
        size = {"ROWS": block.rows, "WIDTH": block.width}
        plain = {**matrix, "Y": "*bf16", **sizes, "eps": "fp32"}
        nothing = {"CODES": None, "S": None, "s_stride": 1, "POWER_OF_TWO": False}
        add(f"rmsnorm {block.width}", rows_kernel, plain, {**size, **nothing}, block.warps)
        quantised = {**plain, "CODES": "*fp8e4nv", "S": "*fp32", "s_stride": "i32"}
        for power_of_two in (False, True):
            name = f"rmsnorm rows {block.width}{' power of two' if power_of_two else ''}"
            add(name, rows_kernel, quantised, {**size, "POWER_OF_TWO": power_of_two}, block.warps)
        inverse = {"X": "*bf16", "INVERSE": "*fp32", **sizes, "eps": "fp32"}
        add(f"rmsnorm inverse {block.width}", inverse_kernel, inverse, size, block.warps)
        held = {"ROWS": block.persistent_rows, "WIDTH": block.width}
        gradient = {
            "DY": "*bf16",
            **matrix,
            "DX": "*bf16",
            "PARTIAL": "*fp32",
            **sizes,
            "dy_stride": "i32",
            "eps": "fp32",
        }
        add(f"rmsnorm backward {block.width}", gradient_kernel, gradient, {**held, "STAGES": STAGES}, WARPS)
    columns = {**matrix, "INVERSE": "*fp32", "YT": "*fp8e4nv", "YTS": "*fp32", **sizes, "padded": "i32"}
    add("rmsnorm columns", columns_kernel, columns, {}, WARPS)
    return found


def _rows(x: Tensor, gain_D: Tensor, eps: float, power_of_two: bool | None) -> tuple[Tensor, Quantized | None]:
    """(y [rows, D], its tiles unless `power_of_two` is None)."""
    matrix, block = _matrix(x, gain_D, "rmsnorm")
    rows, width = matrix.shape
    y = layout.empty((rows, width), x.dtype, x.device)
    tiles, written, s_stride = None, rows, 1
    if power_of_two is not None:
        data = layout.empty((rows, width), torch.float8_e4m3fn, x.device)
        tiles = Quantized(data, layout.row_scales(rows, width, x.device))
        written = s_stride = tiles.scale.stride(1)
    if rows:
        rows_kernel[(triton.cdiv(written, block.rows),)](
            matrix, gain_D.contiguous(), y, tiles.data if tiles else None, tiles.scale if tiles else None,
            rows, width, matrix.stride(0), s_stride, eps,
            ROWS=block.rows, WIDTH=block.width, POWER_OF_TWO=bool(power_of_two), num_warps=block.warps,
        )  # fmt: skip
    return y, tiles


def _matrix(x: Tensor, gain_D: Tensor, name: str) -> tuple[Tensor, RowBlock]:
    """x as a matrix that the kernels can read, and the block for its width."""
    width = x.shape[-1]
    if width > WIDTHS[-1] or gain_D.shape != (width,) or gain_D.device != x.device:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} on {x.device}, gain {tuple(gain_D.shape)} on {gain_D.device}; allowed is x "
            f"[..., D] with a gain [D] beside it, D up to {WIDTHS[-1]}: choose kernels.norm=torch for wider rows"
        )
    return layout.readable(x.reshape(-1, width)), RowBlock(next(allowed for allowed in WIDTHS if width <= allowed))
