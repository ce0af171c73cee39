"""The weights a run starts from, when they are a Hugging Face folder's: opened by every rank, read only where owned."""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.huggingface_folder import ReleasedFolder
from model.released_family import differing_fields
from model.rope import yarn_is_on
from train.checkpoint_format import CheckpointError


class InitialWeights:
    """A folder that holds exactly the run's model. CheckpointError, one line: not such a folder, or the fields in which
    its model differs (YaRN's only where the folder has YaRN on). `name` and `init_std` may differ.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        try:
            self.folder = ReleasedFolder(folder)
        except ModelError as error:
            raise CheckpointError("; ".join(f"initial_weights: {error}".splitlines())) from None
        found = self.folder.config
        differences = [(key, getattr(found, key), getattr(model, key)) for key in differing_fields(found, model)]
        if yarn_is_on(found, self.folder.length):
            theirs, mine = vars(found.rope_scaling), vars(model.rope_scaling)
            differences += [(f"rope_scaling.{key}", theirs[key], mine[key]) for key in mine if theirs[key] != mine[key]]
        if differences:
            text = ", ".join(
                f"model.{key} is {theirs} in the folder and {mine} here" for key, theirs, mine in differences
            )
            raise CheckpointError(f"initial_weights: {folder} is of another model: {text}")

    def check_values(self) -> None:
        """CheckpointError, one line: scales that are not finite, MTP copies that differ (they would be lost)."""
        try:
            self.folder.check_values()
        except ModelError as error:
            raise CheckpointError("; ".join(f"initial_weights: {error}".splitlines())) from None

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a canonical tensor. CheckpointError when they cannot be read."""
        try:
            return self.folder.read_rows(name, first, last)
        except ModelError as error:
            raise CheckpointError(f"initial_weights: {error}") from None
