"""Draws docs/images/architecture.png: the rooms, and the contracts between them. Run from the repository root."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOMS = {
    "data": "#cfe8d5",
    "train": "#f6dcb4",
    "model": "#cfe0f3",
    "parallel": "#e3d6ee",
    "kernels": "#e2e5e9",
}
# name: room, left, bottom, width, height, title, what it does
BOXES = {
    "clean": ("data", 0.0, 5.75, 2.3, 0.95, "raw text", "language, dedup, tokenizer"),
    "blocks": ("data", 0.0, 3.9, 2.3, 0.95, "blocks + manifest", "tokens on disk, with digests"),
    "stream": ("data", 0.0, 2.05, 2.3, 0.95, "stream", "sample index → tokens"),
    "loop": ("train", 3.6, 5.75, 5.9, 0.95, "loop", "stages and schedules, all in tokens; resume; stop"),
    "schedule": ("parallel", 3.6, 3.9, 2.3, 0.95, "schedule", "checked, simulated, drawn"),
    "executor": ("parallel", 7.2, 3.9, 2.3, 0.95, "executor", "runs this rank's list"),
    "stage": ("model", 7.2, 2.05, 2.3, 0.95, "stage", "attn · dispatch · mlp · combine"),
    "dispatcher": ("parallel", 3.6, 2.05, 2.3, 0.95, "dispatcher", "rows to experts and back"),
    "kernels": ("kernels", 7.2, 0.2, 2.3, 0.95, "kernels", "FP8, GEMMs, norms, AdamW"),
    "store": ("parallel", 10.8, 3.9, 2.3, 0.95, "weight-gradient store", "now (B) or later (W)"),
    "zero": ("parallel", 10.8, 2.05, 2.3, 0.95, "ZeRO-1", "every row has one owner"),
    "checkpoint": ("train", 10.8, 0.2, 2.3, 0.95, "checkpoint", "free of layout, atomic"),
    "metrics": ("train", 10.8, 5.75, 2.3, 0.95, "metrics → report", "JSONL, console, wandb"),
}
# from, side, to, side, contract, where its label stands relative to the arrow's middle, alignment
ARROWS = (
    ("clean", "s", "blocks", "n", "documents", (0.08, 0.0), "left"),
    ("blocks", "s", "stream", "n", "Manifest, Plan", (0.08, 0.0), "left"),
    ("loop", "s", "schedule", "n", "stages, micro-batches", (0.08, 0.0), "left"),
    ("schedule", "e", "executor", "w", "Table", (0.0, 0.12), "center"),
    ("loop", "s", "executor", "n", "step", (0.08, 0.0), "left"),
    ("executor", "s", "stage", "n", "Program", (0.08, 0.0), "left"),
    ("stage", "w", "dispatcher", "e", "Pending", (0.0, 0.12), "center"),
    ("stage", "s", "kernels", "n", "tensors", (0.08, 0.0), "left"),
    ("stage", "e", "store", "w", "dW closures", (0.1, -0.3), "left"),
    ("store", "s", "zero", "n", "GradientSink", (0.08, 0.0), "left"),
    ("zero", "s", "checkpoint", "n", "RowRange slices", (0.08, 0.0), "left"),
    ("loop", "e", "metrics", "w", "Metrics.log", (0.0, 0.12), "center"),
)


def main() -> None:
    figure = Figure(figsize=(13.4, 7.6), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(-0.1, 13.2)
    axes.set_ylim(-0.75, 6.9)
    axes.axis("off")
    for room, left, bottom, width, height, title, text in BOXES.values():
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.09", facecolor=ROOMS[room],
                edgecolor="#52606d", linewidth=1.0,
            )
        )  # fmt: skip
        middle = left + width / 2
        axes.text(middle, bottom + 0.62, title, ha="center", va="center", fontsize=12, fontweight="bold")
        axes.text(middle, bottom + 0.29, text, ha="center", va="center", fontsize=9, color="#3e4c59")
    for source, leave, target, arrive, label, (dx, dy), align in ARROWS:
        start, end = _port(source, leave, target), _port(target, arrive, source)
        _arrow(axes, start, end)
        middle = ((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy)
        axes.text(*middle, label, ha=align, va="center", fontsize=9.5, family="monospace", color="#102a43")
    # The stream feeds every stage that needs tokens or labels, by index: the line runs under the dispatcher.
    axes.plot([1.15, 1.15, 7.0, 7.0], [2.05, 1.55, 1.55, 2.3], color="#52606d", linewidth=1.3)
    _arrow(axes, (7.0, 2.3), (7.2, 2.3))
    axes.text(2.6, 1.37, "MicroBatch, StepCounts: read by index wherever needed", fontsize=9.5, family="monospace",
              color="#102a43", va="center")  # fmt: skip
    for i, (room, color) in enumerate(ROOMS.items()):
        left = 0.0 + 1.25 * i
        axes.add_patch(FancyBboxPatch((left, -0.55), 0.22, 0.22, boxstyle="round,pad=0,rounding_size=0.05",
                                      facecolor=color, edgecolor="#52606d", linewidth=0.8))  # fmt: skip
        axes.text(left + 0.32, -0.44, f"{room}/", fontsize=10, va="center")
    axes.text(6.4, -0.44, "boxes: what does the work · words on arrows: the contract between them", fontsize=10,
              va="center", color="#52606d")  # fmt: skip
    figure.savefig(Path("docs/images/architecture.png"), metadata={"Software": None})


def _port(name: str, side: str, other: str) -> tuple[float, float]:
    _, left, bottom, width, height, *_ = BOXES[name]
    if side in "ns":  # straight down or up where the boxes overlap
        _, other_left, _, other_width, *_ = BOXES[other]
        x = (max(left, other_left) + min(left + width, other_left + other_width)) / 2
        return x, bottom + (height if side == "n" else 0.0)
    return left + (width if side == "e" else 0.0), bottom + height / 2


def _arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:  # type: ignore[no-untyped-def]
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#52606d", "linewidth": 1.3,
                                              "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14})  # fmt: skip


if __name__ == "__main__":
    main()
