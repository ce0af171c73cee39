"""What every kernel variant must be made of: one row each, literal. Counts are per K block of 128 and warp group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A GEMM. tensor_core: all its forms. qgmma, ffma, fmul: instructions of a K block; an accumulator is promoted by
    one FFMA, with scales of both operands along K by FMUL and FFMA; no FADD. accumulators: of a thread."""

    name: str
    tensor_core: str
    warps: int
    consumers: int
    qgmma: int
    accumulators: int
    ffma: int
    fmul: int
    warp_specialised: bool


@dataclass(frozen=True)
class Stream:
    """A memory-bound kernel. narrow: how many accesses of global memory may be narrower than 128 bits, by width:
    scales, indices and norms."""

    name: str
    warps: int
    narrow: dict[int, int]


Row = Product | Stream

EXPECTED: tuple[Row, ...] = ()
