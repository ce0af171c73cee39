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
from train.checkpoint_directory import list_steps
from train.checkpoint_format import CheckpointError, step_of
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

    def rewind(self, step: int) -> list[Path]:
        """Set aside every checkpoint of a later step: the run goes on from `step`, and another future is not its own.

        Renamed, not removed (`step-N.replaced-K`), and no longer found by anything. Rank 0 calls it.
        """
        moved = []
        for directory in (self.run / ROLLING, *sorted((self.run / STAGES).glob("*"))):
            for path in list_steps(directory):
                if step_of(path.name) > step:
                    number = 1 + len(list(directory.glob(f"{path.name}.replaced-*")))
                    moved.append(path.rename(path.with_name(f"{path.name}.replaced-{number}")))
        return moved

    def latest(self, stages: list[str]) -> Latest:
        """The newest good checkpoint, if any, and why newer ones were refused; at one step a stage's end wins."""
        return find_latest([self.run / ROLLING, *(self.stage_directory(name) for name in ("initial", *stages))])


def restore(checkpoint: Checkpoint, engine: Engine, optimizer: OptimizerConfig) -> None:
    """Fill the engine from a checkpoint of any layout. CheckpointError names every tensor that does not fit."""
    moment = dtype_of(optimizer.moment_dtype)
    kinds = {"master": dtype_of(optimizer.master_dtype), "exp_avg": moment, "exp_avg_sq": moment}
    biases = {name: tuple(bias.shape) for name, bias in engine.model.router_biases().items()}

    def fits() -> None:
        differences = _differences(checkpoint, engine.config)
        try:
            checkpoint.require(engine.optimizer.shapes(), biases, kinds)
        except CheckpointError as error:
            raise CheckpointError(f"{differences}: {error}" if differences else str(error)) from None
        if differences:
            raise CheckpointError(f"{checkpoint.path} is of another model: {differences}")

    together(fits)
    engine.optimizer.load_shards(checkpoint.read)
    engine.load_biases(checkpoint.extra)


def _differences(checkpoint: Checkpoint, model: ModelConfig) -> str:
    """The model's keys that differ, but for those that only name or initialise it."""
    saved = checkpoint.state.get("config", {}).get("model", {})
    mine = asdict(model)
    keys = [key for key in mine if key not in ("name", "init_std") and key in saved and saved[key] != mine[key]]
    return ", ".join(f"model.{key} is {saved[key]} in the checkpoint and {mine[key]} here" for key in keys)
