"""Sends and receives for a schedule that is only compute so far: where each is posted, and in which batch.

The rule. Play the compute alone at unit costs. Every tensor that crosses ranks gets a *stamp*: the time it exists,
then its name, so that all stamps of a table stand in one line. A send is posted right after the action that makes it;
a receive right before the action during which its tensor comes to exist (it hides behind that action), and if it comes
between two actions, between them. What falls between the same two actions is one batch, in order of stamps: the sends
of the action before with the receives of the action after, which is DeepSeek's way. Receives that the next action does
not need and that come later than those it does need form a second batch, so that nothing waits for them.

Why nothing can block, even where batches of a rank run strictly in the order posted: every rank posts in order of
stamps, so the two sides of the smallest stamp that has not moved are both at the head of their ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from parallel.schedule.actions import Action, Compute, Op, Pair, Post, Table, Transfer
from parallel.schedule.boundary import Boundary, consumed, ends_of, parts, produced
from parallel.schedule.simulator import Costs, simulate


class _Stamped(NamedTuple):
    time: float
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
                gaps[source][index + 1].append(_Stamped(entry.end, boundary, True, target))
                gap = bisect_right(timed[target], entry.end, key=lambda other: other.end)
                gaps[target][gap].append(_Stamped(entry.end, boundary, False, source))
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
    """One batch, or two where the following action must not wait for receives stamped later than its own."""
    needs = {consumed(part, stages) for part in parts(following)} if isinstance(following, Compute | Pair) else set()
    first = len(items)
    if any(not item.send and item.boundary in needs for item in items):
        last = max(item.time for item in items if item.send or item.boundary in needs)
        # equal times stay together, or the line of stamps would differ from one rank to the next
        first = sum(item.time <= last for item in items)
    return [Post(tuple(item.transfer() for item in batch)) for batch in (items[:first], items[first:]) if batch]


def forward_only(table: Table) -> Table:
    """The same chunks in the same order without any backward: the table of an evaluation step."""
    rows: list[list[Compute | Pair]] = []
    for row in table.actions:
        found = (part for action in row if not isinstance(action, Post) for part in parts(action))
        rows.append([part for part in found if part.op is Op.F])
    return with_transfers(f"{table.name} (forward only)", table.micro_batches, table.rank_of, rows)
