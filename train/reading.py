"""Opening what a run left behind: its resolved configuration, and its stages' checkpoints as whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.names import canonical_shapes, is_router_bias, load_canonical
from model.rope import Rotary
from model.transformer import Transformer
from train.checkpoint import Checkpoint, CheckpointError, list_steps
from train.checkpoint_format import step_of
from train.config import RunConfig
from train.errors import ConfigError
from train.run_checkpoints import STAGES


@dataclass(frozen=True)
class StageEnd:
    """The checkpoint at the end of a stage (or `initial`), and the sequence length the model was last trained at."""

    name: str
    path: Path
    length: int


def is_file(path: Path) -> bool:
    """Whether a file is there. ConfigError: its directory does not let one look."""
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def read_config(run: Path) -> RunConfig:
    """The configuration that the run's newest stage was trained with, as its checkpoint says: `config.yaml` is of
    whoever started the run last. ConfigError: not a run directory, or another schema. CheckpointError: no checkpoint.
    """
    if not is_file(run / "config.yaml"):
        raise ConfigError(f"{run}: not a run directory, it has no config.yaml")
    steps = [steps[0] for place in (run / STAGES).glob("*") if (steps := list_steps(place))]
    if not steps:
        raise CheckpointError(f"{run}: holds no checkpoint of a stage")
    newest = Checkpoint(max(steps, key=lambda path: step_of(path.name)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), newest.state["config"])
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, KeyError) as error:
        raise ConfigError(f"{newest.path}: its configuration: {str(error).splitlines()[0]}") from None
    assert isinstance(config, RunConfig)
    return config


def stage_ends(run: Path, config: RunConfig) -> list[StageEnd]:
    """Checkpoints kept for good, in the run's order; stages not reached yet are left out. CheckpointError: none at
    all."""
    lengths = {"initial": config.stages[0].length} | {stage.name: stage.length for stage in config.stages}
    found = []
    for name, length in lengths.items():
        steps = list_steps(run / STAGES / name)
        if steps:
            found.append(StageEnd(name, steps[0], length))
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint of a stage")
    return found


class CheckpointReader:
    """A checkpoint's tensors by canonical name, whole, in FP32 masters (router biases as saved). The checkpoint is
    verified first."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.checkpoint = Checkpoint(path)
        self.checkpoint.verify()
        self._shapes = canonical_shapes(config.model)

    def __call__(self, name: str) -> torch.Tensor:
        if is_router_bias(name):
            return self.checkpoint.extra(name)
        shape = self._shapes[name]
        return self.checkpoint.read(name, "master", 0, shape[0]).view(shape)


def load_model(end: StageEnd, config: RunConfig, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Rotary]:
    """The whole model on this process, with the rotary embedding of the stage it was last trained in."""
    model = Transformer(config.model, dtype, device="meta").to_empty(device="cpu")
    load_canonical(model, CheckpointReader(end.path, config))
    return model.eval(), Rotary(config.model, end.length)
