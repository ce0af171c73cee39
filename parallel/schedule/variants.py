"""The same schedule with every backward whole, or with every backward split: for comparing runs of the executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from parallel.schedule.actions import Compute, Op, Pair, Post, Table
from parallel.schedule.transfers import with_transfers


def without_split(table: Table) -> Table:
    """Every I becomes a B in its place, and every W is left out."""
    rows: list[list[Compute | Pair]] = []
    for row in table.actions:
        out: list[Compute | Pair] = []
        for action in row:
            if isinstance(action, Pair):
                out.append(action)
            elif isinstance(action, Compute) and action.op is not Op.W:
                out.append(replace(action, op=Op.B) if action.op is Op.I else action)
        rows.append(out)
    return _rebuilt(table, "without split", rows)


def with_split(table: Table) -> Table:
    """Every B outside a pair becomes I and, right behind it, a W.

    Weight gradients run oldest first, so where the table's queue is not empty that W takes the head of the queue.
    """
    rows: list[list[Compute | Pair]] = []
    for row in table.actions:
        out: list[Compute | Pair] = []
        queue: deque[Compute] = deque()
        for action in row:
            if isinstance(action, Post):
                continue
            if isinstance(action, Pair) or action.op is Op.F:
                out.append(action)
                continue
            if action.op is not Op.W:
                out.append(replace(action, op=Op.I))
                queue.append(replace(action, op=Op.W))
            if action.op is not Op.I:
                out.append(queue.popleft())
        rows.append(out)
    return _rebuilt(table, "with split", rows)


def _rebuilt(table: Table, how: str, rows: Sequence[Sequence[Compute | Pair]]) -> Table:
    return with_transfers(f"{table.name} ({how})", table.micro_batches, table.rank_of, rows)
