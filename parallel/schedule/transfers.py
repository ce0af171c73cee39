"""Sends and receives for a schedule that is only compute so far: where each is posted, and in which batch.

The rule. Play the compute alone at unit costs. Every tensor that crosses ranks gets a *stamp*: the time it exists, its
phase (0 for a gradient made by a pair, 1 for all else), then its name, so that all stamps of a table stand in one line.
A send is posted right after the action that makes it; a receive right before the action during which its tensor comes
to exist (it hides behind that action), and if it comes between two actions, between them. What falls between the same
two actions is one batch, in order of stamps: the sends of the action before with the receives of the action after,
which is DeepSeek's way. Two exceptions cut such a batch, neither changes the order:

- A pair's gradients go first, in a batch of their own with the gradients other ranks' pairs make at the same time: a
  pair has its gradient before its attention weight gradient has run, but its activation only at its end, and the
  executor may post the first batch without waiting for what the second one needs.
- Receives that the next action does not need and that come later than those it does need form a batch of their own at
  the end, so that nothing waits for them.

Why nothing can block, even where batches of a rank run strictly in the order posted: every rank posts in order of
stamps. Take the smallest stamp that has not moved. Whatever stands before it on either side has moved, so both sides
are at the head of their ranks, and both are posted: the compute before them ends no later than the stamp's time, so it
needs only tensors of earlier times, which have moved, and whatever shares a batch with those is no later than the start
of the action that needs them, so their batches are complete.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from parallel.schedule.actions import Action, Compute, Op, Pair, Payload, Post, Table, Transfer
from parallel.schedule.boundary import Boundary, consumed, ends_of, parts, produced
from parallel.schedule.simulator import Costs, simulate

EARLY, LATE = 0, 1


class _Stamped(NamedTuple):
    time: float
    phase: int
    boundary: Boundary
    send: bool
    peer: int

    def transfer(self) -> Transfer:
        return Transfer(self.send, *self.boundary, peer=self.peer)


def with_transfers(
    name: str, micro_batches: int, rank_of: tuple[tuple[int, ...], ...], computes: Sequence[Sequence[Compute | Pair]]
) -> Table:
    """The table with these compute actions, in this order, and the posts they need.

    computes[rank]: that rank's compute actions, whose dependencies must allow them to run in this order.
    """
    stages = len(rank_of[0])
    bare = Table(name, len(computes), stages, micro_batches, rank_of, tuple(tuple(row) for row in computes))
    timed = simulate(bare, Costs(), "dependencies").timed
    # gaps[rank][i]: what is posted before action i; the last entry is posted at the end
    gaps: list[list[list[_Stamped]]] = [[[] for _ in range(len(row) + 1)] for row in timed]
    for source, row in enumerate(timed):
        for index, entry in enumerate(row):
            for part in parts(entry.action):
                boundary = produced(part, stages)
                if boundary is None:
                    continue
                target = ends_of(boundary, rank_of)[1]
                if target == source:
                    continue
                early = isinstance(entry.action, Pair) and boundary.payload is Payload.GRADIENT
                phase = EARLY if early else LATE
                gaps[source][index + 1].append(_Stamped(entry.end, phase, boundary, True, target))
                gap = bisect_right(timed[target], entry.end, key=lambda other: other.end)
                gaps[target][gap].append(_Stamped(entry.end, phase, boundary, False, source))
    actions = []
    for bare_row, rank_gaps in zip(bare.actions, gaps, strict=True):
        out: list[Action] = []
        for following, gap_items in zip([*bare_row, None], rank_gaps, strict=True):
            out += _batches(sorted(gap_items), following, stages)
            if following is not None:
                out.append(following)
        actions.append(tuple(out))
    return Table(name, bare.ranks, stages, micro_batches, rank_of, tuple(actions))


def _batches(items: list[_Stamped], following: Action | None, stages: int) -> list[Post]:
    """The batches of one gap: a pair's gradients first, what the following action must not wait for last."""
    # a gap's own sends have its smallest time, so a pair's gradients can only stand at its head
    sent = max((item.time for item in items if item.send and item.phase == EARLY), default=-1.0)
    head = sum(item.phase == EARLY and item.time <= sent for item in items)
    needs = {consumed(part, stages) for part in parts(following)} if isinstance(following, Compute | Pair) else set()
    tail = len(items)
    if any(not item.send and item.boundary in needs for item in items[head:]):
        last = max(item.time for item in items[head:] if item.send or item.boundary in needs)
        tail = head + sum(item.time <= last for item in items[head:])
    cut = (items[:head], items[head:tail], items[tail:])
    return [Post(tuple(item.transfer() for item in batch)) for batch in cut if batch]


def forward_only(table: Table) -> Table:
    """The same chunks in the same order without any backward: the table of an evaluation step."""
    rows: list[list[Compute | Pair]] = []
    for row in table.actions:
        found = (part for action in row if not isinstance(action, Post) for part in parts(action))
        rows.append([part for part in found if part.op is Op.F])
    return with_transfers(f"{table.name} (forward only)", table.micro_batches, table.rank_of, rows)
