"""What one rank did over time, in the terms of the analysis, whatever format it was read from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from parallel.trace.intervals import Intervals, intervals, union

_STEP = re.compile(r"(?<![A-Za-z])(attn|attention|mlp|dispatch|combine)\s*\(\s*([FBW])\s*\)", re.IGNORECASE)
OTHER = "other compute"


def step_of(name: str) -> str | None:
    """The program step that `name` names, in our spelling; None if it names none, or several."""
    found = _STEP.findall(name)
    if len(found) != 1:
        return None
    step, letter = found[0]
    return f"{step.lower().replace('attention', 'attn')}({letter.upper()})"


def is_all_to_all(step: str | None) -> bool:
    """Whether a step is a dispatch or a combine."""
    return step is not None and step.startswith(("dispatch", "combine"))


@dataclass
class Lanes:
    """One rank. Times in microseconds from any origin common to the ranks of one analysis.

    compute, all_to_all: step -> disjoint intervals. occurrences: step -> number of all-to-alls. waits: the host is
    blocked on an all-to-all or its receive counts. steps: names in the order of launch, a list per F&B pair (one list
    in all where pairs are not marked). at_work: compute actions less their waits for other stages; None where the trace
    has no actions. runs: (start, end) of each pass through the table, where marked. others: all other communication,
    and, in a trace of ours, waits for it.
    """

    rank: int
    source: str
    compute: dict[str, Intervals]
    all_to_all: dict[str, Intervals]
    occurrences: dict[str, int]
    steps: list[list[str]]
    waits: Intervals = field(default_factory=lambda: intervals([]))
    at_work: Intervals | None = None
    runs: list[tuple[float, float]] = field(default_factory=list)
    others: Intervals = field(default_factory=lambda: intervals([]))

    def all_compute(self) -> Intervals:
        return union(*self.compute.values())

    def all_to_all_or_wait(self) -> Intervals:
        """Time in which an all-to-all runs or is waited for."""
        return union(*self.all_to_all.values(), self.waits)

    def extent(self) -> tuple[float, float] | None:
        """First start and last end of anything recorded."""
        work = [self.all_compute(), self.all_to_all_or_wait(), self.others]
        everything = union(*work, *([] if self.at_work is None else [self.at_work]))
        return (float(everything[0, 0]), float(everything[-1, 1])) if len(everything) else None


def by_label(spans: Iterable[tuple[str, float, float]]) -> dict[str, Intervals]:
    """(label, start, end) -> label -> disjoint intervals."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label, start, end in spans:
        found.setdefault(label, []).append((start, end))
    return {label: intervals(pairs) for label, pairs in found.items()}


def innermost(points: Sequence[float], outer: Sequence[tuple[float, float]]) -> list[int]:
    """For each point the index of the innermost of the nested `outer` (start, end) intervals around it, or -1."""
    starts = sorted(range(len(outer)), key=lambda i: (outer[i][0], -outer[i][1]))
    found, open_ones, following = [-1] * len(points), list[int](), 0
    for at in sorted(range(len(points)), key=points.__getitem__):
        point = points[at]
        while following < len(starts) and outer[starts[following]][0] <= point:
            open_ones.append(starts[following])
            following += 1
        # One that is over hides nothing beneath it: nesting is not exact where clocks are rounded.
        open_ones = [i for i in open_ones if outer[i][1] >= point]
        if open_ones:
            found[at] = open_ones[-1]
    return found
