"""Runs stages of tasks with nothing around them: markers, digests and flushes to disk are not what is measured.

run = PlainRun(directory, processes=2)
deduplicate(run, shards, settings)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data.stages.contract import Task, TaskFunction


@dataclass(frozen=True)
class Finished:
    """A finished task: the directory of its outputs, and its counts."""

    directory: Path
    counts: dict[str, Any]

    def file(self, name: str) -> str:
        return str(self.directory / name)


@dataclass(frozen=True)
class PlainRun:
    """Outputs go below `work`. processes: 1 runs the tasks in this process."""

    work: Path
    processes: int = 1

    def __call__(self, stage: str, tasks: Sequence[Task], function: TaskFunction) -> list[Finished]:
        places = [self.work / stage / task.name for task in tasks]
        for place in places:
            place.mkdir(parents=True)
        if self.processes == 1 or len(tasks) == 1:
            counts = list(map(function, tasks, places))
        else:
            with ProcessPoolExecutor(self.processes, mp_context=get_context("forkserver")) as pool:
                counts = list(pool.map(function, tasks, places))
        return [Finished(place, count) for place, count in zip(places, counts, strict=True)]


def peak_bytes() -> int:
    """Most memory this program held. Unlike `ru_maxrss`, which keeps what the parent held before exec."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
