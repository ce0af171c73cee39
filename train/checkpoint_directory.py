"""A directory of checkpoints: which there are, which go, and what a killed save left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from train.checkpoint_format import MANIFEST, STEP_NAME, CheckpointError, read_manifest, step_of


def list_steps(directory: Path) -> list[Path]:
    """Published checkpoints, newest step first, good or damaged."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def clean(directory: Path) -> None:
    """Remove what a killed save left behind. Only the job that owns the run directory may call this."""
    for path in sorted(directory.glob(".step-*.*")):
        final = directory / path.name[1:].rsplit(".", 1)[0]
        if path.suffix == ".replaced" and not final.exists():
            os.rename(path, final)  # killed between the two renames: the old one is still the truth
        elif path.suffix in (".partial", ".replaced", ".deleted"):
            shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest steps; returns the deleted.

    A checkpoint with a damaged manifest is not one of the newest, so damage never costs a good one.
    """
    old, kept = [], 0
    for path in list_steps(directory):
        try:
            read_manifest(path / MANIFEST)
            kept += 1
            if kept > keep:
                old.append(path)
        except CheckpointError:
            if kept >= keep:
                old.append(path)
    for path in old:
        hidden = directory / f".{path.name}.deleted"  # a half-deleted one never looks like a checkpoint
        os.rename(path, hidden)
        shutil.rmtree(hidden)
    return old
