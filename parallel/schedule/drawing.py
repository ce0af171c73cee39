"""Timelines as pictures: ranks as rows, time to the right, one panel above another.

The same boxes and colours serve a simulated and a measured timeline, so "as scheduled" stands above "as measured" and
the eye compares them. Hue is the direction, or which of its stages a rank runs where it holds several of one direction;
shade is the kind of work; an overlapped pair is one outlined box with the forward in its upper half and the backward in
its lower half.
"""

from __future__ import annotations

import io
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

from parallel.schedule.actions import Compute, Op
from parallel.schedule.boundary import parts
from parallel.schedule.simulator import Simulation
from parallel.trace.files import published

# hue -> light (F), middle (I), dark (B and edges)
SHADES = (
    ("#b9d9f5", "#5aa0dc", "#1c5f9e"),
    ("#fbd7a8", "#f09436", "#b3560a"),
    ("#c3e6c0", "#67b562", "#2b7a2e"),
    ("#dccdf0", "#a583d1", "#66409c"),
)
FILL = {
    (hue, op): color
    for hue, (light, middle, dark) in enumerate(SHADES)
    for op, color in ((Op.F, light), (Op.I, middle), (Op.B, dark), (Op.W, "#ffffff"))
}
EDGE = {hue: dark for hue, (_, _, dark) in enumerate(SHADES)}
DARK = (Op.B,)
IDLE = "#e4e4e4"
HATCH = "/////"
ORDINAL = ("first", "second", "third", "fourth")
NAME = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient only", Op.W: "weight gradient, later"}

ROW = 0.84  # height of a box, where rows are 1 apart
WIDTH_IN = 16.0
ROW_IN = 0.36
DPI = 150
SMALLEST_LABEL = 4.4  # points; a narrower box goes without its number


_Corners = list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One action of one rank. An overlapped pair is two bars, F and B, with the same rank, start and end.

    place: how many stages of the direction the rank holds before this one, 0 for its first.
    """

    rank: int
    op: Op
    direction: int
    chunk: int
    start: float
    end: float
    place: int = 0

    @property
    def hue(self) -> int:
        return (self.direction + self.place) % len(SHADES)


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
    rank_of = simulation.table.rank_of

    def place(part: Compute) -> int:
        row = rank_of[part.direction]
        return row[: part.stage].count(row[part.stage])

    return [
        Bar(timed.rank, part.op, part.direction, part.chunk, timed.start, timed.end, place(part))
        for row in simulation.timed
        for timed in row
        for part in parts(timed.action)
    ]


def draw_timelines(
    panels: Sequence[Panel], path: Path, one_axis: bool = False, row_in: float = ROW_IN
) -> tuple[Path, Path]:
    """Draw `panels` one above another; writes `path` with the suffixes .png and .svg and returns both.

    one_axis: all panels have the time axis of the longest, so that lengths compare. row_in: height of a rank, inches.
    Raises ValueError for a panel without bars, OSError where the files cannot be written.
    """
    for panel in panels:
        if not panel.bars:
            raise ValueError(f"timeline {panel.title!r}: no actions to draw")
    longest = max(panel.makespan for panel in panels)
    hues = _hue_names(panels)
    heights = [panel.ranks * row_in + 0.85 for panel in panels]
    legend_in = 0.4 + 0.27 * len(hues)
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + legend_in), dpi=DPI)
    FigureCanvasAgg(figure)
    total = sum(heights) + legend_in
    top = total
    for panel, height in zip(panels, heights, strict=True):
        axes = figure.add_axes((0.055, (top - height + 0.45) / total, 0.935, (height - 0.85) / total))
        _draw_panel(axes, panel, longest if one_axis else panel.makespan, row_in)
        top -= height
    _draw_legend(figure, panels, hues, total)
    outputs = (path.with_suffix(".png"), path.with_suffix(".svg"))
    for output in outputs:
        _save(figure, output)
    return outputs


def _draw_panel(axes: Axes, panel: Panel, shown: float, row_in: float) -> None:
    origin, makespan, ranks = panel.origin, panel.makespan, panel.ranks
    axes.set_xlim(0, shown)
    axes.set_ylim(ranks - 0.5, -0.5)
    idle = [_corners(0, makespan, rank - ROW / 2, ROW) for rank in range(ranks)]
    axes.add_collection(PolyCollection(idle, facecolors=IDLE, edgecolors="none"), autolim=False)
    boxes: dict[tuple[int, float, float], list[Bar]] = defaultdict(list)
    for bar in panel.bars:
        boxes[bar.rank, bar.start - origin, bar.end - origin].append(bar)
    points_per_unit = WIDTH_IN * 0.935 * 72 / shown
    shapes: dict[tuple[int, Op], list[_Corners]] = defaultdict(list)
    outlines = []
    for (rank, start, end), bars in boxes.items():
        bars.sort(key=lambda bar: bar.op is not Op.F)
        height = ROW / len(bars)
        for i, bar in enumerate(bars):
            y = rank - ROW / 2 + i * height
            shapes[bar.hue, bar.op].append(_corners(start, end, y, height))
            room = ((end - start) * points_per_unit, height * row_in * 72)
            _label_box(axes, bar, (start + end) / 2, y + height / 2, room)
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


def _label_box(axes: Axes, bar: Bar, x: float, y: float, room: tuple[float, float]) -> None:
    """The chunk in the middle of its box, where `room` (width and height in points) allows."""
    label = str(bar.chunk)
    width, height = room
    size = min(9.0, 0.75 * height, 1.5 * width / (len(label) + 0.25))
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


def _hue_names(panels: Sequence[Panel]) -> dict[int, str]:
    """What each hue stands for: a direction, a place among a rank's stages, or both."""
    bars = [bar for panel in panels for bar in panel.bars]
    last = max(panel.ranks for panel in panels) - 1
    directions = {bar.direction for bar in bars}
    places = {bar.place for bar in bars}
    names = {}
    for hue in sorted({bar.hue for bar in bars}):
        what = []
        if places != {0} and hue in places:
            again = f" (and every {len(SHADES)}th after it)" if max(places) >= len(SHADES) else ""
            what.append(f"{ORDINAL[hue]} stage of a rank{again}")
        if hue in directions and (len(directions) > 1 or not what):
            enters = 0 if hue == 0 else last
            what.append(
                f"direction {hue} (from rank {enters})" if what else f"direction {hue} (enters at rank {enters})"
            )
        names[hue] = " / ".join(what)
    return names


