"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable

from parallel.schedule.actions import Table
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.dualpipev import dualpipev
from parallel.schedule.gpipe import gpipe
from parallel.schedule.interleaved import interleaved
from parallel.schedule.one_f_one_b import one_f_one_b
from parallel.schedule.zb1p import zb1p
from parallel.schedule.zbv import zbv

SCHEDULES: dict[str, Callable[..., Table]] = {
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "zbv": zbv,
    "zb1p": zb1p,
    "interleaved": interleaved,
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
}
# stages of one direction on each rank; interleaved alone leaves the choice
FIXED = {"dualpipe": 1, "dualpipev": 2, "zbv": 2, "zb1p": 1, "1f1b": 1, "gpipe": 1}
INTERLEAVED_DEFAULT = 2


def build(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> Table:
    """The table of schedule `name` over `ranks` pipeline ranks for `micro_batches` in all.

    stages_per_rank: only for `interleaved`, 2 when not given. Raises ValueError, one line with what was given and what
    is allowed, for an unknown name or illegal numbers.
    """
    held = _held(name, stages_per_rank)
    return SCHEDULES[name](ranks, micro_batches, *(() if name in FIXED else (held,)))


def stages_per_rank(name: str, given: int | None = None) -> int:
    """Stages of one direction that each rank holds (dualpipe: 1, and 1 of the other direction).

    Raises ValueError for an unknown name, for a number given where the schedule fixes it, and for one below 2.
    """
    return _held(name, given)


def _held(name: str, given: int | None) -> int:
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name}: unknown; allowed: {', '.join(SCHEDULES)}")
    if name in FIXED:
        if given is not None:
            raise ValueError(
                f"{name}: stages_per_rank={given}: must not be given, the schedule fixes it at {FIXED[name]} "
                "(only interleaved leaves the choice)"
            )
        return FIXED[name]
    if given is not None and given < 2:
        raise ValueError(f"{name}: stages_per_rank={given}: must be at least 2")
    return INTERLEAVED_DEFAULT if given is None else given
