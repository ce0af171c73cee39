"""Sets of time as arrays [n, 2] of (start, end): union, length, and where a rule over several sets holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Intervals = NDArray[np.float64]
Flags = NDArray[np.bool_]


def intervals(pairs: Iterable[tuple[float, float]]) -> Intervals:
    """(start, end) pairs, in any order and overlapping as they may, as disjoint intervals in order."""
    return union(np.array(list(pairs), dtype=np.float64).reshape(-1, 2))


def union(*sets: Intervals) -> Intervals:
    """Everything that lies in any of `sets`: disjoint, in order, nothing of zero length."""
    joined = np.concatenate([np.asarray(one, dtype=np.float64).reshape(-1, 2) for one in sets] or [np.empty((0, 2))])
    joined = joined[joined[:, 1] > joined[:, 0]]
    if not len(joined):
        return joined
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    reached = np.maximum.accumulate(joined[:, 1])
    first = np.concatenate([[True], joined[1:, 0] > reached[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([joined[first, 0], reached[last]], axis=1)


def total(disjoint: Intervals) -> float:
    """The length of disjoint intervals."""
    return float((disjoint[:, 1] - disjoint[:, 0]).sum())


def where(rule: Callable[..., Flags], *disjoint: Intervals) -> Intervals:
    """The time in which `rule` holds; it gets one array per set: whether that set covers a stretch of time."""
    points = np.unique(np.concatenate([one.ravel() for one in disjoint]))
    if len(points) < 2:
        return np.empty((0, 2))
    starts, ends = points[:-1], points[1:]
    kept = rule(*(_covers(one, starts) for one in disjoint))
    return union(np.stack([starts[kept], ends[kept]], axis=1))


def both(one: Intervals, other: Intervals) -> Intervals:
    """What lies in both sets."""
    return where(lambda a, b: a & b, one, other)


def without(one: Intervals, other: Intervals) -> Intervals:
    """What lies in the first set and not in the second."""
    return where(lambda a, b: a & ~b, one, other)


def _covers(disjoint: Intervals, at: NDArray[np.float64]) -> Flags:
    if not len(disjoint):
        return np.zeros(len(at), dtype=np.bool_)
    index = np.searchsorted(disjoint[:, 0], at, side="right") - 1
    covered: Flags = (index >= 0) & (at < disjoint[np.maximum(index, 0), 1])
    return covered
