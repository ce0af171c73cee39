"""The ledger as tables (for the terminal and for Markdown) and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.ledger.caches import Bytes, layer_after_forward, layer_after_input_gradient, stage_after_forward
from launch.ledger.choices import EFFECTS, Choices
from launch.ledger.ledger import KINDS, Peak, Plan, RankClass, RankTimeline, Sizes, peak, rank_classes, timelines
from launch.ledger.remedies import Remedy, distinct, largest, smallest_remedy
from model.count import count_parameters

GB = 1e9


@dataclass(frozen=True)
class Grid:
    """A table: the first column is text, the others are figures unless named in `text`."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text: tuple[str, ...] = ()

    def markdown(self) -> str:
        align = ["---" if i == 0 or c in self.text else "---:" for i, c in enumerate(self.columns)]
        lines = [self.columns, tuple(align), *self.rows]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Ledger:
    """Everything that the command prints. peaks[micro_batches][class]: its fullest rank."""

    plan: Plan
    choices: Choices
    budget: int
    classes: list[RankClass]
    ranks: dict[int, list[RankTimeline]]
    peaks: dict[int, list[Peak]]
    remedy: Remedy
    remedied: dict[int, list[Peak]]

    @property
    def most(self) -> int:
        """The largest number of micro-batches, at which the tables of kinds are made."""
        return max(self.peaks)


def make_ledger(plan: Plan, choices: Choices, micro_batches: Sequence[int], budget: int) -> Ledger:
    """ValueError: numbers for which there is no table or layout."""
    ranks = {m: timelines(plan, m) for m in micro_batches}
    classes = rank_classes(plan, next(iter(ranks.values())))
    everything = [t for found in ranks.values() for t in found]
    remedy = smallest_remedy(plan, everything, choices, budget)
    remedied = _peaks(plan, classes, ranks, remedy.choices) if remedy.choices else {}
    return Ledger(plan, choices, budget, classes, ranks, _peaks(plan, classes, ranks, choices), remedy, remedied)


def _peaks(
    plan: Plan, classes: list[RankClass], ranks: dict[int, list[RankTimeline]], choices: Choices
) -> dict[int, list[Peak]]:
    sizes = Sizes(plan, choices)
    return {
        m: [max((peak(found[r], sizes) for r in c.ranks), key=lambda p: p.total) for c in classes]
        for m, found in ranks.items()
    }


def gigabytes(size: float) -> str:
    return f"{size / GB:.2f}"


def tables(ledger: Ledger) -> list[Grid]:
    """All tables, in reading order."""
    found = [_by_class(ledger), _by_micro_batches(ledger), _by_choice(ledger)]
    return [*found, _by_schedule(ledger), _cache(ledger)]


def _names(ledger: Ledger) -> tuple[str, ...]:
    return tuple("ranks " + _runs(c.ranks) for c in ledger.classes)


