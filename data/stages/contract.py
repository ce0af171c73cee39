"""A stage is a list of tasks from files to files, and an engine is what runs them.

Task functions are pure: what they write follows from the bytes of the inputs and from the settings, never from the
place, the number of workers or the order in which tasks run. They must be importable by name, since an engine may run
them in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Counts = dict[str, Any]
"""What a task has to say beside its files, plain JSON. "documents": {language: [documents, UTF-8 bytes]} is shown."""


@dataclass(frozen=True)
class Task:
    """One unit of work. name: unique in its stage, names its outputs. inputs: files it reads, whose digests go into
    its marker. settings: frozen dataclass, picklable, of JSON-able fields, without paths of this machine.
    """

    stage: str
    name: str
    inputs: tuple[str, ...]
    settings: Any


TaskFunction = Callable[[Task, Path], Counts]
"""Writes the task's output files into the given empty directory and returns its counts."""

ChainFunction = Callable[[Task, Counts | None, Callable[[], Path]], Iterator[Counts]]
"""Writes outputs part by part, for inputs that are read in one direction only. Called with the counts of the last
finished part (None: from the start) and with a function that gives the empty directory of the next part; yields the
counts of each part after writing it, the last with `"last": True`. Every part is published on its own."""


class Engine(Protocol):
    """Runs independent pieces of work."""

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """(item, result) of each item as it is finished, in any order. After an error nothing new is begun, what runs
        is finished, and the error of the earliest item is raised.
        """
        ...
