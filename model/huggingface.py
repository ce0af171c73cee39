"""Weights out to a Hugging Face folder, one canonical tensor in memory at a time, whatever the size of a shard.

`ReleasedFolder` (model/huggingface_folder.py) reads them in again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig, config_problems
from model.errors import CannotWriteError, CheckpointError, ModelError
from model.huggingface_files import INDEX
from model.huggingface_folder import ReleasedFolder
from model.names import canonical_shapes, is_router_bias
from model.norm import promoted
from model.released import Entry, released_entries
from model.released_config import released_config
from model.released_fp8 import FP8, to_blocks
from model.shard import ShardWriter, Stored

__all__ = ["DTYPES", "INDEX", "ReleasedFolder", "export_model", "stored_tensors", "tokenizer_files_of"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64, "fp8": FP8}


def stored_tensors(entry: Entry, dtype: torch.dtype) -> list[Stored]:
    """What is written for one released tensor: itself, and its scales after it where it is FP8.

    FP8 is for the linear layers only, everything else is then BF16. Router biases are never below FP32.
    """
    if dtype == FP8 and entry.linear:
        return [
            Stored(entry.name, FP8, entry.shape),
            Stored(entry.scale_name, torch.float32, entry.scale_shape),
        ]
    wide = torch.bfloat16 if dtype == FP8 else dtype
    return [Stored(entry.name, promoted(wide) if is_router_bias(entry.canonical) else wide, entry.shape)]


def plan_shards(entries: Sequence[Entry], dtype: torch.dtype, shard_bytes: int) -> list[list[Entry]]:
    """Cut the entries, in order, into files of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[Entry]] = []
    used = 0
    for entry in entries:
        size = sum(stored.nbytes for stored in stored_tensors(entry, dtype))
        if not shards or used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def tokenizer_files_of(folder: Path) -> list[Path]:
    """What of a tokenizer lies in `folder` and goes along with the weights."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


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
    eos_id: int | list[int] = 1,
    tokenizer_files: Sequence[Path] = (),
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a folder that `transformers` opens (DeepSeekMoE's: that the code beside DeepSeek's weights opens).

    read: canonical name -> tensor of its canonical shape. length: the sequence length of the stage the weights come
    from, which decides whether config.json says YaRN. dtype: one of `DTYPES`; see `stored_tensors`. progress: called
    with each file's name once written. The folder appears under its name only when complete; it must not exist before.
    Raises ModelError for bad options and for a model that no family can say, CheckpointError for a tensor of a wrong
    shape, CannotWriteError.
    """
    names = {value: key for key, value in DTYPES.items()}
    if dtype not in names:
        raise ModelError(f"export: dtype {dtype}, must be one of {', '.join(DTYPES)}")
    problems = config_problems(config)
    if problems:
        raise ModelError("\n".join(problems))
    wide = "bfloat16" if dtype == FP8 else names[dtype]
    values = released_config(config, length, wide, bos_id, eos_id, fp8=dtype == FP8)
    try:
        there = folder.exists()
    except OSError as error:
        raise CannotWriteError(f"export: {folder}: {error.strerror}") from error
    if there:
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
    name, current = "", torch.empty(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = [tensor for entry in shard for tensor in stored_tensors(entry, dtype)]
        with ShardWriter(folder / file, stored) as writer:
            for entry in shard:
                if entry.canonical != name:
                    # Let go of the last one before the next is read.
                    current = torch.empty(0)
                    name, current = entry.canonical, read(entry.canonical)
                    if tuple(current.shape) != shapes[name]:
                        raise CheckpointError(f"{name}: shape {tuple(current.shape)}, expected {shapes[name]}")
                _write_entry(writer, entry, current.detach()[entry.first_row : entry.last_row], dtype)
        weight_map |= {tensor.name: file for tensor in stored}
        total += sum(tensor.nbytes for tensor in stored)
        if progress is not None:
            progress(file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_entry(writer: ShardWriter, entry: Entry, rows: torch.Tensor, dtype: torch.dtype) -> None:
    stored = stored_tensors(entry, dtype)
    if len(stored) == 1:
        writer.write(entry.name, rows.to("cpu", stored[0].dtype))
        return
    codes, scale = to_blocks(rows.cpu())
    writer.write(entry.name, codes)
    writer.write(entry.scale_name, scale)
