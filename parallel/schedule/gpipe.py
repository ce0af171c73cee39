"""GPipe: every forward, then every backward (Huang et al. 2019, figure 2c). Holds all chunks at once."""

from __future__ import annotations

from parallel.schedule.actions import Compute, Op, Pair, Table
from parallel.schedule.placement import at_least, in_turn
from parallel.schedule.transfers import with_transfers


def gpipe(ranks: int, micro_batches: int) -> Table:
    """GPipe with stage s on rank s, one direction; backwards in the order of the forwards. Both numbers at least 1."""
    at_least("gpipe", ranks=(ranks, 1), micro_batches=(micro_batches, 1))
    computes: list[list[Compute | Pair]] = [
        [Compute(op, 0, stage, chunk) for op in (Op.F, Op.B) for chunk in range(micro_batches)]
        for stage in range(ranks)
    ]
    return with_transfers("gpipe", micro_batches, in_turn(ranks), computes)
