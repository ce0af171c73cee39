"""Tokenizer: trained on a weighted sample of bounded size, or taken from a folder.

Of each source, documents are taken by hash up to its share of the sample, whatever shards they lie in. Only documents
that can be in the sample are gathered: those under a key that leaves half again as much text as is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pyarrow as pa

from data.config import TokenizerConfig
from data.documents import DOCUMENTS
from data.hashing import key64
from data.special_tokens import special_tokens
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, ShardWriter, read_shard, total
from data.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    load_tokenizer,
    tokenizer_config_json,
    tokenizer_json,
    train_tokenizer,
)

SAMPLED = DOCUMENTS.append(pa.field("key", pa.uint64()))


@dataclass(frozen=True)
class SampleSettings:
    """bound: documents of smaller key are taken."""

    seed: int
    bound: int


@dataclass(frozen=True)
class TrainSettings:
    """budgets: (source, bytes), in the order in which the trainer sees them."""

    budgets: tuple[tuple[str, int], ...]
    vocab_size: int
    min_frequency: int
    max_token_length: int
    han_run: int


@dataclass(frozen=True)
class CopySettings:
    """with_config: whether the folder holds a tokenizer_config.json."""

    with_config: bool


def make_tokenizer(
    runner: Runner,
    training: Mapping[str, list[Done]],
    weights: Mapping[str, Fraction],
    config: TokenizerConfig,
    seed: int,
) -> Done:
    """The task that holds tokenizer.json and tokenizer_config.json."""
    if config.path:
        folder = Path(config.path)
        files = [folder / TOKENIZER_FILE, *([folder / CONFIG_FILE] if (folder / CONFIG_FILE).is_file() else [])]
        task = Task("tokenizer/take", "tokenizer", tuple(map(str, files)), CopySettings(len(files) > 1))
        return runner.run("tokenizer/take", [task], take_tokenizer)[0]
    budgets = {name: int(config.sample_bytes * weight / sum(weights.values())) for name, weight in weights.items()}
    sizes = {
        name: sum(size for _, size in total([part.counts for part in parts]).values())
        for name, parts in training.items()
    }
    slack = Fraction(3, 2)
    while True:
        bounds = {name: min(2**64, int(2**64 * slack * (budgets[name] + 1) / sizes[name])) for name in training}
        samples = _sample(runner, training, bounds, seed)
        held = {
            name: sum(size for done in group for _, size in done.counts["sampled"].values())
            for name, group in samples.items()
        }
        if all(held[name] >= budgets[name] or bounds[name] == 2**64 for name in training):
            break
        slack *= 2
    settings = TrainSettings(
        tuple(budgets.items()), config.vocab_size, config.min_frequency, config.max_token_length, config.han_run
    )
    inputs = tuple(done.file(SHARD_FILE) for group in samples.values() for done in group)
    return runner.run("tokenizer/train", [Task("tokenizer/train", "tokenizer", inputs, settings)], train)[0]


def _sample(
    runner: Runner, training: Mapping[str, list[Done]], bounds: Mapping[str, int], seed: int
) -> dict[str, list[Done]]:
    tasks = [
        Task("tokenizer/sample", part.name, (part.file(SHARD_FILE),), SampleSettings(seed, bounds[name]))
        for name, parts in training.items()
        for part in parts
    ]
    done = iter(runner.run("tokenizer/sample", tasks, sample_shard))
    return {name: [next(done) for _ in parts] for name, parts in training.items()}


def sample_shard(task: Task, directory: Path) -> Counts:
    """Documents of a shard that may be in the sample, with their keys."""
    with ShardWriter(directory / SHARD_FILE, SAMPLED) as shard:
        for batch in read_shard(task.inputs[0]):
            pairs = zip(batch["source"].to_pylist(), batch["id"].to_pylist(), strict=True)
            keys = [key64("sample", task.settings.seed, source, identity) for source, identity in pairs]
            keyed = batch.append_column("key", pa.array(keys, pa.uint64()))
            shard.write(keyed.filter(pa.array([key < task.settings.bound for key in keys])))
    return {"sampled": shard.totals}


def train(task: Task, directory: Path) -> Counts:
    """The tokenizer of the sample."""
    settings = task.settings
    found: dict[str, list[tuple[int, str, str]]] = {name: [] for name, _ in settings.budgets}
    for path in task.inputs:
        for batch in read_shard(path):
            for row in batch.to_pylist():
                found[row["source"]].append((row["key"], row["id"], row["text"]))
    texts, sampled = [], {}
    for name, budget in settings.budgets:
        size = 0
        for _, _, text in sorted(found.pop(name)):
            if size >= budget:
                break
            size += len(text.encode())
            texts.append(text)
        sampled[name] = size
    tokenizer = train_tokenizer(
        texts,
        TokenizerConfig(settings.vocab_size, settings.min_frequency, settings.max_token_length, settings.han_run),
    )
    (directory / TOKENIZER_FILE).write_bytes(tokenizer_json(tokenizer))
    (directory / CONFIG_FILE).write_bytes(tokenizer_config_json())
    return {"vocabulary": tokenizer.get_vocab_size(), "sampled_bytes": sampled}


def take_tokenizer(task: Task, directory: Path) -> Counts:
    """A tokenizer made elsewhere: its two files as they are. Error: DataError if it is none or has no end token."""
    tokenizer = load_tokenizer(Path(task.inputs[0]).parent)
    special_tokens(tokenizer, Path(task.inputs[0]).parent)
    for path in task.inputs:
        (directory / Path(path).name).write_bytes(Path(path).read_bytes())
    if not task.settings.with_config:
        (directory / CONFIG_FILE).write_bytes(json.dumps({}).encode() + b"\n")
    return {"vocabulary": tokenizer.get_vocab_size()}
