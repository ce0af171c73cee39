"""The report's pictures. Each function takes the record and returns a figure, or None where there is nothing to draw.

One colour per meaning in all of them: stages are grey bands, languages keep their colours, baselines are dashed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from train.console import short
from train.record import RunRecord, label_name, language_name
from train.verdict import loss_spikes

INK, FAINT, BAND = "#1f2933", "#7b8794", "#f1f4f7"
LANGUAGE_COLORS = {"en": "#2166ac", "zh": "#d6604d"}
MORE_COLORS = ("#1b7837", "#762a83", "#8c510a", "#01665e")
BASELINES = (
    ("zlib", "zlib -9"),
    ("token_unigram", "token unigram"),
    ("token_bigram", "token bigram"),
    ("character_bigram", "character bigram"),
)
POINTS = 1500  # a curve has at most this many points; more is not visible
HEATMAP_LAYERS, HEATMAP_COLUMNS = 12, 240
WIDTH_IN, DPI = 11.0, 130


def loss_figure(run: RunRecord) -> Figure | None:
    """Loss by stage and language, with learning rate and gradient norm under it on the same axis."""
    if not run.has("train/loss"):
        return None
    below = [name for name in ("optim/lr", "optim/grad_norm") if run.has(name)]
    figure = _figure(4.6 + 1.35 * len(below))
    grid = figure.add_gridspec(1 + len(below), 1, height_ratios=[4.2] + [1.0] * len(below), hspace=0.16)
    axes = figure.add_subplot(grid[0])
    _stage_bands(axes, run, named=True)
    for i, source in enumerate(run.sources()):
        color = _color(source, i)
        tokens, loss = thin(*run.logged(f"train/loss/{source}"))
        axes.plot(tokens, loss, color=color, linewidth=0.6, alpha=0.22)
        axes.plot(tokens, smooth(loss), color=color, linewidth=1.8, label=language_name(source))
    if run.has("train/loss_mtp"):
        tokens, loss = thin(*run.logged("train/loss_mtp"))
        axes.plot(tokens, smooth(loss), color=FAINT, linewidth=1.3, linestyle=":", label="MTP (one token further)")
    tokens, loss = thin(*run.logged("train/loss"))
    axes.plot(tokens, loss, color=INK, linewidth=0.6, alpha=0.2)
    axes.plot(tokens, smooth(loss), color=INK, linewidth=2.2, label="all text")
    _mark(axes, run)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    last = axes
    for row, name in enumerate(below, start=1):
        last = figure.add_subplot(grid[row], sharex=axes)
        _stage_bands(last, run)
        tokens, values = thin(*run.logged(name))
        last.plot(tokens, values, color=INK, linewidth=1.3)
        last.set_ylabel({"optim/lr": "learning\nrate", "optim/grad_norm": "gradient\nnorm"}[name], fontsize=9)
        finite = values[np.isfinite(values)]
        if name == "optim/grad_norm" and finite.min() > 0:
            last.set_yscale("log")
            ticks = np.geomspace(finite.min(), finite.max(), 3)
            last.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
            last.yaxis.set_minor_locator(NullLocator())
        elif name == "optim/lr":
            last.set_ylim(bottom=0)
    _token_axis(last, run)
    for upper in figure.axes[:-1]:
        upper.tick_params(labelbottom=False)
    return figure


def evaluation_figure(run: RunRecord) -> Figure | None:
    """Bits per byte over context length, a panel per language, beside what simple compressors reach."""
    languages = list(dict.fromkeys(row.language for row in run.rows if row.label != "before"))
    if not languages:
        return None
    figure = _figure(4.7)
    for i, language in enumerate(languages):
        axes = figure.add_subplot(1, len(languages), i + 1)
        _evaluation_panel(axes, run, language, _color(language, i))
        if i == 0:
            axes.set_ylabel("bits per byte (lower is better)")
    figure.subplots_adjust(wspace=0.58, left=0.06, right=0.87)
    return figure


def _evaluation_panel(axes: Axes, run: RunRecord, language: str, color: str) -> None:
    rows = [row for row in run.rows if row.language == language]
    labels = [label for label in dict.fromkeys(row.label for row in rows) if label != "before"]
    levels = [(title, run.baselines.get(language, {}).get(key)) for key, title in BASELINES]
    known = sorted((value, title) for title, value in levels if value is not None)
    heights = [row.bits_per_byte for row in rows if row.label != "before"] + [value for value, _ in known]
    heights += [row.one_token for row in rows if row.label == labels[-1] and row.one_token]
    low, high = min(heights), max(heights)
    pad = 0.08 * max(high - low, 0.1)
    before = [row.bits_per_byte for row in rows if row.label == "before"]
    axes.set_ylim(low - 1.5 * pad, high + (2.6 if before else 1) * pad)
    for (value, title), y in zip(known, _spread([value for value, _ in known], 1.1 * pad), strict=True):
        axes.axhline(value, color=FAINT, linewidth=1.0, linestyle="--", zorder=1)
        axes.annotate(
            f"{title} {value:.2f}", (1.0, y), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", fontsize=8.5, color=FAINT, va="center", annotation_clip=False,
        )  # fmt: skip
    for n, label in enumerate(labels):
        points = sorted((row.context, row.bits_per_byte) for row in rows if row.label == label)
        strength = 0.35 + 0.65 * (n + 1) / len(labels)
        axes.plot(*zip(*points, strict=True), "o-", color=color, alpha=strength, linewidth=1.2 + strength,
                  markersize=5, label=label_name(label), zorder=3)  # fmt: skip
    final = sorted((row.context, row.bits_per_byte) for row in rows if row.label == labels[-1])
    axes.annotate(f"{final[-1][1]:.2f}", final[-1], xytext=(0, -13), textcoords="offset points", ha="center",
                  fontsize=10, fontweight="bold", color=color)  # fmt: skip
    single = sorted((row.context, row.one_token) for row in rows if row.label == labels[-1] and row.one_token)
    if single:
        axes.plot(*zip(*single, strict=True), "o:", color=color, markerfacecolor="white", markersize=5, linewidth=1.2,
                  label="the last one, seeing one token only", zorder=2)  # fmt: skip
    if before:
        text = f"↑ before training {min(before):.2f}"
        axes.text(0.03, 0.97, text, transform=axes.transAxes, fontsize=9, va="top", color=FAINT)
    contexts = sorted({row.context for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0] / 1.35, contexts[-1] * 1.35)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context length (tokens)")
    axes.set_title(language_name(language), loc="left", fontweight="bold", fontsize=12, color=color)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, fontsize=8.5)
    _plain(axes)


def expert_figure(run: RunRecord) -> Figure | None:
    """Load of each expert over the steps, a heatmap per layer, and the worst imbalance under them."""
    if not run.load:
        return None
    layers = list(run.load)
    if len(layers) > HEATMAP_LAYERS:
        layers = [layers[i] for i in np.linspace(0, len(layers) - 1, HEATMAP_LAYERS).round().astype(int)]
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    has_vio = run.has("moe/max_vio")
    figure = _figure(0.9 + 1.9 * rows + (1.9 if has_vio else 0))
    heights = [1.9 * rows, 1.6] if has_vio else [1.0]
    upper, *lower = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    grid = upper.add_gridspec(rows, columns, left=0.06, right=0.87, hspace=0.5, wspace=0.16)
    norm = TwoSlopeNorm(1.0, 0.0, 2.0)
    for i, layer in enumerate(layers):
        axes = upper.add_subplot(grid[i // columns, i % columns])
        steps, load = run.load[layer]
        share = _bins(load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12), HEATMAP_COLUMNS)
        extent = (float(steps[0]) - 0.5, float(steps[-1]) + 0.5, load.shape[1] - 0.5, -0.5)
        image = axes.imshow(share.T, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest", extent=extent)
        axes.set_title(f"layer {layer}", loc="left", fontsize=10)
        axes.set_ylabel("expert", fontsize=9)
        axes.tick_params(labelsize=8)
        if i // columns == rows - 1:
            axes.set_xlabel("step", fontsize=9)
    bar = upper.colorbar(image, cax=upper.add_axes((0.885, 0.15, 0.013, 0.7)), ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0 (dead)", "½", "1 (even)", "1½", "2 or more"], fontsize=8.5)
    bar.set_label("load / mean", fontsize=9)
    if lower:
        axes = lower[0].add_axes((0.06, 0.3, 0.81, 0.5))
        _stage_bands(axes, run, named=True)
        tokens, vio = thin(*run.logged("moe/max_vio"))
        axes.plot(tokens, vio, color=INK, linewidth=0.6, alpha=0.25)
        axes.plot(tokens, smooth(vio), color=INK, linewidth=1.8)
        axes.set_ylabel("max_vio", fontsize=9)
        axes.set_ylim(bottom=0)
        _token_axis(axes, run)
    return figure


def throughput_figure(run: RunRecord) -> Figure | None:
    if not run.has("perf/tokens_per_s"):
        return None
    figure = _figure(2.9)
    axes = figure.add_subplot()
    _stage_bands(axes, run, named=True)
    tokens, rate = thin(*run.logged("perf/tokens_per_s"))
    axes.plot(tokens, rate, color=INK, linewidth=0.6, alpha=0.25)
    axes.plot(tokens, smooth(rate), color=INK, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    _token_axis(axes, run)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 3 % of the record; what is not finite leaves no trace in its neighbours."""
    half = max(1, len(values) // 60)
    finite = np.isfinite(values)
    padded = np.where(finite, values, 0.0)
    sums, counts = np.cumsum(np.r_[0.0, padded]), np.cumsum(np.r_[0, finite])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)


