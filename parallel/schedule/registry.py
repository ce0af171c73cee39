"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable

from parallel.schedule.actions import Table
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.gpipe import gpipe
from parallel.schedule.one_f_one_b import one_f_one_b

SCHEDULES: dict[str, Callable[[int, int], Table]] = {"dualpipe": dualpipe, "1f1b": one_f_one_b, "gpipe": gpipe}


def build(name: str, stages: int, micro_batches: int) -> Table:
    """The table of schedule `name` for `stages` pipeline stages of each direction and `micro_batches` in all.

    Raises ValueError, one line with what was given and what is allowed, for an unknown name or illegal numbers.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name}: unknown; allowed: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](stages, micro_batches)
