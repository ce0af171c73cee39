"""The run directory: owned by one job at a time, with stop and save requests as files in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from train.errors import BusyError

STOP, SAVE, LOCK = "STOP", "SAVE", "lock"


class RunDirectory:
    """Rank 0 locks it for the life of the process (the kernel frees the lock with its owner); the other ranks only
    name it."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._lock: int | None = None
        if rank != 0:
            return
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
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

    def requests(self) -> tuple[bool, bool]:
        """(stop, save) asked for by the files STOP and SAVE, which are removed."""
        found = []
        for name in (STOP, SAVE):
            file = self.path / name
            found.append(file.exists())
            file.unlink(missing_ok=True)
        return found[0], found[1]

    def ask_to_stop(self) -> None:
        """What a signal handler does."""
        (self.path / STOP).touch()

    def close(self) -> None:
        """Let the next job in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
