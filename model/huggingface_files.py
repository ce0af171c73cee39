"""The files of a Hugging Face folder and what its index says of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.shard import Span, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass
class FolderFiles:
    """spans: every tensor of the files that can be read. problems: of files and index, one line each. misplaced: tensor
    -> how index and files disagree about it. excused: tensors that a missing or unreadable file may hold; None: any.
    """

    spans: dict[str, Span] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    misplaced: dict[str, str] = field(default_factory=dict)
    excused: set[str] | None = field(default_factory=set)

    def may_hold(self, name: str) -> bool:
        """Whether a file that could not be read may hold `name`."""
        return self.excused is None or name in self.excused


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError, one line, when it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, found {type(value).__name__}")
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map names to files")
    return found


def read_files(folder: Path) -> FolderFiles:
    """Every file's header against the index, or `model.safetensors` alone where there is no index."""
    found = FolderFiles()
    try:
        names = set(os.listdir(folder))
        (folder / INDEX).exists()  # a directory may be listed and yet not entered
    except OSError as error:
        return FolderFiles(problems=[f"{folder}: cannot be read ({error.strerror})"], excused=None)
    present = {name for name in names if name.endswith(".safetensors")}
    if INDEX not in names:
        if SINGLE not in present:
            return FolderFiles(problems=[f"{folder}: neither {INDEX} nor {SINGLE} is there"], excused=None)
        weight_map, files, named = None, {SINGLE}, f"without {INDEX} only {SINGLE} is read"
    else:
        try:
            weight_map = _weight_map(folder)
        except CheckpointError as error:
            return FolderFiles(problems=[str(error)], excused=None)
        files, named = set(weight_map.values()), f"{INDEX} does not name it"
    lost = files - present
    found.problems += [f"{folder}: {file} is missing, {INDEX} names it" for file in sorted(lost)]
    found.problems += [f"{folder}: {file} is not a file of this model, {named}" for file in sorted(present - files)]
    for file in sorted(files & present):
        try:
            header = read_header(folder / file)
        except CheckpointError as error:
            found.problems.append(str(error))
            lost.add(file)
            continue
        for name, span in header.items():
            if weight_map is not None and weight_map.get(name) != file:
                says = f"{INDEX} says {weight_map[name]}" if name in weight_map else f"{INDEX} does not name it"
                found.misplaced[name] = f"is in {file}, {says}"
            found.spans.setdefault(name, span)
    for name, file in (weight_map or {}).items():
        if file not in lost and name not in found.spans:
            found.misplaced[name] = f"is not in {file}, {INDEX} says so"
    found.excused = {name for name, file in (weight_map or {}).items() if file in lost}
    if weight_map is None and lost:
        found.excused = None
    return found
