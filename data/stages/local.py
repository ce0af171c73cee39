"""The embedded engine: worker processes on this machine, or none at all for one worker.

Workers end with the process that started them, whichever way it ended: a thread in each waits on a pipe whose other
end only that process holds. They also share a lock, so that a build started again waits until none is left.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from data.errors import BusyError, CannotWriteError, DataError, WorkerLostError

T = TypeVar("T")
R = TypeVar("R")

LOCK_FILE = "workers.lock"
OWNER_FILE = "build.lock"
LOCK_SECONDS = 10.0
# One thread each: the processes are the parallelism.
THREADS = {
    "OMP_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    life: Connection
    item: int | None = None


@dataclass
class LocalEngine:
    """Engine of `workers` processes. work: directory of the locks that it and its workers hold; another engine there is
    refused (BusyError). Use within `with`.
    """

    workers: int
    work: Path
    _pool: list[_Worker] = field(default_factory=list)
    _owned: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> LocalEngine:
        with ExitStack() as held:
            held.enter_context(_held(self.work / OWNER_FILE, fcntl.LOCK_EX, 0.0, "another build is at work there"))
            with _held(self.work / LOCK_FILE, fcntl.LOCK_EX, LOCK_SECONDS):
                pass
            self._owned = held.pop_all()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._stop()
        self._owned.close()

    def _stop(self) -> None:
        for worker in self._pool:
            worker.process.kill()
        for worker in self._pool:
            worker.process.join()
            worker.pipe.close()
            worker.life.close()
        self._pool.clear()

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """See `data.stages.contract.Engine`. Error: WorkerLostError naming the item of a worker that died."""
        if self.workers == 1 or len(items) <= 1:
            yield from ((item, function(item)) for item in items)
            return
        while len(self._pool) < min(self.workers, len(items)):
            self._pool.append(self._start())
        waiting = list(range(len(items)))[::-1]
        errors: dict[int, Exception] = {}
        idle = list(self._pool)
        while True:
            while idle and waiting and not errors:
                worker = idle.pop()
                worker.item = waiting.pop()
                worker.pipe.send((function, items[worker.item]))
            busy = {worker.pipe: worker for worker in self._pool if worker.item is not None}
            if not busy:
                break
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                number, worker.item = worker.item, None
                assert number is not None
                try:
                    error, result = worker.pipe.recv()
                except (EOFError, OSError):
                    errors[number] = self._lost(worker, items[number])
                    continue
                idle.append(worker)
                if error is not None:
                    errors[number] = error
                else:
                    yield items[number], result
        if errors:
            raise errors[min(errors)]

    def _start(self) -> _Worker:
        context = get_context("spawn")
        here, there = context.Pipe()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(there, ours, str(self.work / LOCK_FILE)), daemon=True)
        # An interrupt from the terminal reaches workers too; it must not before they know that it is not theirs.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            with _environment(THREADS):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        there.close()
        ours.close()
        return _Worker(process, here, theirs)

    def _lost(self, worker: _Worker, item: object) -> WorkerLostError:
        worker.process.join()
        self._pool.remove(worker)
        worker.pipe.close()
        worker.life.close()
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        task: Any = getattr(item, "task", item)
        what = f"stage '{task.stage}', task '{task.name}'" if hasattr(task, "stage") else str(task)
        return WorkerLostError(f"{what}: its worker process was {how} (out of memory?); run again to go on from there")


def _work(pipe: Connection, life: Connection, lock: str) -> None:
    """Body of a worker process."""
    Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _held(Path(lock), fcntl.LOCK_SH, LOCK_SECONDS):
        while True:
            try:
                function, item = pipe.recv()
            except EOFError:
                return
            answer: tuple[Exception | None, Any]
            try:
                answer = (None, function(item))
            except DataError as error:
                answer = (error, None)
            except Exception:
                answer = (RuntimeError(f"in a worker process:\n{traceback.format_exc()}"), None)
            pipe.send(answer)


def _end_with_parent(life: Connection) -> None:
    try:
        life.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def _held(
    path: Path, kind: int, seconds: float, busy: str = "worker processes of another build are still at work"
) -> Iterator[None]:
    limit = time.monotonic() + seconds
    try:
        lock = path.open("w")
    except OSError as error:
        raise CannotWriteError(f"cannot write {path}: {error.strerror}") from None
    with lock as file:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise BusyError(f"{path.parent}: {busy}") from None
                time.sleep(0.05)
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What child processes started inside inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
