"""An audit of the FP8 recipe (V3 section 3.3), taken at the products themselves over one step of a running job.

Three witnesses, none of which reads the configuration:
- every fprop, dgrad and wgrad reports its operands as they reach it (`kernels.observe`): dtype, tiles, scales, codes;
- every FP8 product is compared with the same product of operands that were never rounded to FP8 (`Ops.check`), the
  rows of a dispatch included: those cross a second time in plain form while an audit runs;
- torch's dispatcher shows each matrix product that runs outside `kernels`.

The step's own numbers do not change. All ranks audit the same step, since the additional exchange is collective.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import tiles
from kernels.observe import Operand, OperandRecord, observing
from kernels.quantize import E4M3_MAX, ROW_TILE, Quantized
from kernels.tiles import TILE
from model.operands import Elementwise
from model.ops import Ops
from train.agree import gather_json, together
from train.errors import CannotWriteError

KINDS = ("fprop", "dgrad", "wgrad")
# `scaled_mm` is the one library whose products pass torch's dispatcher.
HOMES = frozenset(("kernels.gemm", "kernels.grouped", "kernels.attention", "kernels.libraries.scaled_mm"))
# Matrix-vector products are not among them: no linear layer is one, and norms reduce their gains' gradients with one.
PRODUCTS = frozenset(
    "mm bmm addmm baddbmm addbmm linear matmul einsum bilinear _trilinear convolution _int_mm _addmm_activation "
    "_scaled_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2 "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable".split()
)


@dataclass
class OperandSummary:
    """One operand of a product over the step: what was seen, in sets, so that one deviation is not averaged away.

    tiles, scale_dtypes: empty for operands that are not FP8. power_of_two: every scale of the step is one. codes_valid:
    every byte is an E4M3 number. least_peak: the smallest, over tiles, of a tile's largest |code|: 448 where each tile
    has its own scale, above 224 with power-of-two scales; 0 when no tile is above the amax floor. tiles_seen,
    floor_tiles: how many tiles, and how many of them have the floor's scale. shapes: of a few of the operands.
    """

    dtypes: list[str] = field(default_factory=list)
    tiles: list[str] = field(default_factory=list)
    scale_dtypes: list[str] = field(default_factory=list)
    power_of_two: bool | None = None
    codes_valid: bool | None = None
    least_peak: float | None = None
    tiles_seen: int = 0
    floor_tiles: int = 0
    shapes: list[list[int]] = field(default_factory=list)
    scale_shapes: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, operand: Operand) -> OperandSummary:
        record = OperandRecord.of(operand)
        found = cls([_name(record.dtype)], shapes=[list(record.shape)])
        if isinstance(operand, Quantized):
            assert record.tile is not None and record.scale_dtype is not None and record.scale_shape is not None
            found.tiles, found.scale_dtypes = [record.tile], [_name(record.scale_dtype)]
            found.power_of_two, found.codes_valid = record.power_of_two, record.codes_valid
            found.scale_shapes = [list(record.scale_shape)]
            found.tiles_seen = operand.scale.numel()
            found.floor_tiles = int((operand.scale <= _floor_scale()).sum())
            found.least_peak = _least_peak(operand)
        return found

    def add(self, other: OperandSummary) -> None:
        """Another product's operand, or another rank's summary."""
        self.dtypes = sorted({*self.dtypes, *other.dtypes})
        self.tiles = sorted({*self.tiles, *other.tiles})
        self.scale_dtypes = sorted({*self.scale_dtypes, *other.scale_dtypes})
        self.power_of_two = _both(self.power_of_two, other.power_of_two)
        self.codes_valid = _both(self.codes_valid, other.codes_valid)
        peaks = [peak for peak in (self.least_peak, other.least_peak) if peak is not None]
        self.least_peak = min((peak for peak in peaks if peak), default=0.0) if peaks else None
        self.tiles_seen += other.tiles_seen
        self.floor_tiles += other.floor_tiles
        for mine, theirs in ((self.shapes, other.shapes), (self.scale_shapes, other.scale_shapes)):
            mine.extend(shape for shape in theirs if shape not in mine and len(mine) < 4)


@dataclass
class AuditRow:
    """One linear and kind of product over the step.

    a, b: operands in the order of `kernels.observe` (fprop x, w; dgrad dy, w; wgrad dy, x). results: dtypes. products:
    how many there were. difference: |result - unquantised| / |unquantised|, norms over the `compared` products of the
    step; None where nothing was compared. noise: |result - unquantised| over the norm that the unquantised product
    would have if its terms had random signs, sqrt(sum a^2 b^2). Both are some 3.7 % for independent terms; where
    tokens are alike, as early in training, terms add up while their roundings cancel: the difference falls, the noise
    stays. not_finite: products left out because a norm was not finite.
    """

    name: str
    kind: str
    a: OperandSummary
    b: OperandSummary
    results: list[str]
    products: int = 1
    compared: int = 0
    not_finite: int = 0
    difference: float | None = None
    noise: float | None = None
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, other: AuditRow) -> None:
        """Another product of this linear and kind, or another rank's row."""
        self.a.add(other.a)
        self.b.add(other.b)
        self.results = sorted({*self.results, *other.results})
        self.products += other.products
        self.not_finite += other.not_finite
        self._add_squares(other.squares, other.compared)

    def compare(self, result: torch.Tensor, unquantised: torch.Tensor, random_signs: torch.Tensor) -> None:
        """One product beside what it would be without FP8, and beside the product of the squares."""
        expected = unquantised.double()
        difference = (result.double() - expected).square().sum()
        squares = float(difference), float(expected.square().sum()), float(random_signs.double().sum())
        if all(map(math.isfinite, squares)):
            self._add_squares(squares, 1)
        else:
            self.not_finite += 1

    def _add_squares(self, squares: tuple[float, float, float], products: int) -> None:
        self.compared += products
        difference, expected, random_signs = (a + b for a, b in zip(self.squares, squares, strict=True))
        self.squares = difference, expected, random_signs
        self.difference = math.sqrt(difference / expected) if expected > 0 else None
        self.noise = math.sqrt(difference / random_signs) if random_signs > 0 else None

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> AuditRow:
        a, b = OperandSummary(**found["a"]), OperandSummary(**found["b"])
        return cls(**(found | {"a": a, "b": b, "squares": tuple(found["squares"])}))


