"""The one metrics call: every observable figure of a run goes through `Metrics.log`.

Names are `group/name` (`train/loss`, `moe/max_vio`). Values are already reduced by the rank that owns them; counts
(`optim/skipped`) are of the run so far. Only global rank 0 holds sinks. `metrics.jsonl` in the run directory is the
truth; a sink that fails is dropped with a warning and never stops training.

Files of a run directory written here: `metrics.jsonl` (a line per call of `log`), `events.jsonl`, `load.jsonl` (tokens
per expert), `status.json` (what the run is doing now).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Console, JSONL, wandb. A method may raise: the caller then drops the sink."""

    name: str

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None: ...

    def event(self, kind: str, fields: Mapping[str, object]) -> None: ...

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Metrics(Protocol):
    """What the training loop calls, on every rank; a no-op but on rank 0."""

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Record `values` at optimizer step `step`, after `tokens` real tokens."""
        ...

    def event(self, kind: str, **fields: object) -> None:
        """Append one line to events.jsonl (checkpoint saved, stage began, resumed, stopped)."""
        ...

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None:
        """Record, by layer, how many tokens each of its routed experts received in `step`."""
        ...

    def close(self, exit_code: int) -> None: ...


class RunMetrics:
    """Hands every call to each sink in turn, the truth first."""

    def __init__(self, sinks: Sequence[Sink] = (), warn: Callable[[str], None] | None = None) -> None:
        self._sinks = list(sinks)
        self._warn = warn or (lambda message: print(message, file=sys.stderr, flush=True))

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of the sinks that still work."""
        return tuple(sink.name for sink in self._sinks)

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        if not self._sinks:
            return
        numbers = {name: plain_number(name, value) for name, value in values.items()}
        self._each(lambda sink: sink.log(step, tokens, numbers))

    def event(self, kind: str, **fields: object) -> None:
        self._each(lambda sink: sink.event(kind, fields))

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None:
        self._each(lambda sink: sink.expert_load(step, loads))

    def close(self, exit_code: int) -> None:
        # The truth last: it still has to take the note that another sink failed to close.
        while self._sinks:
            sink = self._sinks[-1]
            self._each(lambda last: last.close(exit_code), [sink])
            if sink in self._sinks:
                self._sinks.remove(sink)

    def _each(self, call: Callable[[Sink], None], sinks: Sequence[Sink] | None = None) -> None:
        dropped = []
        for sink in list(self._sinks if sinks is None else sinks):
            try:
                call(sink)
            except Exception as error:  # whatever a tracker, a disk or a terminal raises must not stop the run
                self._sinks.remove(sink)
                dropped.append((sink.name, error))
        for name, reason in dropped:
            self._warn(f"warning: metrics sink {name!r} failed and is dropped: {type(reason).__name__}: {reason}")
            self.event("sink_dropped", sink=name, error=f"{type(reason).__name__}: {reason}")


def plain_number(name: str, value: Any) -> float:
    """int or float of a number, numpy scalar or one-element tensor; a TypeError for what is none."""
    if isinstance(value, (bool, int, float)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {name!r} must be one number, found {type(value).__name__}: {value!r}") from None


def open_metrics(
    run_dir: Path,
    *,
    rank: int,
    step: int,
    total_tokens: int,
    tracker_id: str,
    wandb: str = "offline",
    project: str = "bireme",
    console: bool = True,
    run_config: Mapping[str, Any] | None = None,
) -> RunMetrics:
    """Metrics of a run that starts or resumes after `step` (0: from the beginning), planned for `total_tokens`.

    Whatever the files hold of later steps is set aside first, so that they read as one history. `tracker_id` is made
    once (`new_tracker_id`) and lives in the run's state. wandb: offline | online | disabled. Ranks other than 0 get
    metrics without sinks.
    """
    if wandb not in ("offline", "online", "disabled"):
        raise ValueError(f"logging.wandb is {wandb!r}; allowed: offline, online, disabled")
    if rank != 0:
        return RunMetrics()
    # Here, because these bring in rich and (in its own thread) wandb, which other ranks need not load.
    from train.console import ConsoleSink
    from train.history import JsonLinesSink, rewind
    from train.tracker import WandbSink

    rewind(run_dir, step)
    sinks: list[Sink] = [JsonLinesSink(run_dir)]
    if console:
        sinks.append(ConsoleSink(total_tokens))
    if wandb != "disabled":
        sinks.append(
            WandbSink(
                project=project,
                name=run_dir.name,
                identifier=tracker_id,
                mode=wandb,
                directory=run_dir,
                run_config=dict(run_config or {}),
            )
        )
    return RunMetrics(sinks)


def new_tracker_id() -> str:
    """An id for a new run, to be kept in its state and checkpoints."""
    return secrets.token_hex(6)


def write_status(run_dir: Path, state: str, **fields: object) -> None:
    """Replace `status.json` with {"state", "time" (seconds since 1970), ...}; readers never see half of it.

    state: starting | running | saving | evaluating | done | preempted | failed.
    """
    write_text_atomically(run_dir / "status.json", json.dumps({"state": state, "time": time.time(), **fields}) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write to a temporary name beside `path`, make it durable, rename."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
