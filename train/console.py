"""The console: one line per step, and a progress bar when there is a terminal to draw it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table


class ConsoleSink:
    """`total_tokens`: what the whole run will have consumed, for progress and time left."""

    name = "console"

    def __init__(
        self,
        total_tokens: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_tokens
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._skipped = 0.0
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(), console=self._console
            )
            self._task = self._progress.add_task("training", total=total_tokens)
            self._progress.start()

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        left = self._time_left(tokens)
        if self._progress is not None:
            self._progress.update(self._task, completed=tokens, description=f"step {step}, {left} left")
        if "train/loss" in values:
            total = values.get("optim/skipped", 0)  # of the run so far
            skipped, self._skipped = total > self._skipped, total
            self._console.print(
                step_line(step, tokens, self._total, values, left, skipped), markup=False, soft_wrap=True
            )
        else:  # an evaluation or another figure that belongs to no training step
            shown = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
            self._console.print(f"step {step:>6}  {shown}", markup=False, soft_wrap=True)

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        if kind == "optimizer_groups":
            self._console.print(groups_table(cast("Sequence[Mapping[str, Any]]", fields["groups"])))
            return
        if kind == "kernels":
            table = cast("Mapping[str, str]", fields["table"])
            fields = dict(table)
        shown = ", ".join(f"{name} {value}" for name, value in fields.items())
        self._console.print(
            f"-- {kind.replace('_', ' ')}" + (f": {shown}" if shown else ""), markup=False, soft_wrap=True
        )

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None:
        pass  # too much for a line; max_vio tells the worst of it

    def close(self, exit_code: int) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _time_left(self, tokens: int) -> str:
        now = self._clock()
        if self._first is None:
            self._first = (now, tokens)
        start, before = self._first
        if tokens <= before or now <= start:
            return "?"
        return duration((self._total - tokens) * (now - start) / (tokens - before))


def step_line(step: int, tokens: int, total: int, values: Mapping[str, float], left: str, skipped: bool) -> str:
    """Fixed columns, so that the eye can run down one; a figure that was not logged is left out."""
    columns = [f"step {step:>6}", f"tokens {short(tokens):>6} ({100 * tokens / max(total, 1):5.1f}%)"]
    for title, name, form in (
        ("loss", "train/loss", "{:7.4f}"),
        ("mtp", "train/loss_mtp", "{:7.4f}"),
        ("lr", "optim/lr", "{:.2e}"),
        ("norm", "optim/grad_norm", "{:8.3g}"),
        ("max_vio", "moe/max_vio", "{:5.2f}"),
    ):
        if name in values:
            columns.append(f"{title} {form.format(values[name])}")
    if "perf/tokens_per_s" in values:
        columns.append(f"{short(values['perf/tokens_per_s']):>6} tok/s")
    columns.append(f"left {left}")
    if skipped:
        columns.append("SKIPPED (norm not finite)")
    return "  ".join(columns)


def groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """The optimizer's groups (fields of `model.groups.GroupSummary`), a line each."""
    table = Table(title="optimizer groups", title_justify="left", box=None, pad_edge=False)
    table.add_column("group")
    for title in ("tensors", "parameters", "rate", "decay"):
        table.add_column(title, justify="right")
    table.add_column("")
    for group in groups:
        factor, decay = group["learning_rate_factor"], group["weight_decay"]
        table.add_row(
            group["group"],
            f"{group['tensors']:,}",
            short(group["parameters"]),
            "-" if factor is None else f"x {factor:g}",
            "-" if decay is None else f"{decay:g}",
            group["note"],
        )
    return table


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Rounded down to what matters: 45s, 12m05s, 3h20m, 4d07h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
