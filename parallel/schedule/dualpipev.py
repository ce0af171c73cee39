"""DualPipeV: DualPipe cut in half, one direction in the shape of a V, parameters once.

github.com/deepseek-ai/DualPipe (dualpipev.py), after the "cut-in-half" of Qi et al. 2025. Rank r holds stage r and
stage 2P-1-r. P ranks of it are the first P ranks of DualPipe over 2P ranks with 2M micro-batches: the near direction
becomes the way down, the far one the way up, the same eight steps with H = P, h = r and C = M, and the special first
pair on the last rank, where the V turns and a tensor is handed over without a transfer.

The short rule, for M < 2P-1, is DualPipe's: the table of 2P-1 micro-batches with only the last M chunks, numbered from
0 again.
"""

from __future__ import annotations

from parallel.schedule.actions import Table
from parallel.schedule.dualpipe import eight_steps, number
from parallel.schedule.placement import at_least, v_shape
from parallel.schedule.transfers import with_transfers


def dualpipev(ranks: int, micro_batches: int) -> Table:
    """DualPipeV over `ranks` ranks and 2 * ranks stages. Both numbers at least 1."""
    at_least("dualpipev", ranks=(ranks, 1), micro_batches=(micro_batches, 1))
    full = max(micro_batches, 2 * ranks - 1)
    computes = [
        number(
            eight_steps(ranks, rank, full),
            ((0, rank), (0, 2 * ranks - 1 - rank)),
            keep=range(full - micro_batches, full),
        )
        for rank in range(ranks)
    ]
    return with_transfers("dualpipev", micro_batches, v_shape(ranks), computes)