def _runs(numbers: Sequence[int]) -> str:
    """`0, 15` or `1-14`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _by_class(ledger: Ledger) -> Grid:
    peaks = ledger.peaks[ledger.most]
    rows: list[tuple[str, ...]] = [("stages", *(c.name for c in ledger.classes))]
    rows.append(("parameters held, billions", *(f"{c.parameters / 1e9:.3f}" for c in ledger.classes)))
    for kind in KINDS:
        if any(kind in p.lines for p in peaks):
            rows.append((kind, *(gigabytes(p.lines.get(kind, 0)) for p in peaks)))
    rows.append(("total at the fullest moment", *(gigabytes(p.total) for p in peaks)))
    rows.append(("what runs then", *(p.running for p in peaks)))
    rows.append(("chunks held, of them in the W queue", *(f"{p.chunks}, {p.queued}" for p in peaks)))
    rows.append(("total while weights are published", *(gigabytes(p.optimizer) for p in peaks)))
    title = f"GB (10^9 bytes) of the fullest rank of each class, {ledger.most} micro-batches"
    return Grid(title, ("", *_names(ledger)), rows)


def _by_micro_batches(ledger: Ledger) -> Grid:
    rows = []
    for m, peaks in ledger.peaks.items():
        after = [gigabytes(p.total) for p in ledger.remedied.get(m, [])] or ["-"] * len(peaks)
        rows.append((str(m), *(gigabytes(p.total) for p in peaks), *after))
    names = _names(ledger)
    columns = ("micro-batches", *names, *(f"{n}, remedied" for n in names))
    remedy = ledger.remedy.choices
    if remedy is None:
        said = f"no set of choices fits: {gigabytes(ledger.remedy.largest)} with all of them"
    else:
        changed = [d for d in remedy.differences() if d not in ledger.choices.differences()]
        said = f"remedied: {' '.join(changed)}" if changed else "fits as it is"
    return Grid(f"GB at the fullest moment; allowed {gigabytes(ledger.budget)}; {said}", columns, rows)


def _by_choice(ledger: Ledger) -> Grid:
    ranks = distinct(ledger.ranks[ledger.most])
    now = largest(ledger.plan, ranks, ledger.choices)
    rows: list[tuple[str, ...]] = []
    for key, values in EFFECTS.items():
        for value, effect in values.items():
            if value == getattr(ledger.choices, key):
                rows.append((f"{key}={value}", "now", effect))
                continue
            other = largest(ledger.plan, ranks, replace(ledger.choices, **{key: value}))
            rows.append((f"{key}={value}", f"{(other - now) / GB:+.2f}", effect))
    return Grid(
        f"GB that each choice alone adds to the fullest rank ({gigabytes(now)}), {ledger.most} micro-batches",
        ("choice", "GB", "effect"),
        rows,
        ("effect",),
    )


def _by_schedule(ledger: Ledger) -> Grid:
    """The same run with other schedules and lengths, on the same ranks."""
    rows = []
    changes: list[tuple[str, Plan]] = [
        (f"schedule={name}", replace(ledger.plan, schedule=name, layout="")) for name in ("zb1p", "1f1b")
    ]
    changes.append((f"length={ledger.plan.length // 2}", replace(ledger.plan, length=ledger.plan.length // 2)))
    for name, plan in [("as given", ledger.plan), *changes]:
        ranks = distinct(timelines(plan, ledger.most))
        sizes = Sizes(plan, ledger.choices)
        fullest = max((peak(t, sizes) for t in ranks), key=lambda p: p.total)
        held = sum(v for k, v in fullest.lines.items() if "weights" in k)
        state = sum(v for k, v in fullest.lines.items() if k.startswith(("grad", "FP32", "BF16 mom")))
        rest = fullest.total - held - state - fullest.lines.get("caches", 0)
        figures = (fullest.total, held, state, fullest.lines.get("caches", 0), rest)
        rows.append((name, str(fullest.rank), *map(gigabytes, figures), str(fullest.chunks)))
    title = f"GB of the fullest rank with another schedule or length, {ledger.most} micro-batches"
    columns = ("run", "rank", "total", "weights", "gradients, optimizer", "caches", "rest", "chunks")
    return Grid(title, columns, rows)


def _cache(ledger: Ledger) -> Grid:
    """One layer of each kind, tensor by tensor, and the output."""
    plan, choices = ledger.plan, ledger.choices
    parts: list[Bytes] = []
    columns = ["tensor"]
    held = {moe for contents in plan.contents for moe, _ in contents.layers(plan.model)}
    for moe in sorted(held, reverse=True):
        columns += [f"{'MoE' if moe else 'dense'}, after {op}" for op in "FI"]
        parts.append(layer_after_forward(plan.model, moe, plan.load, choices))
        parts.append(layer_after_input_gradient(plan.model, moe, plan.load, choices))
    names = list(dict.fromkeys(name for part in parts for name in part))
    rows = [(name, *(f"{part[name] / 1e6:.2f}" if name in part else "" for part in parts)) for name in names]
    rows.append(("sum", *(f"{sum(part.values()) / 1e6:.2f}" for part in parts)))
    head = next(c for c in plan.contents if c.head)
    bare = replace(head, moe=0, dense=0, mtp=0)
    alone = sum(stage_after_forward(plan.model, bare, plan.load, choices).values())
    title = (
        f"MB (10^6 bytes) that one layer keeps of one chunk of {plan.load.tokens} tokens "
        f"(final norm and head: {alone / 1e6:.2f})"
    )
    return Grid(title, tuple(columns), rows)


def figures(ledger: Ledger, files: Sequence[str]) -> dict[str, Any]:
    """What the last line says. Bytes."""
    remedy = ledger.remedy
    worst = max(p.total for peaks in ledger.peaks.values() for p in peaks)
    counted = count_parameters(ledger.plan.model)
    return {
        "schedule": ledger.plan.schedule,
        "parameters": counted.total,
        "mtp_parameters": counted.mtp,
        "budget": ledger.budget,
        "reserve": ledger.plan.reserve,
        "largest": worst,
        "fits": worst <= ledger.budget,
        "choices": ledger.choices.differences(),
        "remedy": None if remedy.choices is None else remedy.choices.differences(),
        "largest_remedied": remedy.largest,
        "classes": [
            {
                "ranks": list(c.ranks),
                "stages": c.name,
                "parameters": c.parameters,
                "peaks": {str(m): {"total": peaks[i].total, **peaks[i].lines} for m, peaks in ledger.peaks.items()},
            }
            for i, c in enumerate(ledger.classes)
        ],
        "files": list(files),
    }
