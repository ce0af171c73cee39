"""Weights out to and in from a Hugging Face folder, one canonical tensor at a time and never more than one shard in
memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import ModelConfig, config_problems
from model.errors import CannotWriteError, CheckpointError, ModelError
from model.names import canonical_shapes, is_router_bias
from model.norm import promoted
from model.released import Entry, is_copy, model_config, released_config, released_entries

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
INDEX = "model.safetensors.index.json"


def _entry_dtype(entry: Entry, dtype: torch.dtype) -> torch.dtype:
    return promoted(dtype) if is_router_bias(entry.canonical) else dtype


def plan_shards(entries: Sequence[Entry], dtype: torch.dtype, shard_bytes: int) -> list[list[Entry]]:
    """Cut the entries, in order, into files of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[Entry]] = []
    used = 0
    for entry in entries:
        size = prod(entry.shape) * _entry_dtype(entry, dtype).itemsize
        if not shards or used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def export_model(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], torch.Tensor],
    *,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    bos_id: int = 0,
    eos_id: int = 1,
    tokenizer_files: Sequence[Path] = (),
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a folder that `transformers` opens as DeepseekV3ForCausalLM.

    read: canonical name -> tensor of its canonical shape. length: the sequence length of the stage the weights come
    from, which decides whether config.json says YaRN. dtype: bfloat16, float32 or float64 (router biases at least
    float32). progress: called with each file's name once written. The folder appears under its name only when
    complete; it must not exist before. Raises ModelError for bad options, CheckpointError for a tensor of a wrong
    shape, CannotWriteError.
    """
    names = {value: key for key, value in DTYPES.items()}
    if dtype not in names:
        raise ModelError(f"export: dtype {dtype}, must be one of {', '.join(DTYPES)}")
    problems = config_problems(config)
    if problems:
        raise ModelError("\n".join(problems))
    values = released_config(config, length, names[dtype], bos_id, eos_id)
    if folder.exists():
        raise CannotWriteError(f"export: {folder} exists already; give a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(partial, config, read, dtype, shard_bytes, progress)
        _write_json(partial / "config.json", values)
        _write_json(partial / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
            _sync(partial / file.name)
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise CannotWriteError(f"export: {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[str], None] | None,
) -> None:
    shapes = canonical_shapes(config)
    shards = plan_shards(released_entries(config), dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    current, name = torch.empty(0), ""
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for entry in shard:
            if entry.canonical != name:
                name = entry.canonical
                current = read(name)
                if tuple(current.shape) != shapes[name]:
                    raise CheckpointError(f"export: {name}: shape {tuple(current.shape)}, expected {shapes[name]}")
            rows = current.detach()[entry.first_row : entry.last_row]
            tensors[entry.name] = rows.to("cpu", _entry_dtype(entry, dtype), copy=True).contiguous()
            weight_map[entry.name] = file
            total += tensors[entry.name].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
        if progress is not None:
            progress(file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


class ReleasedFolder:
    """A Hugging Face `deepseek_v3` folder, read by canonical name.

    Opening it reads config.json and every file's header and raises CheckpointError listing all that is wrong: missing
    or extra tensors, wrong shapes, unreadable or truncated files, unsupported values. `config` and `length` are
    config.json's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.length = model_config(self._json("config.json"), str(folder / "config.json"))
        problems = config_problems(self.config)
        if problems:
            raise CheckpointError("\n".join(f"{folder / 'config.json'}: {problem}" for problem in problems))
        self._files: dict[str, str] = {}
        self._entries: dict[str, list[Entry]] = {}
        for entry in released_entries(self.config):
            if not is_copy(entry):
                self._entries.setdefault(entry.canonical, []).append(entry)
        problems = self._check()
        if problems:
            raise CheckpointError("\n".join(problems))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: a JSON object is needed, found {type(value).__name__}")
        return value

    def _check(self) -> list[str]:
        if (self.folder / INDEX).exists():
            files = sorted(set(self._json(INDEX).get("weight_map", {}).values()))
        else:
            files = ["model.safetensors"]
        problems: list[str] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            path = self.folder / file
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in handle.keys():
                        part = handle.get_slice(name)
                        shapes[name] = tuple(part.get_shape())
                        self._files[name] = file
                        if not str(part.get_dtype()).startswith(("F16", "BF16", "F32", "F64")):
                            problems.append(f"{path}: {name} is {part.get_dtype()}; BF16, F16, F32 or F64 is needed")
            except (OSError, SafetensorError) as error:
                problems.append(f"{path}: cannot be read ({error})")
        wanted = {entry.name: entry for entry in released_entries(self.config)}
        for name, entry in wanted.items():
            if name not in shapes:
                if not is_copy(entry):
                    problems.append(f"{self.folder}: {name} is missing, expected shape {entry.shape}")
            elif shapes[name] != entry.shape:
                problems.append(f"{self.folder}: {name} has shape {shapes[name]}, expected {entry.shape}")
        problems += [f"{self.folder}: {name} is not a tensor of this model" for name in shapes if name not in wanted]
        return problems

    def read(self, name: str) -> torch.Tensor:
        """Canonical tensor `name` in the dtype it is stored in. Raises CheckpointError for an unknown name."""
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: {name} is not a tensor of this model")
        pieces = []
        for entry in self._entries[name]:
            with safe_open(self.folder / self._files[entry.name], framework="pt") as handle:
                pieces.append(handle.get_tensor(entry.name))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
