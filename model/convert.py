"""`python -m model convert from=DIR to=DIR dtype=bfloat16|float32|float64|fp8 [shard_gb=5]`: a Hugging Face folder in
another precision, either way, one tensor in memory at a time.

FP8 is DeepSeek's block-scaled form: the linear layers only, everything else BF16. Tokenizer files go along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.errors import ModelError
from model.huggingface import DTYPES, export_model, tokenizer_files_of
from model.huggingface_folder import ReleasedFolder
from parallel.arguments import pairs

USAGE = f"usage: python -m model convert from=DIR to=DIR dtype={'|'.join(DTYPES)} [shard_gb=5]"
KEYS = ("from", "to", "dtype")


def run(arguments: Sequence[str]) -> None:
    """Shows progress; the last line is one JSON object. ModelError kinds: what is wrong."""
    try:
        given = pairs(arguments, (*KEYS, "shard_gb"), KEYS, USAGE)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if given["dtype"] not in DTYPES:
        raise ModelError(f"dtype={given['dtype']}: must be one of {', '.join(DTYPES)}")
    source = ReleasedFolder(Path(given["from"]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("tensors", total=len(source.names))
        seen: set[str] = set()

        def read(name: str) -> torch.Tensor:
            seen.add(name)
            progress.update(task, completed=len(seen))
            return source.read(name)

        files = convert(source, Path(given["to"]), DTYPES[given["dtype"]], read, _shard_bytes(given))
    print(f"{source.folder} -> {given['to']}: {given['dtype']}, {len(files)} files")
    print(json.dumps({"command": "convert", **given, "files": files}))


def convert(
    source: ReleasedFolder,
    to: Path,
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write `source` to a new folder in `dtype`; the names of its files. read: stands in for the source's own."""
    source.check_values()
    files: list[str] = []
    export_model(
        to,
        source.config,
        read or source.read,
        length=source.length,
        dtype=dtype,
        bos_id=source.values.get("bos_token_id", 0),
        eos_id=source.values.get("eos_token_id", 1),
        tokenizer_files=tokenizer_files_of(source.folder),
        shard_bytes=shard_bytes,
        progress=files.append,
    )
    return files


def _shard_bytes(given: dict[str, str]) -> int:
    text = given.get("shard_gb", "5")
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ModelError(f"shard_gb={text}: must be a number above 0")
    return round(size * 1e9)