def _draw_legend(figure: Figure, panels: Sequence[Panel], hues: dict[int, str], total: float) -> None:
    """One line for each hue, then a note, in the lowest inches of a figure `total` inches high."""
    bars = [bar for panel in panels for bar in panel.bars]
    ops = [op for op in (Op.F, Op.B, Op.I, Op.W) if any(bar.op is op for bar in bars)]
    widest = max(len(name) for name in hues.values())
    for row, (hue, name) in enumerate(hues.items()):
        y = (0.22 + 0.27 * (len(hues) - row)) / total
        figure.text(0.055, y, f"{name}:", fontsize=9, va="center", fontweight="bold")
        patches = [
            Patch(
                facecolor=FILL[hue, op],
                edgecolor=EDGE[hue],
                hatch=HATCH if op is Op.W else None,
                linewidth=0.5,
                label=f"{op} {NAME[op]}",
            )
            for op in ops
        ]
        figure.legend(
            handles=patches,
            loc="center left",
            bbox_to_anchor=(0.06 + 0.0048 * widest, y),
            ncols=len(ops),
            frameon=False,
            fontsize=9,
        )
    note = "Numbers are micro-batches"
    note += " of a direction" if any(bar.direction for bar in bars) else ""
    note += "; grey is idle (bubble)."
    if any(len(panel.bars) > len({(b.rank, b.start, b.end) for b in panel.bars}) for panel in panels):
        note += " A black outline is a forward (upper half) overlapped with a backward (lower half)."
    figure.text(0.055, 0.2 / total, note, fontsize=9, va="center", style="italic")


def _save(figure: Figure, output: Path) -> None:
    """Equal pictures are equal bytes."""
    kind = output.suffix[1:]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bireme", "hatch.linewidth": 0.8, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    publish(buffer.getvalue(), output)


def publish(content: bytes, output: Path) -> None:
    """Write through a temporary name, so that no reader sees half a file; OSError where that fails."""
    with published(output) as file:
        file.write(content)
