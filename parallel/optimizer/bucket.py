"""A gradient bucket: parameters reduced together, as one flat owner-major buffer.

The accumulators of a bucket lie in one buffer of `owners x piece` elements, owner after owner, each piece padded to
the same length. So one reduce-scatter hands every owner the sum of its rows and one all-gather brings all rows back,
whatever the shapes; a map from row ranges to offsets keeps the names. Masters and moments are flat tensors of one
piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from parallel.optimizer.assignment import assign_rows, canonical_key
from parallel.optimizer.contract import ParameterSpec, RowRange
from parallel.trace.recorder import NO_RECORDER, Channel, Kind, Recorder
from parallel.trace.tickets import TracedTicket

Settings = TypeVar("Settings")
PIECE_UNIT = 128  # elements; keeps every piece aligned for vector loads in any dtype

# torch 2.13 renamed both; older versions only know the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Work(Protocol):
    """An asynchronous collective."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


class ContributionError(RuntimeError):
    """A parameter got more or fewer weight-gradient contributions than its uses call for."""


@dataclass(frozen=True)
class OwnedSlice:
    """Rows of one canonical tensor owned by this rank, at `offset` of its piece."""

    rows: RowRange
    columns: int
    offset: int
    group: str

    @property
    def elements(self) -> int:
        return (self.rows.last - self.rows.first) * self.columns


@dataclass(frozen=True)
class Run:
    """Rows [first, last) of a parameter (flattened to two dimensions) at `offset` of the bucket's buffer."""

    first: int
    last: int
    offset: int


