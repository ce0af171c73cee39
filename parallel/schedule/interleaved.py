"""Interleaved 1F1B: v stages on each rank, so that filling the pipeline takes a v-th of the time.

Narayanan et al. 2021 (Megatron-LM, section 2.2.2). Stage s lives on rank s % P. Micro-batches go in groups of P: a rank
takes a group through its first stage, then through its second, and so on, before the next group; backwards likewise
from its last stage. Rank r runs (v-1)P + 2(P-1-r) forwards before its first backward, then one forward and one backward
in turn. Bubble (P-1)(F+B)/v, with F and B of all the rank's layers.

The group rule, for M that P does not divide: the table of the next multiple of P with only the last M chunks, numbered
from 0 again. It stays legal because no chunk needs another, and the short group comes first, where the pipeline is
filling anyway.
"""

from __future__ import annotations

from dataclasses import replace

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.placement import at_least, in_turn
from parallel.schedule.transfers import with_transfers


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Table:
    """Interleaved 1F1B; `ranks` and `micro_batches` at least 1, `stages_per_rank` at least 2."""
    at_least("interleaved", ranks=(ranks, 1), micro_batches=(micro_batches, 1), stages_per_rank=(stages_per_rank, 2))
    full = -(-micro_batches // ranks) * ranks
    skip = full - micro_batches
    computes: list[list[Compute | Pair]] = []
    for rank in range(ranks):
        row = _one_rank(rank, ranks, full, stages_per_rank)
        computes.append([replace(c, chunk=c.chunk - skip) for c in row if c.chunk >= skip])
    return with_transfers("interleaved", micro_batches, in_turn(ranks, stages_per_rank), computes)


def _one_rank(rank: int, ranks: int, micro_batches: int, held: int) -> list[Compute]:
    """One rank's list for `micro_batches` divisible by `ranks`; `held`: stages on the rank."""
    total = held * micro_batches
    warm_up = min((held - 1) * ranks + 2 * (ranks - 1 - rank), total)

    def nth(op: Op, step: int) -> Compute:
        place = (step // ranks) % held
        place = place if op is Op.F else held - 1 - place
        return Compute(op, 0, place * ranks + rank, step // (ranks * held) * ranks + step % ranks)

    row = [nth(Op.F, step) for step in range(warm_up)]
    for step in range(total):
        if warm_up + step < total:
            row.append(nth(Op.F, warm_up + step))
        row.append(nth(Op.B, step))
    return row
