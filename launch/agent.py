"""torchrun's agent, but one that does not wait long for the ranks that a failed one leaves behind.

torch's own gives them 30 s after a failure, whatever `shutdown_timeout` says (`SubprocessContext._poll`), and the whole
of that timeout after a stop signal. A process stopped by SIGSTOP, or hung in a driver, uses all of it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from train.errors import PREEMPTED

# Survivors notice a closed connection at once, and a silent peer at the same timeout as each other.
FAILURE_SECONDS = 5.0
POLL_SECONDS = 0.05


class Agent(LocalElasticAgent):
    """Kills whatever is left `FAILURE_SECONDS` after the first failure. overdue: the ranks that it killed."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.overdue: set[int] = set()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if _any_failed(self._codes()):
            self._wait(FAILURE_SECONDS, "the first failure")
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                handler.close(death_sig)
        self._wait(timeout, death_sig.name)
        super()._shutdown(death_sig, timeout)

    def _handlers(self) -> dict[int, SubprocessHandler]:
        return self._pcontext.subprocess_handlers if isinstance(self._pcontext, SubprocessContext) else {}

    def _codes(self) -> dict[int, int | None]:
        return {rank: handler.proc.poll() for rank, handler in self._handlers().items()}

    def _wait(self, seconds: float, since: str) -> None:
        """Until all ranks have ended, or that long; those left are killed. A failure meanwhile shortens it."""
        deadline, failed = time.monotonic() + seconds, since == "the first failure"
        while None in (codes := self._codes()).values():
            if not failed and _any_failed(codes):
                seconds, since, failed = FAILURE_SECONDS, "the first failure", True
                deadline = min(deadline, time.monotonic() + seconds)
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        for local_rank in [r for r, code in codes.items() if code is None]:
            rank, handler = self._worker_group.workers[local_rank].global_rank, self._handlers()[local_rank]
            who = f"bireme: rank {rank} (process {handler.proc.pid})"
            print(f"{who} was still silent {seconds:g} s after {since}: killed", file=sys.stderr, flush=True)
            self.overdue.add(rank)
            handler.close(signal.SIGKILL)


def _any_failed(codes: Mapping[int, int | None]) -> bool:
    """Ranks that were asked to stop and have saved a checkpoint may take their time."""
    return any(code not in (None, 0, PREEMPTED) for code in codes.values())