class Bucket:
    """Parameters with one bucket name, one replica group and one dtype, in canonical order.

    specs: the parameters. rank: this global rank. group: process group of the replicas, None where there is one
    replica. Shapes: `gradients` [owners * piece] in the accumulation dtype; `reduced`, `master`, `exp_avg`,
    `exp_avg_sq` [piece].
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        rank: int,
        group: dist.ProcessGroup | None,
        master_dtype: torch.dtype,
        moment_dtype: torch.dtype,
        accumulate_dtype: torch.dtype,
    ) -> None:
        self.specs = sorted(specs, key=lambda spec: canonical_key(spec.parts[0].name))
        self.name, self.replicas = specs[0].bucket, specs[0].replicas
        self.dtype, self.device = specs[0].parameter.dtype, specs[0].parameter.device
        self.group = group
        self.owners = len(self.replicas)
        self.position = self.replicas.index(rank)
        for spec in self.specs:
            check_spec(spec)
        self._lay_out(rank)
        self.gradients = torch.zeros(self.owners * self.piece, dtype=accumulate_dtype, device=self.device)
        self.reduced = self.gradients if self.owners == 1 else torch.zeros_like(self.gradients[: self.piece])
        self.master = torch.zeros(self.piece, dtype=master_dtype, device=self.device)
        self.exp_avg = torch.zeros(self.piece, dtype=moment_dtype, device=self.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.started = True  # nothing is expected before the first `begin`
        self.recorder: Recorder | None = NO_RECORDER
        self._work: Work | None = None
        self._expected = [0] * len(self.specs)
        self._found = [0] * len(self.specs)
        self._open = 0

    def _lay_out(self, rank: int) -> None:
        parts = [(number, part) for number, spec in enumerate(self.specs) for part in spec.parts]
        shapes = [(part.last_row - part.first_row, part.columns) for _, part in parts]
        assigned = assign_rows(shapes, self.owners)
        loads = [sum((r.last - r.first) * shapes[r.index][1] for r in owned) for owned in assigned]
        self.piece = -(-max(loads) // PIECE_UNIT) * PIECE_UNIT
        self.owned: list[OwnedSlice] = []
        self.runs: list[list[Run]] = [[] for _ in self.specs]
        for owner, owned in enumerate(assigned):
            offset = owner * self.piece
            for rows in owned:
                number, part = parts[rows.index]
                if owner == self.position:
                    name_rows = RowRange(part.name, rank, rows.first, rows.last)
                    group = self.specs[number].group
                    self.owned.append(OwnedSlice(name_rows, part.columns, offset - owner * self.piece, group))
                first, last = part.first_row + rows.first, part.first_row + rows.last
                runs = self.runs[number]
                joined = bool(runs) and runs[-1].last == first
                if joined and runs[-1].offset + (runs[-1].last - runs[-1].first) * part.columns == offset:
                    runs[-1] = Run(runs[-1].first, last, runs[-1].offset)
                else:
                    runs.append(Run(first, last, offset))
                offset += (rows.last - rows.first) * part.columns

    def describe(self) -> str:
        """The layout as text: equal on every member of the replica group, or their buffers do not match."""
        parts = " ".join(
            f"{p.name}:{p.first_row}:{p.last_row}:{p.columns}:{s.group}" for s in self.specs for p in s.parts
        )
        return f"{self.name} {self.dtype} {self.gradients.dtype} {self.replicas} {self.piece} {parts}"

    def group_runs(self, settings: Callable[[str], Settings]) -> list[tuple[int, int, Settings]]:
        """Owned elements [first, last) of the piece with the settings of their group, neighbours with equal ones
        merged."""
        runs: list[tuple[int, int, Settings]] = []
        for owned in self.owned:
            last, found = owned.offset + owned.elements, settings(owned.group)
            if runs and runs[-1][2] == found:
                runs[-1] = (runs[-1][0], last, found)
            else:
                runs.append((owned.offset, last, found))
        return runs

    # ---- one step's gradients

    def begin(self, chunks: dict[int, int]) -> None:
        """Zero the accumulators; expect `uses x chunks` contributions for each parameter."""
        self.gradients.zero_()
        self._expected = [sum(n * chunks.get(d, 0) for d, n in spec.uses.items()) for spec in self.specs]
        self._found = [0] * len(self.specs)
        self._open = sum(self._expected)
        self.started = False

    @property
    def complete(self) -> bool:
        return self._open == 0

    def missing(self) -> list[str]:
        """One line for each parameter that lacks contributions."""
        counts = zip(self.specs, self._found, self._expected, strict=True)
        return [f"{label(s)}: {found} of {expected}" for s, found, expected in counts if found < expected]

    @torch.no_grad()
    def accumulate(self, number: int, grad: torch.Tensor) -> None:
        """Add one contribution to the parameter at `number`."""
        spec = self.specs[number]
        if grad.shape != spec.parameter.shape:
            found, expected = tuple(grad.shape), tuple(spec.parameter.shape)
            raise ValueError(f"gradient of {label(spec)} has shape {found}, the parameter has {expected}")
        if self._found[number] == self._expected[number]:
            raise ContributionError(
                f"{label(spec)} got one weight-gradient contribution more than the {self._expected[number]} "
                "expected in this step (uses x chunks)"
            )
        columns = spec.parts[0].columns
        rows = grad.reshape(-1, columns)
        for run in self.runs[number]:
            end = run.offset + (run.last - run.first) * columns
            self.gradients[run.offset : end].view(-1, columns).add_(rows[run.first : run.last])
        self._found[number] += 1
        self._open -= 1

    def start_reduction(self) -> None:
        """Begin summing over the replicas; returns at once."""
        self.started = True
        if self.group is None:
            return
        event = None
        if self.recorder:
            channel, size = Channel.REDUCTION, self.gradients.nbytes
            event = self.recorder.issue(Kind.COMMUNICATION, self.name, channel=channel, bytes=size)
        self._work = reduce_scatter(self.reduced, self.gradients, group=self.group, async_op=True)
        if self.recorder and event:
            self._work = TracedTicket(self._work, self.recorder, event, Channel.REDUCTION)

    def finish_reduction(self) -> None:
        """After this `reduced` holds the sums of the owned rows (padding is zero)."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    # ---- publishing

    def start_gather(self) -> tuple[torch.Tensor, Work | None]:
        """Send the owned rows, rounded to the parameters' dtype, to all replicas; returns (staging buffer, work)."""
        own = self.master.to(self.dtype)
        if self.group is None:
            return own, None
        staging = torch.empty(self.owners * self.piece, dtype=self.dtype, device=self.device)
        return staging, all_gather(staging, own, group=self.group, async_op=True)

    @torch.no_grad()
    def finish_gather(self, staging: torch.Tensor, work: Work | None) -> None:
        """Write the gathered rows into the parameters."""
        if work is not None:
            work.wait()
        for spec, runs in zip(self.specs, self.runs, strict=True):
            parameter, columns = spec.parameter, spec.parts[0].columns
            whole: torch.Tensor = parameter
            if not parameter.is_contiguous():
                whole = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
            rows = whole.view(-1, columns)
            for run in runs:
                end = run.offset + (run.last - run.first) * columns
                rows[run.first : run.last].copy_(staging[run.offset : end].view(-1, columns))
            if whole is not parameter:
                parameter.copy_(whole)

    def state_views(self, owned: OwnedSlice) -> dict[str, torch.Tensor]:
        """Views (rows, columns) of the state of an owned slice, by kind."""
        end = owned.offset + owned.elements
        state = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {kind: flat[owned.offset : end].view(-1, owned.columns) for kind, flat in state.items()}

    def owned_gradients(self) -> Iterator[tuple[RowRange, torch.Tensor]]:
        """The reduced gradient of each owned slice, (rows, columns)."""
        for owned in self.owned:
            end = owned.offset + owned.elements
            yield owned.rows, self.reduced[owned.offset : end].view(-1, owned.columns)


def label(spec: ParameterSpec) -> str:
    """A parameter as an error names it."""
    more = f" (and {len(spec.parts) - 1} stacked with it)" if len(spec.parts) > 1 else ""
    return spec.parts[0].name + more


def check_spec(spec: ParameterSpec) -> None:
    """ValueError where the parts do not tile the parameter."""
    columns = spec.parts[0].columns
    row = 0
    for part in spec.parts:
        rows = part.last_row - part.first_row
        if part.first_row != row or part.columns != columns:
            raise ValueError(
                f"{part.name}: rows from {part.first_row} of {part.columns} columns do not follow row {row}"
            )
        if torch.Size(part.shape).numel() != rows * columns:
            raise ValueError(f"{part.name}: shape {part.shape} is not {rows} rows of {columns} columns")
        row = part.last_row
    if row * columns != spec.parameter.numel():
        shape = tuple(spec.parameter.shape)
        raise ValueError(f"{label(spec)}: parts cover {row} x {columns}, the parameter has shape {shape}")
