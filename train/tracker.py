"""Weights & Biases, kept at arm's length: a thread of its own, a bounded queue, bounded waits.

Neither a slow start nor a dead network may hold up or stop a step. Tokens are the x-axis. `step=` is never passed: the
tracker ignores a step lower than its last one, and a run that resumes from an older checkpoint repeats steps. While
offline, every resume makes a new offline directory with the same id; `metrics.jsonl` stays the truth.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

QUEUE_LENGTH = 10_000
INIT_TIMEOUT_SECONDS = 60
FINISH_TIMEOUT_SECONDS = 30


def start_wandb(**arguments: Any) -> Any:
    """`wandb.init` with bounded waits and nothing printed."""
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS, console="off", silent=True
    )
    return wandb.init(settings=settings, **arguments)


class WandbSink:
    """mode: offline | online. A failure in the thread surfaces as the exception of the next call."""

    name = "wandb"

    def __init__(
        self,
        *,
        project: str,
        name: str,
        identifier: str,
        mode: str,
        directory: Path,
        run_config: Mapping[str, Any],
        start: Callable[..., Any] = start_wandb,
        finish_timeout: float = FINISH_TIMEOUT_SECONDS,
    ) -> None:
        arguments = {
            "project": project,
            "name": name,
            "id": identifier,
            "resume": "allow",
            "mode": mode,
            "dir": str(directory),
            "config": dict(run_config),
        }
        self._queue: queue.Queue[dict[str, float] | int] = queue.Queue(QUEUE_LENGTH)
        self._failure: Exception | None = None
        self._finish_timeout = finish_timeout
        self._thread = threading.Thread(target=self._work, args=(start, arguments), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._put({"tokens": tokens, "step": step, **values})

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        pass  # events.jsonl has them

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None:
        pass  # thousands of series at full size; load.jsonl has them

    def close(self, exit_code: int) -> None:
        self._put(exit_code)
        self._thread.join(self._finish_timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"did not finish within {self._finish_timeout:g} s; what it had not sent stays unsent")
        if self._failure is not None:
            raise self._failure

    def _put(self, item: dict[str, float] | int) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            raise TimeoutError(f"has not taken any of the last {QUEUE_LENGTH} records") from None

    def _work(self, start: Callable[..., Any], arguments: dict[str, Any]) -> None:
        try:
            run = start(**arguments)
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            while isinstance(item := self._queue.get(), dict):
                run.log(item)
            run.finish(exit_code=item)
        except Exception as error:
            self._failure = error
