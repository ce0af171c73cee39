"""Timelines of one rank's lanes as a picture: compute, all-to-all and host, one panel above another on one scale.

Colours are those of the pipeline's timelines: the forward's chunk in the first direction's hue, the backward's in the
second's; weight gradients are hatched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from parallel.clock.contract import COMPUTE, HOST, Record
from parallel.device import EXPERT
from parallel.schedule.actions import Op
from parallel.schedule.drawing import DPI, EDGE, FILL, HATCH, IDLE, ROW, WIDTH_IN
from parallel.trace.files import published

LANES = {COMPUTE: "compute", EXPERT: "all-to-all", HOST: "host"}
FORWARD, BACKWARD, WEIGHTS = FILL[0, Op.F], FILL[1, Op.F], FILL[1, Op.W]
HOST_FILL, BLOCKED = "#9aa5b1", "#eec1b9"
ROW_IN, HEAD_IN, LEGEND_IN = 0.3, 0.62, 0.4


@dataclass(frozen=True)
class Panel:
    """One timeline, in milliseconds."""

    title: str
    record: Record


def draw_overlap(panels: Sequence[Panel], path: Path) -> None:
    """Draw `panels` as a PNG. Raises OSError where it cannot be written."""
    height = len(panels) * (len(LANES) * ROW_IN + HEAD_IN) + LEGEND_IN + 0.25
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI)
    FigureCanvasAgg(figure)
    longest = max(panel.record.span for panel in panels)
    top = height
    for panel in panels:
        bottom = top - HEAD_IN - len(LANES) * ROW_IN
        axes = figure.add_axes((0.055, (bottom + 0.2) / height, 0.935, len(LANES) * ROW_IN / height))
        _draw_panel(axes, panel, longest)
        top = bottom
    axes.set_xlabel("time (ms)", fontsize=9, labelpad=1)
    _draw_legend(figure, LEGEND_IN / height)
    buffer = io.BytesIO()
    with rc_context({"hatch.linewidth": 0.8}):
        figure.savefig(buffer, format="png")
    with published(path) as file:
        file.write(buffer.getvalue())


def _colour(lane: str, name: str) -> str:
    if lane == HOST:
        return BLOCKED if name == "counts" else HOST_FILL
    return FORWARD if name.endswith("(F)") else WEIGHTS if name.endswith("(W)") else BACKWARD


def _draw_panel(axes: Axes, panel: Panel, longest: float) -> None:
    record = panel.record
    axes.set_xlim(0, longest)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    points_per_ms = WIDTH_IN * 0.935 * 72 / longest
    for row, lane in enumerate(LANES):
        if lane != HOST:
            axes.add_patch(Rectangle((0, row - ROW / 2), record.span, ROW, facecolor=IDLE, edgecolor="none"))
        for interval in record.lane(lane):
            width = interval.end - interval.start
            weights = lane == COMPUTE and interval.name.endswith("(W)")
            box = Rectangle(
                (interval.start, row - ROW / 2),
                width,
                ROW,
                facecolor=_colour(lane, interval.name),
                edgecolor=EDGE[1] if weights else "white",
                hatch=HATCH if weights else None,
                linewidth=0.5,
            )
            axes.add_patch(box)
            size = min(7.0, 1.7 * width * points_per_ms / len(interval.name))
            if lane != HOST and size >= 4.5:
                back = {"facecolor": "white", "edgecolor": "none", "pad": 0.4} if weights else None
                middle = interval.start + width / 2
                axes.text(middle, row, interval.name, ha="center", va="center_baseline", fontsize=size, bbox=back)
    axes.set_yticks(range(len(LANES)), list(LANES.values()))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=8)
    figures = f"span {record.span:.1f} ms, {100 * record.exposed_share:.1f} % of the all-to-all exposed"
    axes.set_title(f"{panel.title}: {figures}", loc="left", fontsize=10, fontweight="bold", pad=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_legend(figure: Figure, top: float) -> None:
    patches = [
        Patch(facecolor=FORWARD, label="forward of one chunk"),
        Patch(facecolor=BACKWARD, label="backward of another"),
        Patch(facecolor=WEIGHTS, edgecolor=EDGE[1], hatch=HATCH, linewidth=0.5, label="its weight gradients"),
        Patch(facecolor=IDLE, label="idle"),
        Patch(facecolor=HOST_FILL, label="host launching"),
        Patch(facecolor=BLOCKED, label="host blocked on receive counts"),
    ]
    figure.legend(
        handles=patches, loc="center left", bbox_to_anchor=(0.05, top * 0.4), ncols=6, frameon=False, fontsize=9
    )
