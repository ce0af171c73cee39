"""Lanes of traces that `recorder` and `chrome` wrote: one rank's file, or the merged one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from parallel.trace.intervals import Intervals, intervals, union, without
from parallel.trace.lanes import OTHER, Lanes, by_label, innermost, step_of
from parallel.trace.reader import Span
from parallel.trace.recorder import Channel, Kind

CATEGORIES = frozenset(str(kind) for kind in Kind)


def own_lanes(spans: Iterable[Span], shift: float) -> list[Lanes]:
    """One `Lanes` per rank; `shift` (microseconds) is added to all times."""
    of_rank: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        span.start += shift
        span.end += shift
        of_rank[int(span.pid)].append(span)
    return [_rank(rank, of_rank[rank]) for rank in sorted(of_rank)]


def _rank(rank: int, spans: list[Span]) -> Lanes:
    of_kind: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start):
        of_kind[span.category].append(span)
    actions, steps, waits = of_kind[Kind.ACTION], of_kind[Kind.STEP], of_kind[Kind.WAIT]
    blocked = _times(waits)
    transfers: list[Span] = []
    others: list[Span] = []
    for span in of_kind[Kind.COMMUNICATION]:
        (transfers if span.args.get("channel") == Channel.ALL_TO_ALL else others).append(span)
    named = [(step_of(str(span.args.get("step"))) or step_of(span.name) or span.name, span) for span in transfers]
    occurrences: dict[str, int] = defaultdict(int)
    for label, _ in named:
        occurrences[label] += 1
    for_rows = [span for span in waits if span.args.get("channel") in (Channel.ALL_TO_ALL, Channel.COUNTS)]
    for_stages = [span for span in waits if span.args.get("channel") == Channel.PIPELINE]
    compute = by_label((step_of(span.name) or span.name, span.start, span.end) for span in steps)
    # An action that reports no steps (a W from the queue) computes from its start to its end.
    bars = sorted({(span.start, span.end) for span in actions})
    inside = _steps_by_bar(bars, steps)
    alone = without(intervals(bar for bar, held in zip(bars, inside) if not held), union(*compute.values()))
    if len(alone):
        compute[OTHER] = union(compute.get(OTHER, alone), alone)
    halves = Counter((span.start, span.end) for span in actions)
    return Lanes(
        rank=rank,
        source="recorder",
        compute={label: without(times, blocked) for label, times in compute.items()},
        all_to_all=by_label((label, span.start, span.end) for label, span in named),
        occurrences=dict(occurrences),
        steps=[held for bar, held in zip(bars, inside) if halves[bar] == 2 and held],
        waits=_times(for_rows),
        at_work=without(_times(actions), _times(for_stages)) if actions else None,
        runs=[(span.start, span.end) for span in of_kind[Kind.RUN]],
        others=union(_times(others), blocked),
    )


def _times(spans: Iterable[Span]) -> Intervals:
    return intervals((span.start, span.end) for span in spans)


def _steps_by_bar(bars: list[tuple[float, float]], steps: list[Span]) -> list[list[str]]:
    """For each action's interval the steps that ran in it, in order."""
    inside: list[list[str]] = [[] for _ in bars]
    middles = [(span.start + span.end) / 2 for span in steps]
    for span, bar in zip(steps, innermost(middles, bars), strict=True):
        if bar >= 0:
            inside[bar].append(step_of(span.name) or span.name)
    return inside
