"""Lanes of traces that `recorder` and `chrome` wrote: one rank's file, or the merged one."""

from __future__ import annotations

from collections import defaultdict
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
    transfers = [span for span in of_kind[Kind.COMMUNICATION] if span.args.get("channel") == Channel.ALL_TO_ALL]
    named = [(step_of(str(span.args.get("step"))) or step_of(span.name) or span.name, span) for span in transfers]
    occurrences: dict[str, int] = defaultdict(int)
    for label, _ in named:
        occurrences[label] += 1
    for_rows = [span for span in waits if span.args.get("channel") in (Channel.ALL_TO_ALL, Channel.COUNTS)]
    for_stages = [span for span in waits if span.args.get("channel") == Channel.PIPELINE]
    compute = by_label((step_of(span.name) or span.name, span.start, span.end) for span in steps)
    # An action that reports no steps (a W from the queue) computes from its start to its end.
    alone = without(_times(actions), _times(span for span in actions if _holds_step(span, steps)))
    if len(alone):
        compute[OTHER] = union(compute.get(OTHER, intervals([])), without(alone, union(*compute.values())))
    return Lanes(
        rank=rank,
        source="recorder",
        compute={label: without(times, blocked) for label, times in compute.items()},
        all_to_all=by_label((label, span.start, span.end) for label, span in named),
        occurrences=dict(occurrences),
        steps=_pairs(actions, steps),
        waits=_times(for_rows),
        at_work=without(_times(actions), _times(for_stages)) if actions else None,
        runs=[(span.start, span.end) for span in of_kind[Kind.RUN]],
        others=_times(span for span in of_kind[Kind.COMMUNICATION] if span not in transfers),
    )


def _times(spans: Iterable[Span]) -> Intervals:
    return intervals((span.start, span.end) for span in spans)
