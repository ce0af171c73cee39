"""The pictures of a corpus: languages, what each step kept, how long documents are, groups of copies, fertility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, FAINT = "#1f2933", "#7b8794"
LANGUAGE_COLORS = {"en": "#2166ac", "zh": "#d6604d"}
MORE_COLORS = ("#1b7837", "#762a83", "#8c510a", "#01665e")
WIDTH_IN, DPI = 11.0, 130
# Step -> language -> {"documents", "bytes", ...}, as report.json has it.
Steps = Mapping[str, Mapping[str, Mapping[str, int]]]


def color(name: str, place: int) -> str:
    """A language's own colour, or the next one."""
    return LANGUAGE_COLORS.get(name, MORE_COLORS[place % len(MORE_COLORS)])


def shares_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of each language, a bar of 100 % for every measure. shares: measure -> language -> amount."""
    languages = sorted({language for row in shares.values() for language in row})
    figure = _figure(1.0 + 0.42 * len(shares))
    axes = figure.add_subplot()
    place_M = np.arange(len(shares))
    total_M = np.array([sum(row.values()) or 1 for row in shares.values()])
    left_M = np.zeros(len(shares))
    for i, language in enumerate(languages):
        width_M = 100 * np.array([row.get(language, 0.0) for row in shares.values()]) / total_M
        axes.barh(place_M, width_M, left=left_M, color=color(language, i), label=language, height=0.72)
        for place, left, width in zip(place_M.tolist(), left_M.tolist(), width_M.tolist()):
            if width >= 4:
                text = f"{width:.1f} %"
                axes.text(left + width / 2, place, text, ha="center", va="center", fontsize=8.5, color="white")
        left_M += width_M
    axes.set_yticks(place_M, list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share in %")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=8, frameon=False, fontsize=9)
    _plain(axes)
    return figure


def steps_figure(steps: Steps) -> Figure:
    """Bytes left after each step by language, stacked; the share that the step dropped at its bar's end."""
    languages = sorted({language for row in steps.values() for language in row})
    figure = _figure(1.1 + 0.42 * len(steps))
    axes = figure.add_subplot()
    place_S = np.arange(len(steps))
    left_S = np.zeros(len(steps))
    for i, language in enumerate(languages):
        width_S = np.array([row.get(language, {}).get("bytes", 0) / 1e6 for row in steps.values()])
        axes.barh(place_S, width_S, left=left_S, color=color(language, i), label=language, height=0.72)
        left_S += width_S
    before = None
    for place, (total, row) in enumerate(zip(left_S.tolist(), steps.values())):
        documents = sum(counts["documents"] for counts in row.values())
        lost = 100 * (1 - total / before) if before else 0.0
        dropped = f"  (−{lost:.2g} %)" if lost >= 0.01 else ""
        axes.text(total, place, f" {total:.3g} MB, {documents:,} documents{dropped}", va="center", fontsize=8.5)
        before = total
    axes.set_yticks(place_S, list(steps))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * left_S.max() or 1)
    axes.set_xlabel("MB of text left")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=8, frameon=False, fontsize=9)
    _plain(axes)
    return figure


def lengths_figure(length_D: Mapping[str, np.ndarray], marks: Sequence[int]) -> Figure:
    """Documents by length in tokens, and the share of tokens in documents up to that length. length_D: of each curve.
    marks: sequence lengths of the plans."""
    figure = _figure(3.6)
    left, right = figure.subplots(1, 2)
    top = max(int(lengths.max()) for lengths in length_D.values())
    edges = np.geomspace(2, max(top + 1, 4), 60)
    for i, (name, lengths) in enumerate(length_D.items()):
        shade = color(name, i)
        left.hist(lengths, bins=edges.tolist(), histtype="step", color=shade, linewidth=1.6, label=name)
        ordered = np.sort(lengths)
        right.plot(ordered, np.cumsum(ordered) / ordered.sum(), color=shade, linewidth=1.8, label=name)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("tokens of a document")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for mark in marks:
            axes.axvline(mark, color=FAINT, linewidth=0.8, linestyle=":")
        _plain(axes)
    left.set_ylabel("documents")
    right.set_ylabel("share of tokens in documents up to here")
    left.legend(frameon=False, fontsize=9)
    return figure


def copies_figure(clusters: Mapping[int, int], jaccard: Sequence[float]) -> Figure:
    """Groups of near copies by size, and the exact Jaccard of the pairs found. clusters: size -> groups."""
    figure = _figure(3.2)
    left, right = figure.subplots(1, 2)
    sizes = sorted(size for size in clusters if size > 1)
    left.bar([str(size) for size in sizes[:24]], [clusters[size] for size in sizes[:24]], color=INK)
    left.set_xlabel("documents in a group of copies")
    left.set_ylabel("groups")
    right.hist(list(jaccard), bins=np.linspace(0, 1, 41).tolist(), color=INK)
    right.set_xlabel("exact Jaccard of a pair")
    right.set_ylabel("pairs")
    for axes in (left, right):
        _plain(axes)
    return figure


def fertility_figure(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Bytes per token of each tokenizer, a bar per language."""
    languages = list(next(iter(found.values())))
    figure = _figure(1.0 + 0.28 * len(found) * len(languages))
    axes = figure.add_subplot()
    place_T = np.arange(len(found))
    height = 0.8 / len(languages)
    for i, language in enumerate(languages):
        value_T = [row[language]["bytes_per_token"] for row in found.values()]
        axes.barh(place_T + (i - (len(languages) - 1) / 2) * height, value_T, height * 0.92, color=color(language, i))
        for place, value in zip(place_T, value_T):
            axes.text(
                value,
                place + (i - (len(languages) - 1) / 2) * height,
                f" {value:.2f} {language}",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(place_T, list(found))
    axes.invert_yaxis()
    axes.set_xlabel("bytes per token (more is a shorter sequence)")
    axes.margins(x=0.12)
    _plain(axes)
    return figure


def _figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
