"""The checkpoints of one run: `checkpoints/` rolls, `stages/NAME/` keeps the start and the end of every stage for
good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from parallel.optimizer.config import OptimizerConfig, dtype_of
from train.agree import together
from train.checkpoint import Checkpoint, Latest, find_latest, save_checkpoint
from train.checkpoint_format import CheckpointError
from train.engine import Engine

ROLLING, STAGES = "checkpoints", "stages"


class RunCheckpoints:
    """Collective: every rank calls every method together."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep

    def stage_directory(self, name: str) -> Path:
        return self.run / STAGES / name

    def save(self, step: int, engine: Engine, state: Mapping[str, Any], stage: str | None = None) -> Path:
        """Save after `step`; `stage` names a stage's end (or `initial`), which is never removed."""
        directory = self.stage_directory(stage) if stage else self.run / ROLLING
        return save_checkpoint(
            directory,
            step,
            engine.optimizer.shards(),
            engine.optimizer.shapes(),
            dict(engine.owned_biases()),
            state,
            keep=1 if stage else self.keep,
        )

    def latest(self, stages: list[str]) -> Latest:
        """The newest good checkpoint, if any, and why newer ones were refused; at one step a stage's end wins."""
        return find_latest([self.run / ROLLING, *(self.stage_directory(name) for name in ("initial", *stages))])


def restore(checkpoint: Checkpoint, engine: Engine, optimizer: OptimizerConfig) -> None:
    """Fill the engine from a checkpoint of any layout. CheckpointError names every tensor that does not fit."""
    moment = dtype_of(optimizer.moment_dtype)
    kinds = {"master": dtype_of(optimizer.master_dtype), "exp_avg": moment, "exp_avg_sq": moment}
    biases = {name: tuple(bias.shape) for name, bias in engine.model.router_biases().items()}

    def fits() -> None:
        try:
            checkpoint.require(engine.optimizer.shapes(), biases, kinds)
        except CheckpointError as error:
            raise CheckpointError(f"{_differences(checkpoint, engine.config)}{error}") from None

    together(fits)
    engine.optimizer.load_shards(checkpoint.read)
    engine.load_biases(checkpoint.extra)


def _differences(checkpoint: Checkpoint, model: ModelConfig) -> str:
    """The model's keys that explain a mismatch of tensors."""
    saved = checkpoint.state.get("config", {}).get("model", {})
    mine = asdict(model)
    keys = [key for key in mine if key != "name" and key in saved and saved[key] != mine[key]]
    said = ", ".join(f"model.{key} is {saved[key]} in the checkpoint and {mine[key]} here" for key in keys)
    return f"{said}: " if said else ""
