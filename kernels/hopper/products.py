"""What the dense and the grouped products share: the operands that their kernels take, and the choice of a tile."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels.hopper.launch import ALIGNMENT, OUT_TYPES
from kernels.hopper.tile import TileConfig
from kernels.quantize import WIDTH_MULTIPLE, Quantized


def check_operands(kind: str, name: str, operands: tuple[Quantized, Quantized], widths: dict[str, int]) -> None:
    """TypeError: not E4M3 codes with FP32 scales. ValueError: scales elsewhere, or a width not a multiple of 16."""
    for operand in operands:
        found = (operand.data.dtype, operand.scale.dtype)
        if found != (torch.float8_e4m3fn, torch.float32):
            raise TypeError(
                f"{kind} {name}: operand {tuple(operand.shape)} has codes of {found[0]} and scales of {found[1]}; "
                "float8_e4m3fn and float32 are needed: use a quantiser of this repository"
            )
        if operand.scale.device != operands[0].device:
            raise ValueError(
                f"{kind} {name}: operand {tuple(operand.shape)} has scales on {operand.scale.device} and codes on "
                f"{operands[0].device}; move both to one device"
            )
    for letter, width in widths.items():
        if width % WIDTH_MULTIPLE:
            raise ValueError(
                f"{kind} {name}: operands {tuple(operands[0].shape)} and {tuple(operands[1].shape)} have {letter} = "
                f"{width}; widths must be multiples of {WIDTH_MULTIPLE}: pad the layer or leave it unquantised"
            )


def check_weight_memory(kind: str, name: str, codes: Tensor) -> None:
    """ValueError: a weight that would have to be copied for every product."""
    if not codes.is_contiguous() or codes.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{kind} {name}: the weight {tuple(codes.shape)} has strides {codes.stride()} at an address of remainder "
            f"{codes.data_ptr() % ALIGNMENT}; it must be contiguous at a multiple of {ALIGNMENT} bytes: copy it once"
        )


def check_accumulator(kind: str, name: str, into: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """ValueError: not what the kernel adds to."""
    if into.dtype != torch.float32 or into.shape != shape or into.device != device or not into.is_contiguous():
        raise ValueError(
            f"{kind} {name}: into is {into.dtype} {tuple(into.shape)} with strides {into.stride()} on {into.device}; "
            f"contiguous float32 {shape} on {device} is needed: accumulate weight gradients in such a tensor"
        )


def result_dtype(kind: str, name: str, asked: torch.dtype | None) -> torch.dtype:
    """BF16 unless asked for another. ValueError: neither BF16 nor FP32."""
    dtype = torch.bfloat16 if asked is None else asked
    if dtype not in OUT_TYPES:
        raise ValueError(
            f"{kind} {name}: a result in {dtype} was asked for; allowed is one of {', '.join(map(str, OUT_TYPES))}"
        )
    return dtype


def chosen_tile(
    kind: str,
    rows: int,
    columns: int,
    depth: int,
    groups: int = 1,
    num_sms: int | None = None,
    measured: str | Path | None = None,
) -> TileConfig:
    """The fastest tile for result [rows, columns] summed over `depth`, by the table `measured` or the cost model."""
    # The cost model reads the kernels of this package.
    from kernels.compiled.choose import choose

    return choose(kind, rows, columns, depth, groups, num_sms, measured)
