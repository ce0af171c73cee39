"""One step's pipeline for the report: as scheduled (simulated at the measured mean durations) and as measured."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from parallel.pipeline.executor import Measured
from parallel.schedule.actions import Compute, Pair, Table
from parallel.schedule.simulator import Costs, simulate


def _durations(measured: list[Measured]) -> Costs:
    """Mean seconds of each kind of action, waits left out. Both halves of a pair carry the pair's own interval."""
    intervals: dict[tuple[int, float, float], list[Measured]] = defaultdict(list)
    for action in measured:
        intervals[action.rank, action.start, action.end].append(action)
    found: dict[str, list[float]] = defaultdict(list)
    for actions in intervals.values():
        kind = "pair" if len(actions) == 2 else actions[0].op
        found[kind].append(actions[0].end - actions[0].start - actions[0].waited)
    costs = {kind: mean(values) for kind, values in found.items()}
    forward, backward = costs.get("F", 0.0), costs.get("B", costs.get("I", 0.0) + costs.get("W", 0.0))
    return Costs(
        forward=forward,
        backward=backward,
        input_grad=costs.get("I", backward / 2),
        weight_grad=costs.get("W", backward / 2),
        pair=costs.get("pair", forward + backward),
    )


def _entry(rank: int, action: Compute, start: float, end: float) -> dict[str, Any]:
    return {
        "rank": rank,
        "op": str(action.op),
        "direction": action.direction,
        "stage": action.stage,
        "chunk": action.chunk,
        "start": start,
        "end": end,
    }


def timeline(table: Table, measured: list[Measured]) -> dict[str, list[dict[str, Any]]]:
    """{"scheduled": [...], "measured": [...]}: one entry per F, B, I, W in seconds from the step's first start."""
    scheduled = []
    for timed in (t for row in simulate(table, _durations(measured)).timed for t in row):
        action = timed.action
        parts = (action.forward, action.backward) if isinstance(action, Pair) else (action,)
        scheduled += [_entry(timed.rank, part, timed.start, timed.end) for part in parts]
    begin = min(action.start for action in measured)
    # An action waits for its receive before anything else: the wait is idle time, not part of its bar.
    ran = [asdict(m) | {"start": m.start + m.waited - begin, "end": m.end - begin} for m in measured]
    return {"scheduled": scheduled, "measured": ran}


def write_timeline(path: Path, table: Table, measured: list[Measured]) -> None:
    """Write `timeline.json`, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(timeline(table, measured)))
    partial.replace(path)
