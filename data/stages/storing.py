"""The finished corpus from the outputs of the stages: blocks under their names, the manifest, packing plans.

Files are linked, not copied, where the disk allows it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from data.contract import Block, Manifest, Source
from data.errors import CannotWriteError
from data.special_tokens import special_tokens
from data.stages.contract import Counts, Task
from data.stages.marker import Done, sync
from data.stages.runner import Runner
from data.stages.shards import total
from data.store.blocks import BlockStore
from data.store.manifest import FORMAT_VERSION, MANIFEST_FILE, load_manifest, with_digest, write_manifest
from data.stream.documents import PlanKey
from data.stream.plan import count_sequences, plan_files
from data.tokenizer import TOKENIZER_FILE, load_tokenizer, padded_vocabulary

BLOCKS_AT_ONCE = 4096


@dataclass(frozen=True)
class CountSettings:
    """Blocks [first, last) of the source number `source`. first_document: number of their first document in the source.
    lengths: of sequences, in tokens.
    """

    source: int
    first: int
    last: int
    first_document: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class PlanSettings:
    """The source number `source`, counted in the inputs from the second on."""

    source: int
    lengths: tuple[int, ...]


def make_manifest(
    blocks: Mapping[str, list[Done]],
    tokens: Mapping[str, list[Done]],
    tokenizer: Done,
    languages: Mapping[str, str],
    weights: Mapping[str, Fraction],
) -> Manifest:
    """The manifest of the blocks under their final names."""
    folder = tokenizer.directory
    loaded = load_tokenizer(folder)
    special = special_tokens(loaded, folder)
    sources = []
    for name, group in blocks.items():
        listed = [replace(Block(**done.counts["block"]), number=number) for number, done in enumerate(group)]
        documents = total([done.counts for done in tokens[name]])
        sources.append(
            Source(
                name=name,
                language=languages[name],
                documents=sum(count for count, _ in documents.values()),
                tokens=sum(sum(done.counts["tokens"].values()) for done in tokens[name]),
                text_bytes=sum(size for _, size in documents.values()),
                blocks=tuple(listed),
                weight=str(weights[name]),
            )
        )
    return with_digest(
        Manifest(
            version=FORMAT_VERSION,
            tokenizer_sha256=tokenizer.outputs[TOKENIZER_FILE][1],
            vocab_size=padded_vocabulary(loaded.get_vocab_size()),
            bos_id=special.bos,
            eos_id=special.eos,
            pad_id=special.pad,
            sources=tuple(sources),
            digest="",
            fim_ids=special.fim or (),
        )
    )


def lay_out(store: Path, manifest: Manifest, blocks: Mapping[str, list[Done]], files: Mapping[str, str]) -> None:
    """The corpus under `store`, made anew: links to the outputs, and the manifest. files: others, by name: path. Error:
    CannotWriteError.
    """
    shutil.rmtree(store, ignore_errors=True)
    try:
        for source in manifest.sources:
            for done, block in zip(blocks[source.name], source.blocks, strict=True):
                made = replace(block, number=done.counts["block"]["number"])
                for here, there in zip(_files(made), _files(block), strict=True):
                    link(done.directory / here, store / there)
        for name, path in files.items():
            link(Path(path), store / name)
        write_manifest(store, manifest)
        for directory in (store, *(path for path in store.rglob("*") if path.is_dir())):
            sync(directory)
    except OSError as error:
        raise CannotWriteError(f"cannot write {store}: {error.strerror}") from None


def _files(block: Block) -> tuple[str, str, str]:
    return block.file, block.index_file, block.ids_file


def link(file: Path, place: Path) -> None:
    """`file` also at `place`: a hard link, or a flushed copy where that is impossible."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(file, place)
        sync(place)


def make_plans(runner: Runner, store: Path, manifest: Manifest, lengths: Sequence[int]) -> list[Done]:
    """Packing plans of every source."""
    place = str(store / MANIFEST_FILE)
    runner.digests.pop(place, None)
    wanted = tuple(sorted(set(lengths)))
    tasks: dict[int, list[Task]] = {}
    for number, source in enumerate(manifest.sources):
        first_document, tasks[number] = 0, []
        for first in range(0, len(source.blocks), BLOCKS_AT_ONCE):
            last = min(first + BLOCKS_AT_ONCE, len(source.blocks))
            settings = CountSettings(number, first, last, first_document, wanted)
            name = f"{source.name}.{first // BLOCKS_AT_ONCE:05d}"
            tasks[number].append(Task("plan/counts", name, (place,), settings))
            first_document += sum(source.blocks[i].documents for i in range(first, last))
    counted = iter(runner.run("plan/counts", [task for group in tasks.values() for task in group], count_blocks))
    plans = [
        Task(
            "plan/files",
            manifest.sources[number].name,
            (place, *(next(counted).file("counts.npy") for _ in group)),
            PlanSettings(number, wanted),
        )
        for number, group in tasks.items()
    ]
    return runner.run("plan/files", plans, make_plan)


def count_blocks(task: Task, directory: Path) -> Counts:
    """Sequences of each block for each length, uint32 [lengths, blocks]."""
    store = _open(task)
    settings = task.settings
    source = store.manifest.sources[settings.source]
    keys = [PlanKey(source.name, length) for length in settings.lengths]
    counts = count_sequences(store, source, keys, settings.first, settings.last, settings.first_document)
    np.save(directory / "counts.npy", counts, allow_pickle=False)
    return {}


def make_plan(task: Task, directory: Path) -> Counts:
    """The plans of one source."""
    manifest = _open(task).manifest
    settings = task.settings
    count_KB = np.concatenate([np.load(path, allow_pickle=False) for path in task.inputs[1:]], axis=1)
    size = 0
    for length, count_B in zip(settings.lengths, count_KB, strict=True):
        key = PlanKey(manifest.sources[settings.source].name, length)
        for name, content in plan_files(manifest.digest, key, count_B).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
            size += len(content)
    return {"plan_bytes": size}


def _open(task: Task) -> BlockStore:
    store = Path(task.inputs[0]).parent
    return BlockStore(store, load_manifest(store))
