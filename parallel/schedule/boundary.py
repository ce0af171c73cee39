"""What crosses between stages, named the same way on both sides.

A boundary tensor is named by what consumes it: F(stage) consumes an activation made by F(stage-1), B or I(stage) a
gradient made by B or I(stage+1). The same name serves a transfer, its counterpart and a hand-over inside one rank.
"""

from __future__ import annotations

from typing import NamedTuple

from parallel.schedule.actions import Compute, Op, Pair, Payload, Table, Transfer


class Boundary(NamedTuple):
    """One tensor between two stages; `stage` consumes it. Tuples order by payload, direction, stage, chunk."""

    payload: Payload
    direction: int
    stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.payload} {self.direction}.{self.chunk} into stage {self.stage}"


def consumed(compute: Compute, stages: int) -> Boundary | None:
    """What `compute` must have received; None for a first stage's F, a last stage's B or I, and every W."""
    if compute.op is Op.F:
        payload, needed = Payload.ACTIVATION, compute.stage > 0
    else:
        payload, needed = Payload.GRADIENT, compute.op is not Op.W and compute.stage < stages - 1
    return Boundary(payload, compute.direction, compute.stage, compute.chunk) if needed else None


def produced(compute: Compute, stages: int) -> Boundary | None:
    """What `compute` hands on; None for a last stage's F, a first stage's B or I, and every W."""
    if compute.op is Op.F and compute.stage < stages - 1:
        return Boundary(Payload.ACTIVATION, compute.direction, compute.stage + 1, compute.chunk)
    if compute.op in (Op.B, Op.I) and compute.stage > 0:
        return Boundary(Payload.GRADIENT, compute.direction, compute.stage - 1, compute.chunk)
    return None


def ends_of(boundary: Boundary, rank_of: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """(rank that makes it, rank that consumes it); equal where both stages live on one rank and nothing is sent."""
    row = rank_of[boundary.direction]
    source = boundary.stage + (-1 if boundary.payload is Payload.ACTIVATION else 1)
    return row[source], row[boundary.stage]


def boundary_of(transfer: Transfer) -> Boundary:
    return Boundary(transfer.payload, transfer.direction, transfer.stage, transfer.chunk)


def parts(action: Compute | Pair) -> tuple[Compute, ...]:
    """A pair's two halves, forward first; any other compute action alone."""
    return (action.forward, action.backward) if isinstance(action, Pair) else (action,)


def stays(boundary: Boundary, table: Table) -> bool:
    """Whether the boundary is handed over inside one rank, without a transfer."""
    source, target = ends_of(boundary, table.rank_of)
    return source == target
