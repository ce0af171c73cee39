"""Is a table legal? Counts, order, the weight-gradient queue, transfers, and deadlock under both kinds of transport."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from parallel.schedule.actions import Action, Compute, Op, Pair, Payload, Post, Table, Transfer, flatten
from parallel.schedule.boundary import Boundary, boundary_of, consumed, ends_of, parts, produced
from parallel.schedule.simulator import Costs, Deadlock, simulate


class Reason(StrEnum):
    """Why a table is refused."""

    SHAPE = "the table contradicts its own header"
    PLACEMENT = "the stage does not live on this rank"
    MISSING = "an action is missing"
    REPEATED = "an action appears more than once"
    PAIR = "a pair must be a forward and a full backward of different chunks"
    ORDER = "an action comes before what it needs"
    QUEUE = "W does not find its chunk at the head of the weight-gradient queue"
    PEER = "the transfer does not connect the ranks of its two stages"
    UNMATCHED = "a transfer has no counterpart"
    SEND_EARLY = "a send is posted before its tensor is made"
    RECEIVE_LATE = "a receive is posted after the action that needs it"
    CROSSED = "sends and receives between two ranks are posted in different orders"
    DEADLOCK_GLOO = "deadlock in gloo mode"
    DEADLOCK_NCCL = "deadlock in nccl mode"


class ScheduleError(ValueError):
    """A table that must not run: `reason`, the `rank` and the `action` (or transfer) where it shows."""

    def __init__(self, reason: Reason, rank: int | None, action: Action | Transfer | None, detail: str = "") -> None:
        self.reason, self.rank, self.action = reason, rank, action
        where = "" if rank is None else f"rank {rank}: "
        what = "" if action is None else f" at {action}"
        super().__init__(f"{where}{reason}{what}" + (f" ({detail})" if detail else ""))


@dataclass(frozen=True)
class Report:
    """Figures of a legal table, one entry per rank.

    peak_chunks: most chunks live at once, a chunk being live from its F until its B or W (in a pair, the forward's
    chunk is there before the backward's goes). queue_depth: most weight gradients queued at once. overlap_share: part
    of the rank's forwards that run inside an `F&B` pair.
    """

    peak_chunks: tuple[int, ...]
    queue_depth: tuple[int, ...]
    overlap_share: tuple[float, ...]


def check(table: Table, forward_only: bool = False) -> Report:
    """Figures of `table` if it is legal, else `ScheduleError`. `forward_only`: no chunk may have any backward."""
    _check_counts(table, forward_only)
    _check_order(table)
    _check_transfers(table)
    modes: tuple[tuple[Literal["gloo", "nccl"], Reason], ...] = (
        ("gloo", Reason.DEADLOCK_GLOO),
        ("nccl", Reason.DEADLOCK_NCCL),
    )
    for mode, reason in modes:
        try:
            simulate(table, Costs(), mode)
        except Deadlock as error:
            rank, action = next(iter(error.waiting.items()))
            detail = str(error)
            if rank in error.blocked:
                detail += f"; rank {rank}'s transfers stop at the batch {error.blocked[rank]}"
            raise ScheduleError(reason, rank, action, detail) from None
    return _report(table, forward_only)


def _check_counts(table: Table, forward_only: bool) -> None:
    if len(table.actions) != table.ranks or any(len(row) != table.stages for row in table.rank_of):
        raise ScheduleError(Reason.SHAPE, None, None, f"{len(table.actions)} lists, {table.ranks} ranks")
    seen: Counter[Compute] = Counter()
    chunks = [0] * table.directions
    for rank, row in enumerate(table.actions):
        for action in row:
            if isinstance(action, Pair):
                f, b = action.forward, action.backward
                same = (f.direction, f.chunk) == (b.direction, b.chunk)
                if f.op is not Op.F or b.op is not Op.B or same:
                    raise ScheduleError(Reason.PAIR, rank, action)
        for compute in flatten(row):
            if table.rank_of[compute.direction][compute.stage] != rank:
                raise ScheduleError(Reason.PLACEMENT, rank, compute)
            if forward_only and compute.op is not Op.F:
                raise ScheduleError(Reason.SHAPE, rank, compute, "the table must be forward only")
            seen[compute] += 1
            if seen[compute] > 1:
                raise ScheduleError(Reason.REPEATED, rank, compute)
            chunks[compute.direction] = max(chunks[compute.direction], compute.chunk + 1)
    if sum(chunks) != table.micro_batches:
        raise ScheduleError(Reason.SHAPE, None, None, f"{chunks} chunks, {table.micro_batches} micro-batches")
    for direction, count in enumerate(chunks):
        for stage in range(table.stages):
            rank = table.rank_of[direction][stage]
            for chunk in range(count):
                have = {op for op in Op if seen[Compute(op, direction, stage, chunk)]}
                _check_chunk(rank, direction, stage, chunk, have, forward_only)


def _check_chunk(rank: int, direction: int, stage: int, chunk: int, have: set[Op], forward_only: bool) -> None:
    def missing(op: Op, detail: str = "") -> ScheduleError:
        return ScheduleError(Reason.MISSING, rank, Compute(op, direction, stage, chunk), detail)

    if Op.F not in have:
        raise missing(Op.F)
    if forward_only:
        return
    if Op.B in have and have & {Op.I, Op.W}:
        both = Compute(Op.B, direction, stage, chunk)
        raise ScheduleError(Reason.REPEATED, rank, both, "the chunk has a full backward and a split one")
    if Op.B not in have and Op.I not in have:
        raise missing(Op.I if Op.W in have else Op.B, "no B and no I")
    if Op.I in have and Op.W not in have:
        raise missing(Op.W)


def _check_order(table: Table) -> None:
    """F before B or I on its rank; W at the head of the queue; hand-overs inside a rank after they are made."""
    for rank, row in enumerate(table.actions):
        done: set[Compute] = set()
        made: set[Boundary] = set()
        queue: deque[tuple[int, int, int]] = deque()
        for action in row:
            if isinstance(action, Post):
                continue
            for part in parts(action):
                name = (part.direction, part.stage, part.chunk)
                if part.op in (Op.B, Op.I) and Compute(Op.F, *name) not in done:
                    raise ScheduleError(Reason.ORDER, rank, part, "its forward has not run")
                if part.op is Op.W and (not queue or queue.popleft() != name):
                    raise ScheduleError(Reason.QUEUE, rank, part)
                needed = consumed(part, table.stages)
                if needed and ends_of(needed, table.rank_of) == (rank, rank) and needed not in made:
                    raise ScheduleError(Reason.ORDER, rank, part, f"{needed} has not been made")
            for part in parts(action):
                done.add(part)
                if part.op is Op.I:
                    queue.append((part.direction, part.stage, part.chunk))
                handed = produced(part, table.stages)
                if handed:
                    made.add(handed)


def _check_transfers(table: Table) -> None:
    """Every tensor that crosses ranks is sent once and received once, in the same order on both sides, in time."""
    lanes: dict[tuple[int, int, bool], list[Transfer]] = defaultdict(list)
    sides: dict[tuple[Boundary, bool], Transfer] = {}
    for rank, row in enumerate(table.actions):
        made: set[Boundary] = set()
        used: set[Boundary] = set()
        received: set[Boundary] = set()
        for action in row:
            if isinstance(action, Post):
                for transfer in action.transfers:
                    boundary = boundary_of(transfer)
                    ends = _valid_ends(boundary, table)
                    if ends is None or ends != ((rank, transfer.peer) if transfer.send else (transfer.peer, rank)):
                        raise ScheduleError(Reason.PEER, rank, transfer)
                    if (boundary, transfer.send) in sides:
                        raise ScheduleError(Reason.REPEATED, rank, transfer)
                    if transfer.send and boundary not in made:
                        raise ScheduleError(Reason.SEND_EARLY, rank, transfer)
                    if not transfer.send and boundary in used:
                        raise ScheduleError(Reason.RECEIVE_LATE, rank, transfer)
                    sides[boundary, transfer.send] = transfer
                    lanes[*ends, transfer.send].append(transfer)
                    received.add(boundary)
                continue
            for part in parts(action):
                needed, handed = consumed(part, table.stages), produced(part, table.stages)
                if needed:
                    used.add(needed)
                if handed:
                    made.add(handed)
        for boundary in sorted(used - received):
            if ends_of(boundary, table.rank_of)[0] != rank:
                raise ScheduleError(Reason.UNMATCHED, rank, None, f"{boundary} is never received")
    for (boundary, send), transfer in sides.items():
        if (boundary, not send) not in sides:
            holder = ends_of(boundary, table.rank_of)[0 if send else 1]
            raise ScheduleError(Reason.UNMATCHED, holder, transfer)
    for (source, target, send), sent in lanes.items():
        if send:
            for ours, theirs in zip(sent, lanes[source, target, False], strict=True):
                if boundary_of(ours) != boundary_of(theirs):
                    raise ScheduleError(Reason.CROSSED, source, ours, f"rank {target} receives {theirs} at that place")


def _valid_ends(boundary: Boundary, table: Table) -> tuple[int, int] | None:
    """Ranks of a boundary, None when no such boundary exists or it stays inside one rank."""
    lowest, highest = (1, table.stages - 1) if boundary.payload is Payload.ACTIVATION else (0, table.stages - 2)
    if not (0 <= boundary.direction < table.directions and lowest <= boundary.stage <= highest):
        return None
    source, target = ends_of(boundary, table.rank_of)
    return (source, target) if source != target else None


def _report(table: Table, forward_only: bool) -> Report:
    peaks, depths, shares = [], [], []
    for row in table.actions:
        live = peak = queued = depth = forwards = overlapped = 0
        for action in row:
            if isinstance(action, Post):
                continue
            ops = [part.op for part in parts(action)]
            forwards += ops.count(Op.F)
            overlapped += isinstance(action, Pair)
            live += ops.count(Op.F)
            queued += ops.count(Op.I) - ops.count(Op.W)
            peak, depth = max(peak, live), max(depth, queued)
            live -= ops.count(Op.B) + ops.count(Op.W) + (ops.count(Op.F) if forward_only else 0)
        peaks.append(peak)
        depths.append(depth)
        shares.append(overlapped / forwards)
    return Report(tuple(peaks), tuple(depths), tuple(shares))
