"""ZBV: two stages on each rank in the shape of a V, every backward split, no bubble where F = I = W.

Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), section 6. Rank r holds stage r (*near*) and
stage 2P-1-r (*far*); the loss of a micro-batch is known on rank 0, where it entered. One rank's list:

    1  2(P-r)-1   F near                              warm-up
    2  r          F far, F near
    3  P-r        F far, I far, W
    4  M-2P+r+1   F near, I near, W, F far, I far, W  the steady state
    5  P-r-1      I near, W, F far, I far, W          the same without new chunks
    6  r          I near, I far                       drain
    7  P-r        I near, W
    8  2r         W

The publication names which W a slot of steps 7 and 8 takes (near ones first); here every W takes the oldest of the
queue. All are equally long, so the times are the same. Peak: 2P chunks of half a rank's layers, the memory of 1F1B. "No
bubble" counts from a rank's own first action to its own last; ranks start and end up to P-1 half-size forwards apart.

The short rule, for M < 2P-1: the table of 2P-1 micro-batches with only the first M chunks. It stays legal because no
chunk needs another.
"""

from __future__ import annotations

from parallel.schedule.actions import Op, Table
from parallel.schedule.dualpipe import FAR, NEAR, Slot, Slots, number
from parallel.schedule.placement import at_least, v_shape
from parallel.schedule.transfers import with_transfers


def zbv(ranks: int, micro_batches: int) -> Table:
    """ZBV over `ranks` ranks and 2 * ranks stages. Both numbers at least 1."""
    at_least("zbv", ranks=(ranks, 1), micro_batches=(micro_batches, 1))
    full = max(micro_batches, 2 * ranks - 1)
    computes = [
        number(_steps(ranks, rank, full), ((0, rank), (0, 2 * ranks - 1 - rank)), keep=range(micro_batches))
        for rank in range(ranks)
    ]
    return with_transfers("zbv", micro_batches, v_shape(ranks), computes)


def _steps(ranks: int, rank: int, chunks: int) -> Slots:
    """One rank's list before chunks are numbered; `chunks` at least 2P-1."""
    f_near, f_far = (Slot(Op.F, NEAR),), (Slot(Op.F, FAR),)
    i_near, i_far = (Slot(Op.I, NEAR),), (Slot(Op.I, FAR),)
    weights: tuple[Slot, ...] = (Slot(Op.W, NEAR),)
    warm_up: Slots = [f_near] * (2 * (ranks - rank) - 1)
    warm_up += [f_far, f_near] * rank
    warm_up += [f_far, i_far, weights] * (ranks - rank)
    steady: Slots = [f_near, i_near, weights, f_far, i_far, weights] * (chunks - 2 * ranks + rank + 1)
    steady += [i_near, weights, f_far, i_far, weights] * (ranks - rank - 1)
    drain: Slots = [i_near, i_far] * rank + [i_near, weights] * (ranks - rank)
    return warm_up + steady + drain + [weights] * (2 * rank)
