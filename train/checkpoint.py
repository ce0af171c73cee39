"""Save and load the whole state of a run, free of layout: what one set of ranks saved, any other set can read.

A checkpoint is staged in `.step-N.partial`, every file and directory fsynced, and published by one rename, so a crash
leaves either the whole checkpoint or none. All ranks take the same decisions. `train/checkpoint_format.py` has the
files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from parallel.optimizer.contract import RowRange
from train.agree import gather_json
from train.checkpoint_directory import clean, list_steps, prune_checkpoints
from train.checkpoint_format import (
    DTYPE_CODES,
    DTYPES,
    MANIFEST,
    STATE,
    CheckpointError,
    CheckpointWriteError,
    ExtraEntry,
    FileEntry,
    Manifest,
    Slice,
    TensorEntry,
    check_plain,
    check_tiling,
    extra_key,
    manifest_text,
    read_json,
    read_manifest,
    safetensors_pieces,
    slice_key,
    step_name,
    step_of,
    sync_directory,
    write_file,
)

Shards = Iterable[tuple[RowRange, dict[str, torch.Tensor]]]
T = TypeVar("T")


# ---- saving


def save_checkpoint(
    directory: Path,
    step: int,
    shards: Shards,
    shapes: Mapping[str, tuple[int, ...]],
    extra: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Publish `directory/step-N`; collective over `group` (default: all ranks).

    shards: what this rank owns, kind -> (rows, columns). shapes: true shape of (at least) the tensors in `shards`.
    extra: small tensors that this rank is the one to save. state: plain JSON data, taken from the first rank. keep: how
    many of the newest checkpoints stay (0: all). CheckpointWriteError on every rank if one cannot write; nothing is
    then left behind.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    partial, final = directory / f".{step_name(step)}.partial", directory / step_name(step)

    def prepare() -> None:
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            clean(directory)
            partial.mkdir()

    def sweep() -> None:
        if rank == 0:
            clean(directory)

    def write() -> dict[str, Any]:
        return _write_rank(partial, rank, step, shards, shapes, extra)

    _together(group, f"checkpoint {final}", prepare)
    try:
        parts = _together(group, f"checkpoint {final}", write)

        def publish() -> None:
            if rank == 0:
                _publish(partial, final, step, parts, state)

        _together(group, f"checkpoint {final}", publish)
    except CheckpointWriteError as error:
        _together(group, f"{error}; and what it left could not be removed", sweep)
        raise

    def prune() -> None:
        if rank == 0:
            clean(directory)
            if keep > 0:
                prune_checkpoints(directory, keep)

    _together(group, f"checkpoint {final} is published, but older ones were not removed", prune)
    return final


def _together(group: dist.ProcessGroup | None, what: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; all results (JSON), or CheckpointWriteError everywhere with every rank's reason."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks must hear of it before it goes on
        failure = error
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    found = gather_json([said, result], group)
    reasons = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(found) if said is not None]
    if reasons:
        raise CheckpointWriteError(f"{what}: " + "; ".join(reasons)) from failure
    return [result for _, result in found]


def _write_rank(
    folder: Path,
    rank: int,
    step: int,
    shards: Shards,
    shapes: Mapping[str, tuple[int, ...]],
    extra: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """This rank's file; returns what the manifest needs to know of it."""
    tensors: dict[str, torch.Tensor] = {}
    slices: list[list[Any]] = []
    for rows, state in shards:
        for kind, value in state.items():
            if value.dim() != 2 or value.shape[0] != rows.last - rows.first:
                raise ValueError(
                    f"{kind} of {rows.name} rows {rows.first} to {rows.last} has shape {tuple(value.shape)}"
                )
            tensors[slice_key(rows.name, rows.first, rows.last, kind)] = value
            code = DTYPE_CODES[value.dtype]
            slices.append([rows.name, kind, rows.first, rows.last, value.shape[1], code, list(shapes[rows.name])])
    for name, value in extra.items():
        tensors[extra_key(name)] = value
    file = f"rank-{rank:05d}.safetensors"
    written = write_file(folder / file, safetensors_pieces(tensors))
    extras = {name: [list(value.shape), DTYPE_CODES[value.dtype]] for name, value in extra.items()}
    return {"step": step, "file": file, "entry": vars(written), "slices": slices, "extra": extras}


def _publish(partial: Path, final: Path, step: int, parts: list[dict[str, Any]], state: Mapping[str, Any]) -> None:
    steps = [part["step"] for part in parts]
    if set(steps) != {step}:
        raise ValueError(f"the ranks are not at one step: {steps}")
    files = {part["file"]: FileEntry(**part["entry"]) for part in parts}
    files[STATE] = write_file(partial / STATE, [json.dumps(state, indent=1, allow_nan=False).encode()])
    written_by = {"world_size": len(parts), "torch": torch.__version__}
    manifest = Manifest(step, files, _merge_tensors(parts), _merge_extra(parts), written_by)
    write_file(partial / MANIFEST, [manifest_text(manifest)])
    sync_directory(partial)
    if final.exists():  # the same step again, after a restart from an older checkpoint
        os.rename(final, final.parent / f".{final.name}.replaced")
    os.rename(partial, final)
    try:
        sync_directory(final.parent)
    except OSError:
        os.rename(final, partial)  # not known to be on disk: withdrawn, and cleaned up as any failed save
        raise


def _merge_tensors(parts: list[dict[str, Any]]) -> dict[str, TensorEntry]:
    found: dict[str, dict[str, list[tuple[Slice, str]]]] = {}
    sizes: dict[str, tuple[tuple[int, ...], int]] = {}
    for part in parts:
        for name, kind, first, last, columns, code, shape in part["slices"]:
            size = (tuple(shape), columns)
            if sizes.setdefault(name, size) != size:
                raise ValueError(f"tensor {name} is {size} on one rank and {sizes[name]} on another (shape, columns)")
            found.setdefault(name, {}).setdefault(kind, []).append((Slice(part["file"], first, last), code))
    entries = {}
    for name, kinds in sorted(found.items()):
        merged = {}
        for kind, pieces in kinds.items():
            pieces.sort(key=lambda piece: piece[0].first)
            codes = sorted({code for _, code in pieces})
            if len(codes) > 1:
                raise ValueError(f"{kind} of {name} has several dtypes: {codes}")
            merged[kind] = (codes[0], tuple(piece for piece, _ in pieces))
        entries[name] = TensorEntry(*sizes[name], merged)
        for kind, (_, slices) in merged.items():
            check_tiling(name, kind, slices, entries[name].rows)
    return entries


def _merge_extra(parts: list[dict[str, Any]]) -> dict[str, ExtraEntry]:
    merged: dict[str, ExtraEntry] = {}
    for part in parts:
        for name, (shape, code) in part["extra"].items():
            if name in merged:
                raise ValueError(f"extra tensor {name} is saved by {merged[name].file} and by {part['file']}")
            merged[name] = ExtraEntry(tuple(shape), code, part["file"])
    return merged


# ---- loading