class StepAudit:
    """Watches one rank during one step: `with StepAudit(engine.ops).watching(): engine.step(...)`."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.rows: dict[tuple[str, str], AuditRow] = {}
        self.outside: Counter[str] = Counter()
        self._muted = False

    @contextmanager
    def watching(self) -> Iterator[StepAudit]:
        """Held around a whole step, never across a program's yield alone."""
        before, self.ops.check = self.ops.check, self._check
        try:
            with observing(self), _OutsideProducts(self.outside):
                yield self
        finally:
            self.ops.check = before

    def product(self, name: str, kind: str, a: Operand, b: Operand, out: torch.Tensor) -> None:
        """From `kernels.observe`."""
        if self._muted:
            return
        row = AuditRow(name, kind, OperandSummary.of(a), OperandSummary.of(b), [_name(out.dtype)])
        known = self.rows.setdefault((name, kind), row)
        if known is not row:
            known.add(row)

    def _check(
        self, name: str, kind: str, result: torch.Tensor, unquantised: Callable[[Elementwise], torch.Tensor]
    ) -> None:
        self._muted = True
        try:
            self.rows[name, kind].compare(result, unquantised(lambda x: x), unquantised(_wide_square))
        finally:
            self._muted = False

    def found(self) -> dict[str, Any]:
        """This rank's part, as JSON."""
        return {"rows": [asdict(row) for row in self.rows.values()], "outside": dict(self.outside)}


class _OutsideProducts(TorchDispatchMode):
    """Counts matrix products that were not issued by `kernels`."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and torch's guard against it would import its compiler: seconds, and more per call.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            place = _place_outside()
            if place is not None:
                shapes = " ".join(str(list(a.shape)) for a in args if isinstance(a, torch.Tensor))
                self.found[f"{func.overloadpacket.__name__} {shapes} at {place}"] += 1
        return func(*args, **(kwargs or {}))


def _place_outside() -> str | None:
    """None inside one of `kernels`' products, else the innermost place that is not torch's own."""
    frame, place = sys._getframe(2), "?"
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in HOMES:
            return None
        if place == "?" and not module.startswith("torch"):
            place = f"{module}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return place


def merge(parts: Iterable[dict[str, Any]]) -> tuple[list[AuditRow], Counter[str]]:
    """All ranks' parts: one row per linear and kind, in order of name; and the products outside `kernels`."""
    rows: dict[tuple[str, str], AuditRow] = {}
    outside: Counter[str] = Counter()
    for part in parts:
        outside.update(part["outside"])
        for found in part["rows"]:
            row = AuditRow.from_json(found)
            known = rows.setdefault((row.name, row.kind), row)
            if known is not row:
                known.add(row)
    return sorted(rows.values(), key=lambda row: (row.name, KINDS.index(row.kind))), outside


def write_audit(path: Path, step: int, audit: StepAudit, rank: int) -> None:
    """Gather every rank's part and write them from rank 0 as JSON, whole or not at all; collective. Raises AgreedError
    on every rank when the file cannot be written."""
    parts = gather_json(audit.found())
    together(lambda: _write(path, step, parts) if rank == 0 else None)


def _write(path: Path, step: int, parts: list[dict[str, Any]]) -> None:
    rows, outside = merge(parts)
    plain = [{key: value for key, value in asdict(row).items() if key != "squares"} for row in rows]
    document = {"step": step, "ranks": len(parts), "rows": plain, "outside": dict(outside)}
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CannotWriteError(f"{path}: the audit cannot be written: {error.strerror}") from None


def _least_peak(q: Quantized) -> float:
    """Smallest over tiles of the largest |code|, tiles with the floor's scale left out; 0 when no tile is left, and
    for no tokens at all."""
    if not q.data.numel():
        return 0.0
    peaks = _tile_maxima(q.data.view(torch.uint8) & 0x7F, -1)
    if not q.has_tile(ROW_TILE):
        peaks = _tile_maxima(peaks, -2)
    if peaks.shape != q.scale.shape:
        return 0.0
    above = peaks[q.scale > _floor_scale()]
    return float(above.min().view(torch.float8_e4m3fn).to(torch.float32)) if above.numel() else 0.0


def _floor_scale() -> float:
    """Scale of a tile at the amax floor, rounded up to a power of two: there the largest code says nothing."""
    return 2.0 ** math.ceil(math.log2(tiles.AMAX_FLOOR / E4M3_MAX))


def _wide_square(x: torch.Tensor) -> torch.Tensor:
    # Gradients are small: their squares would be lost in FP32.
    return x.double().square()


def _tile_maxima(values: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([part.amax(dim, keepdim=True) for part in values.split(TILE, dim)], dim)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _both(a: bool | None, b: bool | None) -> bool | None:
    return b if a is None else a if b is None else a and b
