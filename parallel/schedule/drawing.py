"""Timelines as pictures: ranks as rows, time to the right, one panel above another.

The same boxes and colours serve a simulated and a measured timeline, so "as scheduled" stands above "as measured" and
the eye compares them. Hue is the direction; shade is the kind of work; an overlapped pair is one outlined box with the
forward in its upper half and the backward in its lower half.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from parallel.schedule.actions import Op
from parallel.schedule.boundary import parts
from parallel.schedule.simulator import Simulation

FILL = {
    (0, Op.F): "#b9d9f5",
    (0, Op.I): "#5aa0dc",
    (0, Op.B): "#1c5f9e",
    (0, Op.W): "#ffffff",
    (1, Op.F): "#fbd7a8",
    (1, Op.I): "#f09436",
    (1, Op.B): "#b3560a",
    (1, Op.W): "#ffffff",
}
EDGE = {0: "#1c5f9e", 1: "#b3560a"}
DARK = (Op.B,)
IDLE = "#e4e4e4"
HATCH = "/////"
NAME = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient only", Op.W: "weight gradient, later"}

ROW = 0.84  # height of a box, where rows are 1 apart
WIDTH_IN = 16.0
ROW_IN = 0.36
DPI = 150
SMALLEST_LABEL = 4.5  # points; a narrower box goes without its number


_Corners = list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One action of one rank. An overlapped pair is two bars, F and B, with the same rank, start and end."""

    rank: int
    op: Op
    direction: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Panel:
    """One timeline. Times are in `unit` from any origin; `unit_name` is written at the axis ("F", "ms")."""

    title: str
    bars: Sequence[Bar]
    unit_name: str

    @property
    def ranks(self) -> int:
        return 1 + max(bar.rank for bar in self.bars)

    @property
    def origin(self) -> float:
        return min(bar.start for bar in self.bars)

    @property
    def makespan(self) -> float:
        return max(bar.end for bar in self.bars) - self.origin

    def bubble(self, rank: int) -> float:
        """Time within the makespan in which `rank` computes nothing; a pair's time counts once."""
        spans = {(bar.start, bar.end) for bar in self.bars if bar.rank == rank}
        return self.makespan - sum(end - start for start, end in spans)


def bars_of(simulation: Simulation) -> list[Bar]:
    """The bars of a simulated table."""
    return [
        Bar(timed.rank, part.op, part.direction, part.chunk, timed.start, timed.end)
        for row in simulation.timed
        for timed in row
        for part in parts(timed.action)
    ]


def draw_timelines(panels: Sequence[Panel], path: Path) -> tuple[Path, Path]:
    """Draw `panels` one above another; writes `path` with the suffixes .png and .svg and returns both.

    Raises ValueError for a panel without bars, OSError where the files cannot be written.
    """
    for panel in panels:
        if not panel.bars:
            raise ValueError(f"timeline {panel.title!r}: no actions to draw")
    heights = [panel.ranks * ROW_IN + 0.85 for panel in panels]
    legend_in = 0.8
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + legend_in), dpi=DPI)
    FigureCanvasAgg(figure)
    total = sum(heights) + legend_in
    top = total
    for panel, height in zip(panels, heights, strict=True):
        axes = figure.add_axes((0.055, (top - height + 0.45) / total, 0.935, (height - 0.85) / total))
        _draw_panel(axes, panel)
        top -= height
    _draw_legend(figure, panels, legend_in / total)
    outputs = (path.with_suffix(".png"), path.with_suffix(".svg"))
    for output in outputs:
        _publish(figure, output)
    return outputs


