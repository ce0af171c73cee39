"""Where a run stands: everything but tensors that it needs to continue bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """step, tokens: of the whole run. stage: index; stage_step, stage_tokens, sample: within it.

    started: each stage's first blocks of each source. bad_steps: skipped steps in a row; skipped: in all. updates:
    optimizer updates done. tracker_id: the wandb run. stream: the stream's own position. There is no random number
    generator to carry: nothing random is drawn while training.
    """

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_tokens: int = 0
    sample: int = 0
    updates: int = 0
    skipped: int = 0
    bad_steps: int = 0
    tracker_id: str = ""
    started: dict[str, int] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as it is kept in a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> RunState:
        """The inverse of `to_json`."""
        return RunState(**value)
