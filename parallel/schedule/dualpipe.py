"""DualPipe: two pipelines over the same ranks, fed from both ends.

DeepSeek-V3 report 3.2.1 and github.com/deepseek-ai/DualPipe, whose order this is.

Rank r holds stage r of direction 0 and stage P-1-r of direction 1. Seen from the end that is nearer to a rank, its list
is eight steps; *near* is the direction that enters at that end, *far* the other one. With H = P/2, C = M/2 chunks in
each direction and h = ranks between this rank and its nearer end:

    1  2(H-h-1)   F near                          warm-up
    2  h+1        F near, F far
    3  H-h-1      I far, W, F far                 W fills what would be a bubble
    4  C-P+h+1    F near & B far, F far & B near  the steady state
    5  H-h-1      B far, F far & B near
    6  h+1        B far, B near                   I instead of B in the second half
    7  H-h-1      W, I near
    8  h+1        W                               drain

On the two middle ranks the first pair of step 4 runs as F, then B. Step 4 must not be negative anywhere: M >= 2P-2.

The short rule, for M < 2P-2: the table of 2P-2 micro-batches with only the last M/2 chunks of each direction, which
keep their places and are numbered from 0 again. The rest stays legal, because no chunk needs another; the last chunks
are those whose backward is split, which is what shortens a pipeline that is never full. No rank ever holds more chunks
than in the full table.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.transfers import with_transfers

NEAR, FAR = 0, 1


class Slot(NamedTuple):
    """A compute action before chunks are numbered. A W takes whatever its queue holds, so its side is not read."""

    op: Op
    side: int


Slots = list[tuple[Slot, ...]]


def dualpipe(ranks: int, micro_batches: int) -> Table:
    """DualPipe over `ranks` ranks, `micro_batches` over both directions together.

    Exactly DeepSeek's order for M >= 2P-2, the short rule (above) below that. Raises ValueError unless both numbers are
    even and at least 2.
    """
    if ranks < 2 or ranks % 2:
        raise ValueError(f"dualpipe: ranks={ranks}: must be an even number of at least 2 (ranks are mirrored)")
    if micro_batches < 2 or micro_batches % 2:
        raise ValueError(
            f"dualpipe: micro_batches={micro_batches}: must be an even number of at least 2 "
            "(half of them travel in each direction)"
        )
    chunks = micro_batches // 2
    half = ranks // 2
    full = max(chunks, ranks - 1)
    computes = []
    for rank in range(ranks):
        near = 0 if rank < half else 1
        stage_of = (rank, ranks - 1 - rank)
        places = ((near, stage_of[near]), (1 - near, stage_of[1 - near]))
        slots = eight_steps(half, min(rank, ranks - 1 - rank), full)
        computes.append(number(slots, places, keep=range(full - chunks, full)))
    rank_of = (tuple(range(ranks)), tuple(reversed(range(ranks))))
    return with_transfers("dualpipe", micro_batches, rank_of, computes)


def eight_steps(half: int, h: int, chunks: int) -> Slots:
    """One rank's list seen from its nearer end, unnumbered; a tuple of two is an overlapped pair (forward, backward).

    half: H. h: ranks between this one and its nearer end, below H. chunks: C, of each direction, at least 2H-1.
    """
    rest = half - h - 1
    f_near, f_far = Slot(Op.F, NEAR), Slot(Op.F, FAR)
    b_near, b_far = Slot(Op.B, NEAR), Slot(Op.B, FAR)
    i_near, i_far = Slot(Op.I, NEAR), Slot(Op.I, FAR)
    weights = (Slot(Op.W, NEAR),)

    warm_up: Slots = [(f_near,)] * (2 * rest)
    warm_up += [(f_near,), (f_far,)] * (h + 1)
    warm_up += [(i_far,), weights, (f_far,)] * rest
    steady: Slots = [(f_near, b_far), (f_far, b_near)] * (chunks - 2 * half + h + 1)
    if rest == 0 and steady:
        steady[:1] = [(f_near,), (b_far,)]
    steady += [(b_far,), (f_far, b_near)] * rest
    # DeepSeek's switch from B to I: before the far backward where h is odd, before the near one where it is even
    backwards = [i for _ in range(h + 1) for i in ((b_far, i_far), (b_near, i_near))]
    switch = 2 * ((h + 1) // 2) + (h % 2 == 0)
    drain: Slots = [(split if i >= switch else whole,) for i, (whole, split) in enumerate(backwards)]
    return warm_up + steady + drain + [weights, (i_near,)] * rest + [weights] * (h + 1)


def number(slots: Slots, places: tuple[tuple[int, int], ...], keep: range) -> list[Compute | Pair]:
    """Give slots their chunks: each side's forwards and backwards count up from 0, a W takes the head of the queue.

    places[side]: (direction, stage). keep: chunks of each side that stay, numbered from 0 again.
    """
    counts: dict[tuple[bool, int], int] = {}
    queue: deque[Compute | None] = deque()
    out: list[Compute | Pair] = []
    for slot in slots:
        kept: list[Compute] = []
        for op, side in slot:
            if op is Op.W:
                split = queue.popleft()
                if split is not None:
                    kept.append(Compute(Op.W, split.direction, split.stage, split.chunk))
                continue
            chunk = counts.get((op is Op.F, side), 0)
            counts[op is Op.F, side] = chunk + 1
            compute = Compute(op, *places[side], chunk - keep.start) if chunk in keep else None
            if op is Op.I:
                queue.append(compute)
            if compute is not None:
                kept.append(compute)
        if kept:
            out.append(Pair(*kept) if len(kept) == 2 else kept[0])
    return out