def thin(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of equal runs of steps (NaN if one of them is, so that a break stays visible)."""
    if len(values) <= POINTS:
        return tokens, values
    return _bins(tokens[:, None].astype(float), POINTS)[:, 0], _bins(values[:, None], POINTS)[:, 0]


def _bins(table: np.ndarray, most: int) -> np.ndarray:
    if len(table) <= most:
        return table
    starts = np.linspace(0, len(table), most + 1).astype(int)[:-1]
    return np.add.reduceat(table, starts) / np.diff(np.r_[starts, len(table)])[:, None]


def _mark(axes: Axes, run: RunRecord) -> None:
    """Skipped steps and spikes as ticks at the foot of the loss."""
    for title, places, color in (
        ("skipped step", run.skips(), "#b2182b"),
        ("loss spike", loss_spikes(run), "#e08214"),
    ):
        if len(places):
            axes.plot(places, np.full(len(places), 0.02), "^", color=color, markersize=7, label=title,
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip


def _stage_bands(axes: Axes, run: RunRecord, named: bool = False) -> None:
    whole, ends = max(float(run.tokens[-1]), 1.0), [-np.inf, -np.inf]  # where the last label of each row ends
    for i, (name, first, last) in enumerate(run.stages):
        if i % 2:
            axes.axvspan(first, last, color=BAND, zorder=0)
        if i:
            axes.axvline(first, color="#cbd2d9", linewidth=0.8, zorder=0)
        if named and name:
            middle, half = (first + last) / 2, 0.0045 * len(name) * whole
            middle = min(middle, whole - half)
            row = 0 if middle - half > ends[0] else 1
            ends[row] = middle + half
            axes.annotate(name, (middle, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 2 + 11 * row),
                          textcoords="offset points", ha="center", va="bottom", fontsize=9, color=FAINT)  # fmt: skip
    _plain(axes)


def _token_axis(axes: Axes, run: RunRecord) -> None:
    axes.set_xlim(0, float(run.tokens[-1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("tokens trained on")


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _color(source: str, index: int) -> str:
    return LANGUAGE_COLORS.get(source, MORE_COLORS[index % len(MORE_COLORS)])


def _spread(values: list[float], gap: float) -> Iterator[float]:
    """Positions for labels of ascending `values`, pushed up where they would overlap."""
    last = -np.inf
    for value in values:
        last = max(value, last + gap)
        yield last


def _figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure
