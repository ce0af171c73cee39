"""A Hugging Face folder read by canonical name: whole tensors, or only the rows that a rank owns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from kernels.tiles import TILE
from model.errors import CheckpointError
from model.huggingface_files import FolderFiles, read_files, read_json
from model.released import SCALE_SUFFIX, Entry, is_copy, released_entries
from model.released_config import model_config
from model.released_fp8 import from_blocks
from model.shard import DTYPES, read_rows

FLOATS = ("BF16", "F16", "F32", "F64")
FP8_NAME = "F8_E4M3"
COPY_BYTES = 2**24


class ReleasedFolder:
    """A Hugging Face folder of any of the families, read by canonical name.

    Opening it reads config.json and every file's header and raises CheckpointError listing all that is wrong: missing
    or extra files and tensors, wrong shapes and dtypes, FP8 without scales and scales without FP8, unreadable or
    truncated files, unsupported values. No weight is read before all of that fits. `config` and `length` are
    config.json's, `values` the whole of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = read_files(folder)
        self._spans = files.spans
        try:
            self.values = read_json(folder / "config.json")
            self.config, self.length = model_config(self.values, str(folder / "config.json"))
        except CheckpointError as error:
            raise CheckpointError("\n".join([str(error), *files.problems])) from None
        entries = released_entries(self.config)
        problems = files.problems + [f"{folder}: {problem}" for problem in self._check(entries, files)]
        if problems:
            raise CheckpointError("\n".join(problems))
        self._entries: dict[str, list[Entry]] = {}
        self._copies = [entry for entry in entries if is_copy(entry) and entry.name in self._spans]
        for entry in entries:
            if not is_copy(entry):
                self._entries.setdefault(entry.canonical, []).append(entry)

    def _check(self, entries: list[Entry], files: FolderFiles) -> Iterator[str]:
        """Problems of the tensors; those that a lost file may hold are not missed here."""
        spans, misplaced = files.spans, dict(files.misplaced)
        scales = {entry.scale_name: entry for entry in entries if entry.linear}
        wanted = {entry.name for entry in entries} | scales.keys()
        for entry in entries:
            span = spans.get(entry.name)
            if span is None:
                why = f" ({misplaced.pop(entry.name)})" if entry.name in misplaced else ""
                if not is_copy(entry) and not files.may_hold(entry.name):
                    yield f"{entry.name} is missing, expected shape {entry.shape}{why}"
                continue
            if span.shape != entry.shape:
                yield f"{entry.name} has shape {span.shape}, expected {entry.shape}"
            allowed = (*FLOATS, FP8_NAME) if entry.linear else FLOATS
            if span.dtype not in allowed:
                yield f"{entry.name} is {span.dtype}; {', '.join(allowed[:-1])} or {allowed[-1]} is needed"
            elif span.dtype == FP8_NAME and entry.scale_name not in spans and not files.may_hold(entry.scale_name):
                misplaced.pop(entry.scale_name, None)
                yield f"{entry.name} is {FP8_NAME} without {entry.scale_name}, expected F32 {entry.scale_shape}"
        for name, entry in scales.items():
            if name not in spans:
                continue
            if spans[name].shape != entry.scale_shape or spans[name].dtype != "F32":
                yield f"{name} is {spans[name].dtype} {spans[name].shape}, expected F32 {entry.scale_shape}"
            weight = spans.get(entry.name)
            if weight is not None and weight.dtype != FP8_NAME:
                yield f"{name} is a scale, but {entry.name} is {weight.dtype} and not {FP8_NAME}"
        for name in spans.keys() - wanted:
            misplaced.pop(name, None)
        yield from (f"{name} is not a tensor of this model" for name in spans if name not in wanted)
        yield from (f"{name} {how}" for name, how in misplaced.items())
        fp8 = any(spans[entry.name].dtype == FP8_NAME for entry in entries if entry.linear and entry.name in spans)
        if fp8 and self.values.get("quantization_config") is None:
            yield f"tensors are {FP8_NAME}, config.json has no quantization_config"

    @property
    def names(self) -> list[str]:
        """Canonical tensors, in order."""
        return list(self._entries)

    @property
    def tensors(self) -> int:
        """Tensors in the files, scales and copies included."""
        return len(self._spans)

    @property
    def dtypes(self) -> list[str]:
        """How weights are stored, as safetensors spells it, scales left out."""
        return sorted({span.dtype for name, span in self._spans.items() if not name.endswith(SCALE_SUFFIX)})

    def read(self, name: str) -> torch.Tensor:
        """Canonical tensor `name`, as `read_rows` has it. CheckpointError for an unknown name."""
        entries = self._of(name)
        return self.read_rows(name, 0, entries[-1].last_row)

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a canonical tensor in the dtype it is stored in, FP8 as code * scale in FP32. Only
        their bytes are read, and of FP8 the scales of the blocks that they touch.
        """
        entries = self._of(name)
        if not 0 <= first <= last <= entries[-1].last_row:
            raise ValueError(f"{name}: rows {first}..{last} are not within 0..{entries[-1].last_row}")
        wanted = [entry for entry in entries if entry.first_row < last and entry.last_row > first]
        if len(wanted) == 1:
            return self._rows(wanted[0], first - wanted[0].first_row, last - wanted[0].first_row)
        dtype = self._dtype(entries[0])
        for entry in entries[1:]:
            dtype = torch.promote_types(dtype, self._dtype(entry))
        value = torch.empty((last - first, *entries[0].shape[1:]), dtype=dtype)
        for entry in wanted:
            low, high = max(first, entry.first_row), min(last, entry.last_row)
            value[low - first : high - first] = self._rows(entry, low - entry.first_row, high - entry.first_row)
        return value

    def check_values(self) -> None:
        """CheckpointError listing scales that are not finite, and MTP layers' copies of embedding or head that are not
        equal to them. Reads scales and copies, a piece at a time; NaN among weights is found when they are read.
        """
        problems = [
            f"{self.folder}: {entry.scale_name} has a scale that is not finite"
            for entries in self._entries.values()
            for entry in entries
            if self._spans[entry.name].dtype == FP8_NAME
            and not read_rows(self._spans[entry.scale_name], 0, entry.scale_shape[0]).isfinite().all()
        ]
        for entry in self._copies:
            original = self._of(entry.canonical)[0]
            step = max(1, COPY_BYTES // (entry.shape[1] * 4))
            for first in range(0, entry.shape[0], step):
                last = min(first + step, entry.shape[0])
                if not torch.equal(self._rows(entry, first, last), self._rows(original, first, last)):
                    problems.append(f"{self.folder}: {entry.name} differs from {original.name}, must be a copy of it")
                    break
        if problems:
            raise CheckpointError("\n".join(problems))

    def _of(self, name: str) -> list[Entry]:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: {name} is not a tensor of this model")
        return self._entries[name]

    def _dtype(self, entry: Entry) -> torch.dtype:
        name = self._spans[entry.name].dtype
        return torch.float32 if name == FP8_NAME else DTYPES[name]

    def _rows(self, entry: Entry, first: int, last: int) -> torch.Tensor:
        span = self._spans[entry.name]
        value = read_rows(span, first, last)
        if span.dtype != FP8_NAME:
            return value
        scale = read_rows(self._spans[entry.scale_name], first // TILE, -(-last // TILE))
        try:
            return from_blocks(value, scale, first)
        except ValueError as error:
            raise CheckpointError(f"{span.path}: {entry.name} {error}") from None
