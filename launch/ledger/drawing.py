"""The ledger as pictures: what each rank class holds at its fullest moment, and two ranks over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.ledger.ledger import KINDS, Lines, RankTimeline, Sizes
from launch.ledger.report import GB, Ledger
from parallel.schedule.drawing import publish

COLOURS = {
    "BF16 weights": "#1c5f9e",
    "FP8 weights": "#5aa0dc",
    "gradient accumulators": "#b3560a",
    "FP32 masters": "#f09436",
    "BF16 moments": "#fbd7a8",
    "batches": "#9a9a9a",
    "caches": "#3c8d5a",
    "weight-gradient queue": "#9fd3b1",
    "working set": "#8b5fb0",
    "all-to-all": "#cbb2e0",
    "boundaries": "#d98cb3",
    "publishing": "#e6c200",
    "reserve": "#dddddd",
}


def draw_classes(ledger: Ledger, path: Path) -> None:
    """A bar for each class and number of micro-batches, as given, and one remedied at the largest. OSError."""
    bars = [
        (f"{_short(c.ranks)}\nM={m}", peaks[i].lines)
        for i, c in enumerate(ledger.classes)
        for m, peaks in ledger.peaks.items()
    ]
    if ledger.remedied:
        bars += [
            (f"{_short(c.ranks)}\nM={ledger.most}\nremedied", ledger.remedied[ledger.most][i].lines)
            for i, c in enumerate(ledger.classes)
        ]
    figure = Figure(figsize=(max(7.0, 1.0 * len(bars) + 3.5), 6.0), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _stack(axes, bars)
    axes.axhline(ledger.budget / GB, color="#c00000", linewidth=1.2)
    right = axes.get_yaxis_transform()
    axes.text(1.005, ledger.budget / GB, f"{ledger.budget / GB:g}", color="#c00000", va="center", transform=right)
    axes.set_ylabel("GB at the fullest moment")
    axes.legend(loc="center left", bbox_to_anchor=(1.04, 0.5), frameon=False, reverse=True)
    figure.tight_layout()
    _write(figure, path)


def draw_timeline(ledger: Ledger, ranks: Sequence[int], path: Path) -> None:
    """Bytes over simulated time of `ranks`, one panel each, at the largest number of micro-batches. OSError."""
    sizes = Sizes(ledger.plan, ledger.choices)
    figure = Figure(figsize=(13.0, 3.4 * len(ranks)), dpi=150)
    FigureCanvasAgg(figure)
    for row, rank in enumerate(ranks):
        axes = figure.add_subplot(len(ranks), 1, row + 1)
        timeline = ledger.ranks[ledger.most][rank]
        _over_time(axes, timeline, sizes)
        axes.axhline(ledger.budget / GB, color="#c00000", linewidth=1.0)
        axes.set_title(f"pipeline rank {rank}, {ledger.most} micro-batches", loc="left", fontsize=10)
        axes.set_ylabel("GB")
        if row == 0:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, reverse=True, fontsize=8)
    axes.set_xlabel("simulated time, in units of one forward")
    figure.tight_layout()
    _write(figure, path)


def _over_time(axes: object, timeline: RankTimeline, sizes: Sizes) -> None:
    permanent = sizes.permanent(timeline)
    times = [0.0, timeline.moments[0].start]
    series = {kind: [permanent.get(kind, 0) / GB] * 2 for kind in KINDS}
    for moment in timeline.moments:
        lines = permanent | sizes.lines(moment.situation)
        times += [moment.start, moment.end]
        for kind in KINDS:
            series[kind] += [lines.get(kind, 0) / GB] * 2
    shown = [kind for kind in KINDS if any(series[kind])]
    axes.stackplot(  # type: ignore[attr-defined]
        times, [series[k] for k in shown], labels=shown, colors=[COLOURS[k] for k in shown], linewidth=0
    )
    axes.set_xlim(0, times[-1])  # type: ignore[attr-defined]


def _stack(axes: object, bars: Sequence[tuple[str, Lines]]) -> None:
    base = [0.0] * len(bars)
    for kind in KINDS:
        heights = [lines.get(kind, 0) / GB for _, lines in bars]
        if any(heights):
            axes.bar(range(len(bars)), heights, bottom=base, color=COLOURS[kind], label=kind, width=0.72)  # type: ignore[attr-defined]
            base = [b + h for b, h in zip(base, heights, strict=True)]
    for at, total in enumerate(base):
        axes.text(at, total + 0.8, f"{total:.1f}", ha="center", fontsize=8)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)  # type: ignore[attr-defined]


def _short(ranks: Sequence[int]) -> str:
    return f"ranks {ranks[0]}, {ranks[-1]}" if len(ranks) == 2 else f"ranks {ranks[0]}-{ranks[-1]}"


def _write(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    publish(buffer.getvalue(), path)
