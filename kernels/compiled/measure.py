"""Correctness and rates of the kernels on a device: first every kernel against the torch definition, then time.

Nothing here knows a GPU but `GpuTimer`: device, timer, sizes and back ends are given, so that all of it runs on a CPU
with Triton's interpreter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import e5m6, gemm, grouped
from kernels.compiled.choose import choose, ranked
from kernels.compiled.shapes import Shape
from kernels.compiled.streams import Stream, tensors
from kernels.e5m6 import E5M6
from kernels.hopper.tile import DGRAD, FPROP, GROUPED_DGRAD, GROUPED_FPROP, GROUPED_WGRAD, WGRAD, TileConfig
from kernels.observe import Operand
from kernels.quantize import Quantized, dequantize

# Seconds of one call; the call may be run many times.
Timer = Callable[[Callable[[], object]], float]
# Of a result in BF16 and in FP32 from the product of the same dequantised operands, and of both from the product of the
# BF16 operands.
BF16_TIER, FP32_TIER, PRODUCT_TIER = 1e-5, 1e-6, 1e-3
STREAM_TIER = 1e-5


@dataclass(frozen=True)
class Backend:
    """Modules of one back end, of the signatures of `kernels.contract`. takes_tile: its products are told a tile and
    num_sms."""

    name: str
    gemm: Any
    grouped: Any | None = None
    takes_tile: bool = False


DEFINITION = Backend("torch", gemm, grouped)


@dataclass
class GpuTimer:
    """Median seconds of one call, by events on the stream; L2 is overwritten before every run."""

    device: torch.device
    repeats: int = 20
    warm_up: int = 3
    flush_bytes: int = 256 << 20
    _flush: Tensor | None = field(default=None, repr=False)

    def __call__(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            self._flush = torch.empty(self.flush_bytes, dtype=torch.uint8, device=self.device)
        for _ in range(self.warm_up):
            call()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        for before, after in events:
            self._flush.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(before.elapsed_time(after) for before, after in events) * 1e-3


@dataclass(frozen=True)
class Operands:
    """Of one product: as they are stored in BF16, quantised, and what the weight gradient is added to."""

    a: Tensor
    b: Tensor
    quantised_a: Quantized
    quantised_b: Quantized
    into: Tensor | None


@dataclass
class Rate:
    """One product or memory-bound kernel. others: TFLOPS of other back ends. tiles: of every tile, if timed."""

    name: str
    label: str
    seconds: float
    tflops: float | None = None
    gigabytes_per_s: float | None = None
    tile: str | None = None
    others: dict[str, float] = field(default_factory=dict)
    tiles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What is measured with what. ours: the back end under test; quantize: its quantisers. measured: table of tiles."""

    device: torch.device
    timer: Timer
    ours: Backend
    quantize: ModuleType
    others: Sequence[Backend] = ()
    num_sms: int = 132
    measured: str | None = None
    dtype: torch.dtype = torch.bfloat16

    def operands(self, shape: Shape, seed: int = 0) -> Operands:
        """Random operands of a product."""
        problem, counts = shape.problem, shape.counts
        rows, columns, depth = problem.rows, problem.columns, problem.depth
        draw = torch.Generator(self.device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, device=self.device, dtype=torch.float32).to(self.dtype)

        into = None
        if problem.kind in (WGRAD, GROUPED_WGRAD):
            a, b = normal(depth, rows), normal(depth, columns)
            given = {"counts": counts} if counts else {}
            quantised = self.quantize.quantize_columns(a, **given), self.quantize.quantize_columns(b, **given)
            into = torch.zeros((len(counts), rows, columns) if counts else (rows, columns), device=self.device)
        else:
            width = (columns, depth) if problem.kind in (FPROP, GROUPED_FPROP) else (depth, columns)
            a, b = normal(rows, depth), normal(*((len(counts), *width) if counts else width))
            quantised = self.quantize.quantize_rows(a), self.quantize.quantize_blocks(b)
        return Operands(a, b, *quantised, into)

    def product(
        self,
        backend: Backend,
        shape: Shape,
        a: Operand,
        b: Operand,
        into: Tensor | None,
        tile: TileConfig | None = None,
    ) -> Tensor:
        """One product by a back end. tile: for ours, chosen by default."""
        kind, counts = shape.problem.kind, shape.counts
        module = backend.grouped if counts else backend.gemm
        settings: dict[str, Any] = {}
        if backend.takes_tile:
            settings = {"tile": tile or self.chosen(shape), "num_sms": self.num_sms}
        if kind in (WGRAD, GROUPED_WGRAD):
            settings["into"] = into
        function = {FPROP: "fprop", GROUPED_FPROP: "fprop", DGRAD: "dgrad", GROUPED_DGRAD: "dgrad"}.get(kind, "wgrad")
        return getattr(module, function)(a, b, *((counts,) if counts else ()), **settings)

    def chosen(self, shape: Shape) -> TileConfig:
        problem = shape.problem
        return choose(
            problem.kind,
            problem.rows,
            problem.columns,
            problem.depth,
            problem.groups,
            num_sms=self.num_sms,
            measured=self.measured,
        )

    def wrong(self, shapes: Sequence[Shape], seeds: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
        """(product and tile, what is wrong with it) for every tile of every shape, over all seeds."""
        for shape in shapes:
            for tile, _ in ranked(shape.problem.kind, self.num_sms):
                found = [line for seed in seeds for line in self._wrong_product(shape, tile, seed)]
                yield f"{shape.label}, {tile.name}", found

    def _wrong_product(self, shape: Shape, tile: TileConfig, seed: int) -> list[str]:
        given = self.operands(shape, seed)
        quantised = given.quantised_a, given.quantised_b

        def fresh() -> Tensor | None:
            return None if given.into is None else torch.zeros_like(given.into)

        found = self.product(self.ours, shape, *quantised, fresh(), tile)
        expected = self.product(DEFINITION, shape, *quantised, fresh())
        wide = self.product(DEFINITION, shape, given.a, given.b, fresh())
        tier = FP32_TIER if found.dtype == torch.float32 else BF16_TIER
        lines = []
        for against, other, allowed in (("definition", expected, tier), ("BF16 product", wide, PRODUCT_TIER)):
            difference = calc_diff(found, other)
            if not difference < allowed:
                lines.append(f"seed {seed}: {difference:.2e} from the {against}; allowed below {allowed:.0e}")
        if not torch.equal(found, self.product(self.ours, shape, *quantised, fresh(), tile)):
            lines.append(f"seed {seed}: another result when run again")
        return lines

    def wrong_streams(self, streams: Sequence[Stream], seeds: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
        """The same for memory-bound kernels."""
        for stream in streams:
            lines = []
            for seed in seeds:
                arguments = stream.arguments(self.device, self.dtype, seed)
                found, expected = stream.ours(*arguments), stream.definition(*arguments)
                lines += [f"seed {seed}: {line}" for line in _differences(found, expected, stream.exact)]
            yield stream.name, lines

    def rate(self, shape: Shape, every_tile: bool = False) -> Rate:
        """Time of a product by all back ends."""
        given, problem = self.operands(shape), shape.problem
        quantised = given.quantised_a, given.quantised_b
        chosen = self.chosen(shape)

        def run(backend: Backend, tile: TileConfig | None = None) -> float:
            return self.timer(lambda: self.product(backend, shape, *quantised, given.into, tile))

        def tflops(seconds: float) -> float:
            return problem.operations / seconds / 1e12

        seconds = run(self.ours, chosen)
        found = Rate(
            shape.name,
            shape.label,
            seconds,
            tflops(seconds),
            problem.memory_bytes / seconds / 1e9,
            chosen.name,
        )
        if every_tile:
            found.tiles = {
                tile.name: tflops(seconds if tile == chosen else run(self.ours, tile))
                for tile, _ in ranked(problem.kind, self.num_sms)
            }
        found.others["bf16"] = tflops(self.timer(lambda: plain_product(shape, given.a, given.b)))
        for backend in self.others:
            if not shape.counts or backend.grouped is not None:
                found.others[backend.name] = tflops(run(backend))
        return found

    def stream_rate(self, stream: Stream) -> Rate:
        """Time of a memory-bound kernel; its bytes are those of its arguments and results, each once."""
        arguments = stream.arguments(self.device, self.dtype, 0)
        result = stream.ours(*arguments)
        moved = sum(each.numel() * each.element_size() for each in tensors((arguments, result)))
        seconds = self.timer(lambda: stream.ours(*arguments))
        return Rate(stream.name, stream.name, seconds, gigabytes_per_s=moved / seconds / 1e9)


def plain_product(shape: Shape, a: Tensor, b: Tensor) -> object:
    """The product of the unquantised operands by the library of the device, BF16 in and out, expert by expert."""
    kind, counts = shape.problem.kind, list(shape.counts)
    if kind == FPROP:
        return torch.mm(a, b.t())
    if kind == DGRAD:
        return torch.mm(a, b)
    if kind == WGRAD:
        return torch.mm(a.t(), b)
    pieces = a.split(counts)
    if kind == GROUPED_WGRAD:
        return [torch.mm(x.t(), y) for x, y in zip(pieces, b.split(counts), strict=True)]
    transposed = b.mT if kind == GROUPED_FPROP else b
    return [torch.mm(x, w) for x, w in zip(pieces, transposed, strict=True)]


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2 x.y / (x.x + y.y) in float64, DeepGEMM's measure; 0 for two zeros."""
    x, y = x.double(), y.double()
    norm = (x * x + y * y).sum()
    return float(((x - y) ** 2).sum() / norm) if norm != 0 else 0.0


def _differences(found: Any, expected: Any, exact: bool) -> list[str]:
    """Between two results of a memory-bound kernel, piece by piece."""
    lines = []
    pairs = zip(_pieces(found), _pieces(expected), strict=True)
    for position, (one, other) in enumerate(pairs):
        if exact and not _same(one, other):
            lines.append(f"result {position}: not bit for bit the definition's")
        difference = calc_diff(_values(one), _values(other))
        if not difference < STREAM_TIER:
            lines.append(f"result {position}: {difference:.2e} from the definition; allowed below {STREAM_TIER:.0e}")
    return lines


def _pieces(result: Any) -> list[Any]:
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def _values(piece: Tensor | Quantized | E5M6) -> Tensor:
    if isinstance(piece, Quantized):
        return dequantize(piece)
    return e5m6.decode(piece) if isinstance(piece, E5M6) else piece


def _same(one: Any, other: Any) -> bool:
    """Codes and scales, or numbers, equal bit for bit."""
    if isinstance(one, Quantized):
        pairs = [(one.data.contiguous().view(torch.uint8), other.data.contiguous().view(torch.uint8))]
        pairs.append((one.scale, other.scale))
    elif isinstance(one, E5M6):
        pairs = [(one.codes, other.codes), (one.scale, other.scale)]
    else:
        pairs = [(one, other)]
    return all(torch.equal(x, y) for x, y in pairs)
