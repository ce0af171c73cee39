"""1F1B: after a warm-up as deep as the stages that follow, one forward and one backward in turn.

Narayanan et al. 2021 (Megatron-LM, section 2.2.1). Bubble (P-1)(F+B), the same as GPipe's; rank r holds at most P-r
chunks.
"""

from __future__ import annotations

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.placement import at_least, in_turn
from parallel.schedule.transfers import with_transfers


def one_f_one_b(ranks: int, micro_batches: int) -> Table:
    """1F1B with stage s on rank s, one direction. Both numbers at least 1."""
    at_least("1f1b", ranks=(ranks, 1), micro_batches=(micro_batches, 1))
    computes: list[list[Compute | Pair]] = []
    for stage in range(ranks):
        warm_up = min(ranks - stage - 1, micro_batches)
        row: list[Compute | Pair] = [Compute(Op.F, 0, stage, chunk) for chunk in range(warm_up)]
        for chunk in range(micro_batches):
            if warm_up + chunk < micro_batches:
                row.append(Compute(Op.F, 0, stage, warm_up + chunk))
            row.append(Compute(Op.B, 0, stage, chunk))
        computes.append(row)
    return with_transfers("1f1b", micro_batches, in_turn(ranks), computes)
