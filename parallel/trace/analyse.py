"""How well a run hid its communication: busy, exposed and idle time, what hides what, and the order of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from parallel.pipeline.contract import DEFAULT_ORDER, PUBLISHED_ORDER
from parallel.trace.intervals import Intervals, both, intervals, total, where, without
from parallel.trace.lanes import Lanes

ORDERS = {"published": PUBLISHED_ORDER, "default": DEFAULT_ORDER}


@dataclass(frozen=True)
class Figures:
    """One rank, in milliseconds.

    compute, all_to_all: busy time, the union of the intervals; all_to_all includes the time one is waited for.
    overlapped: both. exposed: an all-to-all runs or is waited for and nothing computes. idle: neither. bubble: span
    less the rank's actions, which do not count while they wait for another stage (None without actions).
    """

    rank: int
    source: str
    span: float
    compute: float
    all_to_all: float
    overlapped: float
    exposed: float
    idle: float
    bubble: float | None

    @property
    def exposed_of_all_to_all(self) -> float:
        return self.exposed / self.all_to_all if self.all_to_all else 0.0

    @property
    def exposed_of_span(self) -> float:
        return self.exposed / self.span if self.span else 0.0


@dataclass(frozen=True)
class Hidden:
    """One kind of all-to-all, means over its runs in milliseconds; behind: step -> time the all-to-all overlaps it."""

    name: str
    count: int
    busy: float
    exposed: float
    behind: dict[str, float]


@dataclass(frozen=True)
class Round:
    """The order of the steps of one layer pair. equals: the declared orders it follows, steps that its layers lack left
    out. times: how often it occurs."""

    order: tuple[str, ...]
    equals: tuple[str, ...]
    times: int


def windows(ranks: Sequence[Lanes]) -> dict[int, Intervals]:
    """The time that is analysed, by rank: passes through the table from the first rank's start to the last one's end
    where they are marked; else a pipeline's first start to its last end; else each rank's own."""
    runs = max((len(lanes.runs) for lanes in ranks), default=0)
    if runs:
        passes = [[lanes.runs[i] for lanes in ranks if i < len(lanes.runs)] for i in range(runs)]
        common = intervals((min(start for start, _ in one), max(end for _, end in one)) for one in passes)
        return {lanes.rank: common for lanes in ranks}
    extents = {lanes.rank: lanes.extent() for lanes in ranks}
    known = [extent for extent in extents.values() if extent is not None]
    if any(lanes.at_work is not None for lanes in ranks):
        common = intervals([(min(start for start, _ in known), max(end for _, end in known))] if known else [])
        return {lanes.rank: common for lanes in ranks}
    return {rank: intervals([] if extent is None else [extent]) for rank, extent in extents.items()}


def figures(lanes: Lanes, window: Intervals) -> Figures:
    """The figures of one rank within `window`."""
    compute, moving = both(lanes.all_compute(), window), both(lanes.all_to_all_or_wait(), window)
    at_work = None if lanes.at_work is None else both(lanes.at_work, window)
    span = total(window)
    return Figures(
        rank=lanes.rank,
        source=lanes.source,
        span=span / 1e3,
        compute=total(compute) / 1e3,
        all_to_all=total(moving) / 1e3,
        overlapped=total(both(compute, moving)) / 1e3,
        exposed=total(without(moving, compute)) / 1e3,
        idle=total(where(lambda w, c, m: w & ~c & ~m, window, compute, moving)) / 1e3,
        bubble=None if at_work is None else (span - total(at_work)) / 1e3,
    )


def hidden(ranks: Sequence[Lanes]) -> list[Hidden]:
    """What each kind of all-to-all overlaps, over all ranks, in the order of the published list."""
    found = []
    for name in sorted({name for lanes in ranks for name in lanes.all_to_all}, key=_place):
        count = sum(lanes.occurrences.get(name, 0) for lanes in ranks)
        busy = exposed = 0.0
        behind: dict[str, float] = {}
        for lanes in ranks:
            if name in lanes.all_to_all:
                moving = lanes.all_to_all[name]
                busy += total(moving)
                exposed += total(without(moving, lanes.all_compute()))
                for step, times in lanes.compute.items():
                    behind[step] = behind.get(step, 0.0) + total(both(moving, times))
        scale = 1e3 * count
        longest = sorted(behind.items(), key=lambda item: -item[1])
        covered = {step: time / scale for step, time in longest if time > 0}
        found.append(Hidden(name, count, busy / scale, exposed / scale, covered))
    return found


def rounds(ranks: Sequence[Lanes]) -> list[Round]:
    """The orders of steps that occur in F&B pairs, layer pair by layer pair, most frequent first."""
    found = Counter(one for lanes in ranks for steps in lanes.steps for one in split_rounds(steps))
    return [Round(order, _equals(order), times) for order, times in found.most_common()]


def split_rounds(steps: Sequence[str]) -> list[tuple[str, ...]]:
    """A pair's steps, cut where the next layer pair begins.

    By a declared order if that takes no more rounds than its most frequent step occurs, else wherever a step comes
    again. Steps that belong to no layer (embedding, head) are left out; so are rounds of one direction only.
    """
    named = [step for step in steps if step in PUBLISHED_ORDER]
    least = max(Counter(named).values(), default=0)
    cut = next(
        (found for found in (_cut(named, order) for order in ORDERS.values()) if len(found) == least), _cut(named, None)
    )
    return [one for one in cut if any("(F)" in step for step in one) and any("(F)" not in step for step in one)]


def _cut(steps: Sequence[str], order: Sequence[str] | None) -> list[tuple[str, ...]]:
    found: list[list[str]] = []
    for step in steps:
        again = not found or (step in found[-1] if order is None else order.index(step) <= order.index(found[-1][-1]))
        if again:
            found.append([])
        found[-1].append(step)
    return [tuple(one) for one in found]


def _equals(order: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name, full in ORDERS.items() if order == tuple(step for step in full if step in order))


def _place(step: str) -> tuple[int, str]:
    return (PUBLISHED_ORDER.index(step) if step in PUBLISHED_ORDER else len(PUBLISHED_ORDER), step)


def summary(ranks: Sequence[Figures], hides: Sequence[Hidden], orders: Sequence[Round], skipped: int) -> dict[str, Any]:
    """The last line of the command: means over ranks, the worst rank, and all of the tables. Milliseconds."""
    worst = max(ranks, key=lambda one: one.exposed)
    bubbles = [one.bubble for one in ranks if one.bubble is not None]
    moved = sum(one.all_to_all for one in ranks)
    return {
        "ranks": len(ranks),
        "span_ms": _round(mean(one.span for one in ranks)),
        "compute_ms": _round(mean(one.compute for one in ranks)),
        "all_to_all_ms": _round(moved / len(ranks)),
        "overlapped_ms": _round(mean(one.overlapped for one in ranks)),
        "exposed_ms": _round(mean(one.exposed for one in ranks)),
        "exposed_share_of_all_to_all": _round(sum(one.exposed for one in ranks) / moved if moved else 0.0),
        "exposed_share_of_span": _round(mean(one.exposed_of_span for one in ranks)),
        "idle_ms": _round(mean(one.idle for one in ranks)),
        "bubble_ms": _round(mean(bubbles)) if bubbles else None,
        "worst_rank": worst.rank,
        "worst_exposed_ms": _round(worst.exposed),
        "orders": [{"order": " ".join(one.order), "equals": list(one.equals), "times": one.times} for one in orders],
        "hidden": [
            {
                "all_to_all": one.name,
                "count": one.count,
                "mean_ms": _round(one.busy),
                "exposed_ms": _round(one.exposed),
                "behind_ms": {step: _round(time) for step, time in one.behind.items()},
            }
            for one in hides
        ],
        "skipped_events": skipped,
        "by_rank": [
            {
                "rank": one.rank,
                "span_ms": _round(one.span),
                "compute_ms": _round(one.compute),
                "all_to_all_ms": _round(one.all_to_all),
                "exposed_ms": _round(one.exposed),
                "idle_ms": _round(one.idle),
                "bubble_ms": None if one.bubble is None else _round(one.bubble),
            }
            for one in ranks
        ],
    }


def _round(value: float) -> float:
    return round(value, 6)
