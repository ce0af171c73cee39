"""ZB1P: 1F1B with the backward split, the weight gradients filling what was idle at the end.

Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), ZB-H1, the schedule that keeps 1F1B's memory:
rank r warms up with P-1-r forwards, then runs F and I in turn, and from its r-th backward on one W after every I. So
rank r holds back r weight gradients, and every rank holds at most P chunks, what 1F1B holds on its first. Bubble
(P-1)(F+B-2W), B being the full backward, so I = B-W.

Every number of micro-batches fits as it is: below P a rank warms up with what there is and drains the rest of its W at
the end (the short rule of 1F1B).
"""

from __future__ import annotations

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.placement import at_least, in_turn
from parallel.schedule.transfers import with_transfers


def zb1p(ranks: int, micro_batches: int) -> Table:
    """ZB-H1 with stage s on rank s. Both numbers at least 1."""
    at_least("zb1p", ranks=(ranks, 1), micro_batches=(micro_batches, 1))
    computes: list[list[Compute | Pair]] = []
    for rank in range(ranks):
        warm_up = min(ranks - 1 - rank, micro_batches)
        row: list[Compute | Pair] = [Compute(Op.F, 0, rank, chunk) for chunk in range(warm_up)]
        for chunk in range(micro_batches):
            if warm_up + chunk < micro_batches:
                row.append(Compute(Op.F, 0, rank, warm_up + chunk))
            row.append(Compute(Op.I, 0, rank, chunk))
            if chunk >= rank:
                row.append(Compute(Op.W, 0, rank, chunk - rank))
        row += [Compute(Op.W, 0, rank, chunk) for chunk in range(max(micro_batches - rank, 0), micro_batches)]
        computes.append(row)
    return with_transfers("zb1p", micro_batches, in_turn(ranks), computes)
