"""What a build shows while it runs: one bar per stage on a terminal, one line per stage elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console

from data.stages.contract import Counts


class Advance(Protocol):
    """Notes one finished task. counts: of its parts. old: it was finished before this run."""

    def __call__(self, counts: list[Counts], old: bool) -> None: ...


class Progress:
    """Shows stages on `console`; use within `with`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: rich_progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            columns = (
                rich_progress.TextColumn("{task.description:12}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[amount]}"),
                rich_progress.TimeElapsedColumn(),
            )
            self._bars = rich_progress.Progress(*columns, console=self.console)
            self._bars.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """A stage of `total` tasks, of which `advance` notes each that is finished."""
        documents = size = done = reused = 0
        bar = self._bars.add_task(name, total=total, amount="") if self._bars is not None else None

        def advance(counts: list[Counts], old: bool) -> None:
            nonlocal documents, size, done, reused
            done += 1
            reused += old
            for part in counts:
                for found, found_bytes in part.get("documents", {}).values():
                    documents += found
                    size += found_bytes
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=done, amount=amount(documents, size))

        yield advance
        if self._bars is None:
            was = f", {reused} done before" if reused else ""
            said = amount(documents, size)
            self.console.print(f"{name}: {done} tasks{was}{', ' if said else ''}{said}", highlight=False)


def amount(documents: int, size: int) -> str:
    """ "1,234 documents, 5.6 MB", empty for none."""
    return f"{documents:,} documents, {size / 1e6:,.1f} MB" if documents else ""