def _draw_panel(axes: Axes, panel: Panel) -> None:
    origin, makespan, ranks = panel.origin, panel.makespan, panel.ranks
    axes.set_xlim(0, makespan)
    axes.set_ylim(ranks - 0.5, -0.5)
    idle = [_corners(0, makespan, rank - ROW / 2, ROW) for rank in range(ranks)]
    axes.add_collection(PolyCollection(idle, facecolors=IDLE, edgecolors="none"), autolim=False)
    boxes: dict[tuple[int, float, float], list[Bar]] = defaultdict(list)
    for bar in panel.bars:
        boxes[bar.rank, bar.start - origin, bar.end - origin].append(bar)
    points_per_unit = WIDTH_IN * 0.935 * 72 / makespan
    shapes: dict[tuple[int, Op], list[_Corners]] = defaultdict(list)
    outlines = []
    for (rank, start, end), bars in boxes.items():
        bars.sort(key=lambda bar: bar.op is not Op.F)
        height = ROW / len(bars)
        for i, bar in enumerate(bars):
            y = rank - ROW / 2 + i * height
            shapes[bar.direction % 2, bar.op].append(_corners(start, end, y, height))
            _label_box(axes, bar, (start + end) / 2, y + height / 2, (end - start) * points_per_unit, len(bars) > 1)
        if len(bars) > 1:
            outlines.append(_corners(start, end, rank - ROW / 2, ROW))
    # one collection for each kind of box: thousands of single patches take a minute to draw
    for (hue, op), corners in shapes.items():
        edge = EDGE[hue] if op is Op.W else "white"
        kind = PolyCollection(corners, facecolors=FILL[hue, op], edgecolors=edge, linewidths=0.5)
        if op is Op.W:
            kind.set_hatch(HATCH)
        axes.add_collection(kind, autolim=False)
    axes.add_collection(PolyCollection(outlines, facecolors="none", edgecolors="black", linewidths=1.0), autolim=False)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time ({panel.unit_name})", fontsize=9, labelpad=1)
    axes.tick_params(labelsize=9)
    axes.set_title(f"{panel.title}: {_figures(panel)}", loc="left", fontsize=11, fontweight="bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _corners(start: float, end: float, y: float, height: float) -> _Corners:
    return [(start, y), (end, y), (end, y + height), (start, y + height)]


def _label_box(axes: Axes, bar: Bar, x: float, y: float, room: float, half: bool) -> None:
    """The chunk in the middle of its box, where `room` (points) allows."""
    label = str(bar.chunk)
    size = min(7.5 if half else 9.0, 1.5 * room / len(label))
    if size < SMALLEST_LABEL:
        return
    axes.text(
        x,
        y,
        label,
        ha="center",
        va="center_baseline",
        fontsize=size,
        color="white" if bar.op in DARK else "black",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6} if bar.op is Op.W else None,
    )


def _figures(panel: Panel) -> str:
    bubbles = [panel.bubble(rank) for rank in range(panel.ranks)]
    low, high = min(bubbles), max(bubbles)
    spread = _figure(low) if high - low < 0.005 * panel.makespan else f"{_figure(low)} to {_figure(high)}"
    share = sum(bubbles) / (panel.ranks * panel.makespan)
    unit = panel.unit_name
    return f"makespan {_figure(panel.makespan)} {unit}, bubble {spread} {unit} per rank ({share:.1%})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _draw_legend(figure: Figure, panels: Sequence[Panel], top: float) -> None:
    bars = [bar for panel in panels for bar in panel.bars]
    directions = sorted({bar.direction % 2 for bar in bars})
    ops = [op for op in (Op.F, Op.B, Op.I, Op.W) if any(bar.op is op for bar in bars)]
    last = max(panel.ranks for panel in panels) - 1
    for row, direction in enumerate(directions):
        y = top * (0.78 - 0.34 * row)
        enters = f"enters at rank {0 if direction == 0 else last}"
        figure.text(0.055, y, f"direction {direction} ({enters}):", fontsize=9, va="center", fontweight="bold")
        patches = [
            Patch(
                facecolor=FILL[direction, op],
                edgecolor=EDGE[direction],
                hatch=HATCH if op is Op.W else None,
                linewidth=0.5,
                label=f"{op} {NAME[op]}",
            )
            for op in ops
        ]
        figure.legend(
            handles=patches, loc="center left", bbox_to_anchor=(0.2, y), ncols=len(ops), frameon=False, fontsize=9
        )
    note = "Numbers are the micro-batches of a direction; grey is idle (bubble)."
    if any(len(panel.bars) > len({(b.rank, b.start, b.end) for b in panel.bars}) for panel in panels):
        note += " A black outline is a forward (upper half) overlapped with a backward (lower half)."
    figure.text(0.055, top * (0.78 - 0.34 * len(directions)), note, fontsize=9, va="center", style="italic")


def _publish(figure: Figure, output: Path) -> None:
    """Write through a temporary name, so that no reader sees half a picture; equal pictures are equal bytes."""
    kind = output.suffix[1:]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bireme", "hatch.linewidth": 0.8, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    with temporary.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output)
