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
    scales, indices and norms; Triton 3.6 loads the same scale up to four times. reread: 128-bit loads of what the same
    block has just loaded, and finds in L1. issue: clocks to issue its instructions, as a multiple of the clocks for its
    bytes, at most; above 1 where arithmetic on every number and not memory is what a kernel waits for."""

    name: str
    warps: int
    narrow: dict[int, int]
    reread: int = 0
    issue: float = 1.0


Row = Product | Stream

WIDE = "QGMMA.64x128x32.F32.E4M3.E4M3"
WIDE_AND_NARROW = "QGMMA.64x128x32.F32.E4M3.E4M3 + QGMMA.64x64x32.F32.E4M3.E4M3"

EXPECTED: tuple[Row, ...] = (
    # name, tensor core, warps, consumers, QGMMA, accumulators, FFMA, FMUL, warp-specialised.
    # FMUL: the two rows of a thread have one product of scales each; with scales of both operands along K, each sum's.
    Product("gemm fprop plain 64x128", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm fprop plain 64x128 fp32", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm fprop plain 128x128", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm fprop plain 128x128 fp32", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm fprop plain 128x192", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm fprop plain 128x192 fp32", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm fprop ws 128x128", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm fprop ws 128x128 fp32", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm fprop ws 128x128 row-major scales", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm fprop ws 128x192", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm fprop ws 128x192 fp32", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm fprop ws 128x192 row-major scales", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm dgrad plain 64x128", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm dgrad plain 64x128 fp32", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm dgrad plain 128x128", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm dgrad plain 128x128 fp32", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm dgrad plain 128x192", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm dgrad plain 128x192 fp32", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm dgrad ws 128x128", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm dgrad ws 128x128 fp32", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm dgrad ws 128x128 row-major scales", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm dgrad ws 128x192", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm dgrad ws 128x192 fp32", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm dgrad ws 128x192 row-major scales", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm wgrad plain 128x128", WIDE, 8, 2, 4, 64, 64, 64, False),
    Product("gemm wgrad plain 128x128 accumulate", WIDE, 8, 2, 4, 64, 64, 64, False),
    Product("gemm wgrad ws 128x128", WIDE, 12, 2, 4, 64, 64, 64, True),
    Product("gemm wgrad ws 128x128 accumulate", WIDE, 12, 2, 4, 64, 64, 64, True),
    Product("gemm grouped fprop plain 64x128", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm grouped fprop plain 64x128 fp32", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm grouped fprop plain 128x128", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm grouped fprop plain 128x128 fp32", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm grouped fprop plain 128x192", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm grouped fprop plain 128x192 fp32", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm grouped fprop ws 128x128", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped fprop ws 128x128 fp32", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped fprop ws 128x128 row-major scales", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped fprop ws 128x192", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped fprop ws 128x192 fp32", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped fprop ws 128x192 row-major scales", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped dgrad plain 64x128", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm grouped dgrad plain 64x128 fp32", WIDE, 4, 1, 4, 64, 64, 2, False),
    Product("gemm grouped dgrad plain 128x128", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm grouped dgrad plain 128x128 fp32", WIDE, 8, 2, 4, 64, 64, 2, False),
    Product("gemm grouped dgrad plain 128x192", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm grouped dgrad plain 128x192 fp32", WIDE_AND_NARROW, 8, 2, 8, 96, 96, 4, False),
    Product("gemm grouped dgrad ws 128x128", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped dgrad ws 128x128 fp32", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped dgrad ws 128x128 row-major scales", WIDE, 12, 2, 4, 64, 64, 2, True),
    Product("gemm grouped dgrad ws 128x192", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped dgrad ws 128x192 fp32", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped dgrad ws 128x192 row-major scales", WIDE_AND_NARROW, 12, 2, 8, 96, 96, 4, True),
    Product("gemm grouped wgrad plain 128x128", WIDE, 8, 2, 4, 64, 64, 64, False),
    Product("gemm grouped wgrad plain 128x128 accumulate", WIDE, 8, 2, 4, 64, 64, 64, False),
    Product("gemm grouped wgrad ws 128x128", WIDE, 12, 2, 4, 64, 64, 64, True),
    Product("gemm grouped wgrad ws 128x128 accumulate", WIDE, 12, 2, 4, 64, 64, 64, True),
    Stream("quantize rows bf16", 4, {32: 1}),
    Stream("quantize rows bf16 power of two", 4, {32: 1}),
    Stream("quantize rows fp32", 4, {32: 1}),
    Stream("quantize rows fp32 power of two", 4, {32: 1}),
    Stream("quantize columns bf16", 8, {32: 1}),
    Stream("quantize columns bf16 grouped", 8, {32: 1, 64: 2}),
    Stream("quantize columns bf16 grouped power of two", 8, {32: 1, 64: 2}),
    Stream("quantize columns bf16 power of two", 8, {32: 1}),
    Stream("quantize columns fp32", 8, {32: 1}),
    Stream("quantize columns fp32 grouped", 8, {32: 1, 64: 2}),
    Stream("quantize columns fp32 grouped power of two", 8, {32: 1, 64: 2}),
    Stream("quantize columns fp32 power of two", 8, {32: 1}),
    Stream("quantize both bf16", 8, {32: 2}, reread=8),
    Stream("quantize both bf16 grouped", 8, {32: 2, 64: 2}, reread=8),
    Stream("quantize both bf16 grouped power of two", 8, {32: 2, 64: 2}, reread=8),
    Stream("quantize both bf16 power of two", 8, {32: 2}, reread=8),
    Stream("quantize both fp32", 8, {32: 2}, reread=16),
    Stream("quantize both fp32 grouped", 8, {32: 2, 64: 2}, reread=16),
    Stream("quantize both fp32 grouped power of two", 8, {32: 2, 64: 2}, reread=16),
    Stream("quantize both fp32 power of two", 8, {32: 2}, reread=16),
    Stream("requantize columns", 8, {32: 2}),
    Stream("requantize columns grouped", 8, {32: 2, 64: 2}),
    Stream("requantize columns grouped power of two", 8, {32: 2, 64: 2}),
    Stream("requantize columns power of two", 8, {32: 2}),
    Stream("quantize blocks bf16", 8, {32: 1}),
    Stream("quantize blocks fp32", 8, {32: 1}),
    Stream("dequantize 1x128 bf16", 4, {32: 8}),
    Stream("dequantize 1x128 fp32", 4, {32: 16}),
    Stream("dequantize 128x1 bf16", 4, {32: 1}),
    Stream("dequantize 128x1 fp32", 4, {32: 1}),
    Stream("dequantize 128x128 bf16", 4, {32: 8}),
    Stream("dequantize 128x128 fp32", 4, {32: 16}),
    Stream("e5m6 decode bf16", 4, {32: 8}),
    Stream("e5m6 decode columns", 8, {32: 2}),
    Stream("e5m6 decode fp32", 4, {32: 16}),
    Stream("e5m6 encode bf16", 4, {32: 1}),
    Stream("e5m6 encode fp32", 4, {32: 1}),
    Stream("rmsnorm 512", 2, {}),
    Stream("rmsnorm 1024", 4, {}),
    Stream("rmsnorm 2048", 8, {}),
    Stream("rmsnorm 4096", 8, {}),
    Stream("rmsnorm 8192", 8, {}),
    Stream("rmsnorm backward 512", 8, {32: 1, 64: 1}),
    Stream("rmsnorm backward 1024", 8, {64: 1}),
    Stream("rmsnorm backward 2048", 8, {}),
    Stream("rmsnorm backward 4096", 8, {}),
    Stream("rmsnorm backward 8192", 8, {}),
    Stream("rmsnorm columns", 8, {32: 5}),
    Stream("rmsnorm inverse 512", 2, {32: 1}),
    Stream("rmsnorm inverse 1024", 4, {32: 1}),
    Stream("rmsnorm inverse 2048", 8, {32: 1}),
    Stream("rmsnorm inverse 4096", 8, {32: 1}),
    Stream("rmsnorm inverse 8192", 8, {32: 1}),
    Stream("rmsnorm rows 512", 2, {32: 1}),
    Stream("rmsnorm rows 512 power of two", 2, {32: 1}),
    Stream("rmsnorm rows 1024", 4, {32: 1}),
    Stream("rmsnorm rows 1024 power of two", 4, {32: 1}),
    Stream("rmsnorm rows 2048", 8, {32: 1}),
    Stream("rmsnorm rows 2048 power of two", 8, {32: 1}),
    Stream("rmsnorm rows 4096", 8, {32: 1}),
    Stream("rmsnorm rows 4096 power of two", 8, {32: 1}),
    Stream("rmsnorm rows 8192", 8, {32: 1}),
    Stream("rmsnorm rows 8192 power of two", 8, {32: 1}),
    Stream("partial sums", 4, {32: 1}),
    Stream("swiglu", 4, {}),
    Stream("swiglu backward", 4, {}),
    Stream("swiglu backward tiles", 16, {32: 8}, issue=1.3),
    Stream("swiglu backward tiles grouped", 16, {32: 8, 64: 2}, issue=1.3),
    Stream("swiglu backward tiles of any width", 4, {32: 6}),
    Stream("swiglu backward tiles of any width weighted", 4, {32: 9}),
    Stream("swiglu backward tiles weighted", 16, {32: 11}, issue=1.3),
    Stream("swiglu backward tiles weighted grouped", 16, {32: 11, 64: 2}, issue=1.3),
    Stream("swiglu backward weighted", 4, {32: 5}),
    Stream("swiglu columns", 8, {32: 9}, issue=1.6),
    Stream("swiglu columns grouped", 8, {32: 9, 64: 2}, issue=1.6),
    Stream("swiglu columns of any width", 8, {32: 13}, issue=1.6),
    Stream("swiglu columns of any width grouped", 8, {32: 13, 64: 2}, issue=1.6),
    Stream("swiglu columns of any width weighted", 8, {32: 17}, issue=1.6),
    Stream("swiglu columns of any width weighted grouped", 8, {32: 17, 64: 2}, issue=1.6),
    Stream("swiglu columns weighted", 8, {32: 13}, issue=1.6),
    Stream("swiglu columns weighted grouped", 8, {32: 13, 64: 2}, issue=1.6),
    Stream("swiglu tiles", 4, {32: 3}),
    Stream("swiglu tiles of any width", 4, {32: 1}),
    Stream("swiglu tiles of any width weighted", 4, {32: 3}),
    Stream("swiglu tiles weighted", 4, {32: 5}),
    Stream("swiglu weighted", 4, {32: 4}),
    Stream("take rows", 4, {64: 4}),
    Stream("take scales", 4, {32: 8, 64: 8}),
    Stream("sum rows 256 bf16", 1, {64: 10}),
    Stream("sum rows 256 fp32", 1, {64: 10}),
    Stream("sum rows 1024 bf16", 4, {64: 10}),
    Stream("sum rows 1024 fp32", 4, {64: 10}),
)
