"""Which owner gets which rows: a pure function of the tensors' shapes and the number of owners.

Rows go in units of 128, so that 128x128 blocks stay whole and an owner can quantise what it owns; a tensor shorter
than that, and the remainder of a longer one, is one unit. Each owner gets a contiguous run of units in canonical
order, and the largest run is as small as a contiguous split allows, since buffers are padded to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ROW_UNIT = 128


@dataclass(frozen=True)
class Rows:
    """Rows [first, last) of the tensor at `index` in the list that was assigned."""

    index: int
    first: int
    last: int


def canonical_key(name: str) -> tuple[object, ...]:
    """Sort key of canonical names: numbers compare as numbers (`layers.9` before `layers.10`)."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))


def assign_rows(shapes: Sequence[tuple[int, int]], owners: int, unit: int = ROW_UNIT) -> list[list[Rows]]:
    """Split tensors of `shapes` (rows, columns) over `owners`; returns for each owner its row ranges in order.

    Every row is in exactly one range. The largest owner has less than one unit more than the even share.
    """
    units: list[tuple[Rows, int]] = []
    for index, (rows, columns) in enumerate(shapes):
        if rows < 1 or columns < 1:
            raise ValueError(f"tensor {index} has shape ({rows}, {columns}); both must be at least 1")
        for first in range(0, rows, unit):
            last = min(first + unit, rows)
            units.append((Rows(index, first, last), (last - first) * columns))
    sizes = [size for _, size in units]
    capacity = _smallest_capacity(sizes, owners)
    assigned: list[list[Rows]] = [[] for _ in range(owners)]
    owner = load = 0
    for rows_, size in units:
        if load + size > capacity:
            owner, load = owner + 1, 0
        load += size
        run = assigned[owner]
        if run and run[-1].index == rows_.index:
            run[-1] = Rows(rows_.index, run[-1].first, rows_.last)
        else:
            run.append(rows_)
    return assigned


def _smallest_capacity(sizes: Sequence[int], owners: int) -> int:
    """The smallest largest run of a split of `sizes` into at most `owners` contiguous runs (bisection over greedy
    filling)."""
    low, high = max([*sizes, -(-sum(sizes) // owners)]), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        runs, load = 1, 0
        for size in sizes:
            if load + size > middle:
                runs, load = runs + 1, 0
            load += size
        if runs <= owners:
            high = middle
        else:
            low = middle + 1
    return high
