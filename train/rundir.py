"""The run directory: owned by one job at a time, with stop and save requests as files in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from train.errors import BusyError, CannotWriteError
from train.metrics import write_text_atomically

STOP, SAVE, LOCK = "STOP", "SAVE", "lock"
OWN = ("config.yaml", "status.json", "metrics*.jsonl", "load*.jsonl", "timeline*.json")  # written by the job alone


class RunDirectory:
    """Rank 0 locks it for the life of the process (the kernel frees the lock with its owner); the other ranks only
    name it."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self._lock: int | None = None
        self._asked_to_stop = False
        if rank != 0:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise CannotWriteError(f"run directory {path}: {error.strerror}: {error.filename}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(descriptor, 4096).decode(errors="replace") or "an unknown process"
            os.close(descriptor)
            raise BusyError(f"run directory {path}: another job works here: {owner}") from None
        note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        self._lock = descriptor
        for name in (STOP, SAVE):  # what an earlier job was asked and did not live to do
            (path / name).unlink(missing_ok=True)
        for pattern in OWN:  # what an earlier job was writing when it was killed
            for file in path.glob(f"{pattern}.tmp-*"):
                file.unlink(missing_ok=True)

    def requests(self) -> tuple[bool, bool]:
        """(stop, save) asked of this rank: by a signal, and of rank 0 by the files STOP and SAVE, which are removed."""
        found = [False, False]
        for i, name in enumerate((STOP, SAVE) if self.rank == 0 else ()):
            file = self.path / name
            found[i] = file.exists()
            file.unlink(missing_ok=True)
        return found[0] or self._asked_to_stop, found[1]

    def ask_to_stop(self) -> None:
        """What a signal handler does. In memory: a file would outlive this job and stop the next one."""
        self._asked_to_stop = True

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run, from rank 0. CannotWriteError."""
        if self.rank != 0:
            return
        try:
            write_text_atomically(self.path / name, text)
        except OSError as error:
            raise CannotWriteError(f"{self.path / name}: {error.strerror}") from None

    def close(self) -> None:
        """Let the next job in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
