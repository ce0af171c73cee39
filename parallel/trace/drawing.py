"""The measured overlap as a picture: for each rank a lane of compute, one of all-to-alls and one of waits.

Hue is the direction of work, as in the timelines of schedules: blue forward, orange backward; weight gradients are
hatched. Under the lanes a red line marks every moment in which an all-to-all runs, or is waited for, and nothing
computes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from parallel.trace.analyse import Figures
from parallel.trace.files import published
from parallel.trace.intervals import Intervals, both, intervals, without
from parallel.trace.lanes import Lanes

FORWARD, BACKWARD, WEIGHT, PLAIN = "#b9d9f5", "#f09436", "#ffffff", "#b5b5b5"
MOVE_FORWARD, MOVE_BACKWARD, MOVE_PLAIN = "#1c5f9e", "#b3560a", "#6b6b6b"
WAIT, EXPOSED, IDLE = "#c9a3d8", "#d01c1c", "#efefef"
HATCH = "/////"
LANES = ("compute", "all-to-all", "waits")
WIDTH_IN, LANE_IN, DPI = 16.0, 0.3, 150
MOST_RANKS = 32  # of one picture
SMALLEST_LABEL = 4.5  # points


def draw_lanes(ranks: Sequence[Lanes], figures: Sequence[Figures], window: Intervals, path: Path) -> Path:
    """Draw the first `MOST_RANKS` ranks within `window` (microseconds) as a PNG at `path`; raises OSError where it
    cannot be written."""
    shown = list(zip(ranks, figures))[:MOST_RANKS]
    origin, end = float(window[0, 0]), float(window[-1, 1])
    lanes_in = len(shown) * (len(LANES) * LANE_IN + 0.14)
    height = lanes_in + 1.55
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.95 / height, 0.895, lanes_in / height))
    axes.set_xlim(0, (end - origin) / 1e3)
    axes.set_ylim(len(shown), 0)
    ticks, names = [], []
    for row, (lanes, _) in enumerate(shown):
        tops = [row + 0.07 + i * 0.86 / len(LANES) for i in range(len(LANES))]
        _draw_rank(axes, lanes, window, tops, 0.86 / len(LANES))
        ticks += [top + 0.43 / len(LANES) for top in tops]
        names += [f"rank {lanes.rank}  {LANES[0]}", *LANES[1:]]
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("time (ms)", fontsize=9, labelpad=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title([one for _, one in shown], len(ranks)), loc="left", fontsize=11, fontweight="bold")
    figure.legend(handles=_legend(), loc="lower left", bbox_to_anchor=(0.09, 0.0), ncols=9, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"hatch.linewidth": 0.8}):
        figure.savefig(buffer, format="png")
    with published(path) as file:
        file.write(buffer.getvalue())
    return path


def _draw_rank(axes: Axes, lanes: Lanes, window: Intervals, tops: Sequence[float], pitch: float) -> None:
    height, origin, end = pitch * 0.86, float(window[0, 0]), float(window[-1, 1])
    for top in tops:
        _boxes(axes, intervals([(origin, end)]), origin, top, height, IDLE)
    points = WIDTH_IN * 0.895 * 72 / (end - origin)
    for step, times in lanes.compute.items():
        seen = both(times, window)
        _boxes(axes, seen, origin, tops[0], height, _compute_colour(step), HATCH if "(W)" in step else None)
        _labels(axes, step, seen, origin, tops[0] + height / 2, points, "black")
    for step, times in lanes.all_to_all.items():
        seen = both(times, window)
        _boxes(axes, seen, origin, tops[1], height, _move_colour(step))
        _labels(axes, step, seen, origin, tops[1] + height / 2, points, "white")
    _boxes(axes, both(lanes.waits, window), origin, tops[2], height, WAIT)
    exposed = both(without(lanes.all_to_all_or_wait(), lanes.all_compute()), window)
    _boxes(axes, exposed, origin, tops[2] + height, pitch * 0.14, EXPOSED)


def _boxes(
    axes: Axes, times: Intervals, origin: float, top: float, height: float, colour: str, hatch: str | None = None
) -> None:
    shown = (times - origin) / 1e3
    corners = [[(a, top), (b, top), (b, top + height), (a, top + height)] for a, b in shown.tolist()]
    edge = MOVE_BACKWARD if hatch else colour
    kind = PolyCollection(corners, facecolors=colour, edgecolors=edge, linewidths=0.2 if hatch is None else 0.5)
    if hatch:
        kind.set_hatch(hatch)
    axes.add_collection(kind, autolim=False)


def _labels(
    axes: Axes, step: str, times: Intervals, origin: float, y: float, points_per_us: float, colour: str
) -> None:
    """The step's name in the middle of each of its boxes that has room for it."""
    for start, end in times.tolist():
        size = min(7.0, 1.6 * (end - start) * points_per_us / len(step))
        if size >= SMALLEST_LABEL:
            x = ((start + end) / 2 - origin) / 1e3
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if "(W)" in step else None
            axes.text(x, y, step, ha="center", va="center_baseline", fontsize=size, color=colour, bbox=box)


def _compute_colour(step: str) -> str:
    return FORWARD if "(F)" in step else BACKWARD if "(B)" in step else WEIGHT if "(W)" in step else PLAIN


def _move_colour(step: str) -> str:
    return MOVE_FORWARD if "(F)" in step else MOVE_BACKWARD if "(B)" in step else MOVE_PLAIN


def _title(figures: Sequence[Figures], ranks: int) -> str:
    of = f"first {len(figures)} of {ranks} ranks" if ranks > len(figures) else f"{ranks} rank{'s' * (ranks > 1)}"
    exposed, moved = sum(one.exposed for one in figures), sum(one.all_to_all for one in figures)
    share = f" ({exposed / moved:.1%} of all-to-all)" if moved else ""
    mean = exposed / len(figures)
    return f"measured, {of}: span {max(one.span for one in figures):.4g} ms, exposed all-to-all {mean:.3g} ms{share}"


def _legend() -> list[Patch]:
    compute = [Patch(facecolor=FORWARD, label="forward"), Patch(facecolor=BACKWARD, label="backward")]
    weight = Patch(facecolor=WEIGHT, edgecolor=MOVE_BACKWARD, hatch=HATCH, label="weight gradient")
    moves = [
        Patch(facecolor=MOVE_FORWARD, label="all-to-all, forward"),
        Patch(facecolor=MOVE_BACKWARD, label="backward"),
    ]
    rest = [
        Patch(facecolor=PLAIN, label="other"),
        Patch(facecolor=WAIT, label="wait for an all-to-all"),
        Patch(facecolor=EXPOSED, label="exposed"),
        Patch(facecolor=IDLE, label="nothing"),
    ]
    return [*compute, weight, *moves, *rest]