class Checkpoint:
    """A published checkpoint, open for reading. CheckpointError: not a checkpoint, or manifest or state damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path / MANIFEST)
        self._fail_on(self.damage([STATE]))
        self.state: dict[str, Any] = read_json(path / STATE)
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return self.manifest.step

    def damage(self, files: Iterable[str] | None = None) -> list[str]:
        """Compare size and sha256 of `files` (default: all); one line for each that differs."""
        problems = []
        for name in sorted(self.manifest.files) if files is None else files:
            path, expected = self.path / name, self.manifest.files[name]
            try:
                check_plain(path)
                size = path.stat().st_size
                if size != expected.bytes:
                    problems.append(f"{path} has {size} bytes, the manifest says {expected.bytes}")
                    continue
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected.sha256:
                    problems.append(f"{path} has sha256 {found}, the manifest says {expected.sha256}")
            except CheckpointError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{path} cannot be read: {error.strerror or error}")
        return problems

    def verify(self) -> None:
        """CheckpointError naming every damaged file."""
        self._fail_on(self.damage())

    def _fail_on(self, problems: list[str]) -> None:
        if problems:
            raise CheckpointError("; ".join(problems))

    def require(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        extra: Mapping[str, tuple[int, ...]],
        kinds: Mapping[str, torch.dtype],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """CheckpointError with every mismatch unless this checkpoint is of the model whose tensors the ranks hold.

        Collective. shapes, extra: true shapes of the tensors that this rank needs. kinds: dtype of each kind of state.
        """
        wanted: dict[str, dict[str, tuple[int, ...]]] = {"tensor": {}, "extra tensor": {}}
        for mine in gather_json([dict(shapes), dict(extra)], group):
            for what, found in zip(wanted, mine, strict=True):
                wanted[what].update({name: tuple(shape) for name, shape in found.items()})
        problems = []
        for what, held in (("tensor", self.manifest.tensors), ("extra tensor", self.manifest.extra)):
            for name in sorted(set(wanted[what]) | set(held)):
                expected, entry = wanted[what].get(name), held.get(name)
                if entry is None:
                    problems.append(f"{what} {name}: found nothing, expected shape {expected}")
                elif expected is None:
                    problems.append(f"{what} {name}: found shape {entry.shape}, expected nothing of this name")
                elif entry.shape != expected:
                    problems.append(f"{what} {name}: found shape {entry.shape}, expected {expected}")
        for name, entry in self.manifest.tensors.items():
            for kind, dtype in kinds.items():
                code = entry.kinds[kind][0] if kind in entry.kinds else "nothing"
                if code != DTYPE_CODES[dtype]:
                    problems.append(f"{kind} of {name}: found {code}, expected {DTYPE_CODES[dtype]}")
        if problems:
            lines = "\n  ".join(problems)
            raise CheckpointError(f"{self.path} is of another model, {len(problems)} mismatches:\n  {lines}")

    def read(self, name: str, kind: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of `kind` (`master`, `exp_avg`, ...) of a tensor: (rows, columns), dtype as saved."""
        entry = self.manifest.tensors.get(name)
        if entry is None or kind not in entry.kinds:
            raise CheckpointError(f"{self.path} holds no {kind} of a tensor {name}")
        if not 0 <= first < last <= entry.rows:
            raise CheckpointError(f"{self.path}: {name} has rows 0 to {entry.rows}, asked for {first} to {last}")
        code, slices = entry.kinds[kind]
        out = torch.empty(last - first, entry.columns, dtype=DTYPES[code])
        for piece in slices:
            low, high = max(first, piece.first), min(last, piece.last)
            if low < high:
                key = slice_key(name, piece.first, piece.last, kind)
                shape = (piece.last - piece.first, entry.columns)
                found = self._slice(piece.file, key, shape)[low - piece.first : high - piece.first]
                if found.dtype != out.dtype:
                    raise CheckpointError(f"{self.path / piece.file}: {key} is {found.dtype}, the manifest says {code}")
                out[low - first : high - first] = found
        return out

    def extra(self, name: str) -> torch.Tensor:
        """A small tensor saved whole."""
        entry = self.manifest.extra.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} holds no extra tensor {name}")
        return self._slice(entry.file, extra_key(name), entry.shape)[...]

    def _slice(self, file: str, key: str, shape: tuple[int, ...]) -> Any:
        path = self.path / file
        try:
            if file not in self._open:
                check_plain(path)
                self._open[file] = safe_open(path, framework="pt")
            found = self._open[file].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read: {error}") from error
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(f"{path}: {key} has shape {found.get_shape()}, the manifest says {list(shape)}")
        return found


@dataclass(frozen=True)
class Latest:
    """The newest good checkpoint (None if there is none at all), and why newer ones were refused."""

    checkpoint: Checkpoint | None
    refused: list[str]


def find_latest(
    directories: Path | Sequence[Path], strict: bool = False, group: dist.ProcessGroup | None = None
) -> Latest:
    """The newest checkpoint whose every byte verifies; at one step a later directory wins. Collective, the ranks share
    the reading. CheckpointError: there are checkpoints but none is good, or `strict` and the newest is not.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    places = [directories] if isinstance(directories, Path) else list(directories)
    found = [(path.name, place, str(path)) for place, folder in enumerate(places) for path in list_steps(folder)]
    newest = sorted(found, key=lambda entry: (step_of(entry[0]), entry[1]), reverse=True)
    refused: list[str] = []
    for _, _, path in gather_json(newest, group)[0]:
        checkpoint, problems = None, []
        try:
            checkpoint = Checkpoint(Path(path))
            problems = checkpoint.damage(sorted(checkpoint.manifest.files)[rank::world])
        except CheckpointError as error:
            problems = [str(error)]
        problems = sorted({line for lines in gather_json(problems, group) for line in lines})
        if checkpoint is not None and not problems:
            return Latest(checkpoint, refused)
        refused.append(f"{path} is damaged: " + "; ".join(problems))
        if strict:
            break
    if refused:
        raise CheckpointError("no good checkpoint: " + " | ".join(refused))
    return Latest(None, [])
