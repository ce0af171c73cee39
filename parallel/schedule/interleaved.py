"""Interleaved 1F1B: v stages on each rank, so that filling the pipeline takes a v-th of the time.

Narayanan et al. 2021 (Megatron-LM, section 2.2.2). Stage s lives on rank s % P. Micro-batches go in groups of P: a rank
takes a group through its first stage, then through its second, and so on, before the next group; backwards likewise
from its last stage. Rank r runs (v-1)P + 2(P-1-r) forwards before its first backward, then one forward and one backward
in turn. Bubble (P-1)(F+B)/v, with F and B of all the rank's layers.

The group rule, for M that P does not divide: max(1, M // P) groups, as equal as can be, the larger ones first, the
largest in P's place in the warm-up. (Torch's interleaved schedule does the same where all groups are equal.) Groups
above P cost memory, less than twice that of P, but fill the pipeline; a single group below P cannot.
"""

from __future__ import annotations

from itertools import pairwise

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.placement import at_least, in_turn
from parallel.schedule.transfers import with_transfers


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Table:
    """Interleaved 1F1B; `ranks` and `micro_batches` at least 1, `stages_per_rank` at least 2."""
    at_least("interleaved", ranks=(ranks, 1), micro_batches=(micro_batches, 1), stages_per_rank=(stages_per_rank, 2))
    groups = _groups(ranks, micro_batches)
    computes: list[list[Compute | Pair]] = []
    for rank in range(ranks):
        stages = range(rank, ranks * stages_per_rank, ranks)
        forwards = [Compute(Op.F, 0, stage, chunk) for group in groups for stage in stages for chunk in group]
        backwards = [Compute(Op.B, 0, stage, chunk) for group in groups for stage in stages[::-1] for chunk in group]
        warm_up = min((stages_per_rank - 1) * len(groups[0]) + 2 * (ranks - 1 - rank), len(forwards))
        row: list[Compute | Pair] = [*forwards[:warm_up]]
        for step, backward in enumerate(backwards):
            row += [*forwards[warm_up + step : warm_up + step + 1], backward]
        computes.append(row)
    return with_transfers("interleaved", micro_batches, in_turn(ranks, stages_per_rank), computes)


def _groups(ranks: int, micro_batches: int) -> list[range]:
    """The chunks of each group, by the group rule."""
    count = max(1, micro_batches // ranks)
    size, larger = divmod(micro_batches, count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
