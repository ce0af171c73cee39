"""Runs stages: skips what is finished, throws away what is torn, publishes the rest task by task.

A task is finished when its directory holds a marker with the digest of the same function, settings and input bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from data.errors import UsageError
from data.hashing import json_sha256
from data.publish import make_directory, writing
from data.sources.files import SourceFile, open_file, read_some
from data.stages.contract import ChainFunction, Counts, Engine, Task, TaskFunction
from data.stages.marker import Done, fresh_directory, load, publish, remove
from data.stages.progress import Progress

STAGES_FORMAT = 2
LOG_FILE = "log.jsonl"


def versions() -> dict[str, Any]:
    """What can change outputs beside settings and inputs."""
    return {"format": STAGES_FORMAT, "tokenizers": tokenizers.__version__, "unicode": unicodedata.unidata_version}


@dataclass(frozen=True)
class _Job:
    """A task on its way to the engine. parts: finished ones of a chain."""

    task: Task
    identity: str
    work: Path
    parts: tuple[Done, ...] = ()

    @property
    def place(self) -> Path:
        return self.work / self.task.stage / self.task.name

    def part(self, number: int) -> Path:
        return self.place.with_name(f"{self.task.name}.{number:05d}")


@dataclass
class Runner:
    """Runs stages under `work`. verify: compare contents of finished outputs with their markers, not only sizes.

    Stages may have parts, named "stage/part". before: stages that must be finished already; a task of theirs that is
    not is an error (UsageError). ran: how many tasks each stage had to do.
    """

    work: Path
    engine: Engine
    progress: Progress
    verify: bool = True
    workers: int = 1
    before: frozenset[str] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    ran: dict[str, dict[str, int]] = field(default_factory=dict)

    def run(self, stage: str, tasks: Sequence[Task], function: TaskFunction) -> list[Done]:
        """Finish the tasks of a stage; outcomes in the order of `tasks`. Errors: those of the tasks, UsageError."""
        jobs = [_Job(task, self._identity(task, function), self.work) for task in tasks]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(lambda job: load(job.place, self.verify), jobs))
        done = {
            job.task.name: held for job, held in zip(jobs, found) if held is not None and held.identity == job.identity
        }
        self._sweep(stage, set(done))
        self._finish(stage, [job for job in jobs if job.task.name not in done], done, partial(_run, function))
        outcomes = [done[task.name] for task in tasks]
        self._remember(outcomes)
        return outcomes

    def chain(self, stage: str, tasks: Sequence[Task], function: ChainFunction) -> list[list[Done]]:
        """Finish chains; the parts of each in order, chains in the order of `tasks`. A chain goes on after its last
        whole part.
        """
        jobs = []
        for task in tasks:
            job = _Job(task, self._identity(task, function), self.work)
            jobs.append(replace(job, parts=tuple(self._parts(job))))
        done = {job.task.name: list(job.parts) for job in jobs if job.parts and job.parts[-1].counts["last"]}
        self._sweep(stage, {part.name for job in jobs for part in job.parts})
        self._finish(stage, [job for job in jobs if job.task.name not in done], done, partial(_run_chain, function))
        outcomes = [done[task.name] for task in tasks]
        self._remember([part for parts in outcomes for part in parts])
        return outcomes

    def tasks(self, stage: str) -> dict[str, dict[str, int]]:
        """What a stage had to do and what was done before, for each of its parts."""
        return {name: counts for name, counts in self.ran.items() if name.partition("/")[0] == stage}

    def digest(self, path: str) -> str:
        """sha256 of an input, from the marker of the task that wrote it where there is one."""
        if path not in self.digests:
            digest = hashlib.sha256()
            with open_file(SourceFile(path, "", 0, "")) as file:
                while content := read_some(file, path, 1 << 20):
                    digest.update(content)
            self.digests[path] = digest.hexdigest()
        return self.digests[path]

    def _finish(self, stage: str, jobs: list[_Job], done: dict[str, Any], work: Callable[[_Job], Any]) -> None:
        self.ran[stage] = {"done_before": len(done), "done_now": len(jobs)}
        if jobs and (command := stage.partition("/")[0]) in self.before:
            finished = f"{len(done)} of {len(done) + len(jobs)} tasks done"
            raise UsageError(f"stage '{command}' is not finished ({finished}): run `python -m data {command}` first")
        make_directory(self.work / stage)
        with self.progress.stage(stage, len(done) + len(jobs)) as advance:
            for held in done.values():
                advance(_counts(held), old=True)
            for job, outcome in self.engine.map(work, jobs):
                done[job.task.name] = outcome
                advance(_counts(outcome), old=False)

    def _identity(self, task: Task, function: Callable[..., Any]) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        inputs = json_sha256([self.digest(path) for path in task.inputs])
        return json_sha256(
            {"versions": versions(), "function": name, "settings": asdict(task.settings), "inputs": inputs}
        )

    def _parts(self, job: _Job) -> list[Done]:
        parts: list[Done] = []
        while (part := load(job.part(len(parts)), self.verify)) is not None and part.identity == job.identity:
            parts.append(part)
            if part.counts["last"]:
                break
        return parts

    def _sweep(self, stage: str, keep: set[str]) -> None:
        """Throw away everything of the stage but the outputs named. Stages that must be finished are left alone."""
        place = self.work / stage
        if stage.partition("/")[0] in self.before or not place.is_dir():
            return
        with writing(place):
            for path in place.iterdir():
                if path.name not in keep:
                    remove(path)

    def _remember(self, outcomes: list[Done]) -> None:
        for done in outcomes:
            self.digests |= {done.file(name): sha256 for name, (_, sha256) in done.outputs.items()}


def _counts(outcome: Done | list[Done]) -> list[Counts]:
    return [part.counts for part in (outcome if isinstance(outcome, list) else [outcome])]


def _run(function: TaskFunction, job: _Job) -> Done:
    """In a worker: one task from its inputs to its published outputs."""
    _log(job.work, event="begun", stage=job.task.stage, task=job.place.name)
    partial_ = fresh_directory(job.place)
    with writing(partial_):
        counts = function(job.task, partial_)
    done = publish(partial_, job.place, job.identity, counts)
    _log(job.work, event="finished", stage=job.task.stage, task=job.place.name)
    return done


def _run_chain(function: ChainFunction, job: _Job) -> list[Done]:
    """In a worker: a chain from its first part that is missing to its end."""
    parts = list(job.parts)
    begun: list[Path] = []

    def fresh() -> Path:
        place = job.part(len(parts))
        _log(job.work, event="begun", stage=job.task.stage, task=place.name)
        begun.append(fresh_directory(place))
        return begun[-1]

    with writing(job.place):
        for counts in function(job.task, parts[-1].counts if parts else None, fresh):
            place = job.part(len(parts))
            parts.append(publish(begun.pop(), place, job.identity, counts))
            _log(job.work, event="finished", stage=job.task.stage, task=place.name)
    if not parts or not parts[-1].counts["last"]:
        raise AssertionError(f"{job.task.stage} {job.task.name}: the chain ended without its last part")
    return parts


def _log(work: Path, **event: object) -> None:
    # One write of less than a page in append mode: lines of several workers do not mix.
    with writing(work / LOG_FILE), (work / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**event, "time": round(time.time(), 3)}) + "\n")
