"""The one metrics call: every observable figure of a run goes through `Metrics.log`.

Names are `group/name` (`train/loss`, `moe/max_vio`). Values are already reduced by the rank that owns them; only global
rank 0 holds sinks. `metrics.jsonl` in the run directory is the truth; a sink that fails is dropped with a warning and
never stops training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Sink(Protocol):
    """Console, JSONL, wandb. `log` may raise: the caller then drops the sink."""

    name: str

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Metrics(Protocol):
    """What the training loop calls, on every rank; a no-op but on rank 0."""

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Record `values` at optimizer step `step`, after `tokens` real tokens."""
        ...

    def event(self, kind: str, **fields: object) -> None:
        """Append one line to events.jsonl (checkpoint saved, stage began, resumed, stopped)."""
        ...

    def close(self, exit_code: int) -> None: ...
