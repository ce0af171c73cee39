"""Tokenise: training shards to token shards, each with an index by shuffle key.

A token shard: `tokens.bin` (uint32 little-endian; every document as BOS + content + EOS), `index.npy` (INDEX, sorted by
key and row) and `ids.arrow` (identities and copies, by row). A document that is to be stored several times has as many
entries in the index, all of the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from data.boundary_split import boundary_split, split_key
from data.encoder import choose_encoder
from data.hashing import key64
from data.special_tokens import special_tokens
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, read_shard
from data.store.files import TOKEN_DTYPE
from data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, load_tokenizer

TOKENS_FILE = "tokens.bin"
INDEX_FILE = "index.npy"
IDS_FILE = "ids.arrow"
IDENTITIES = pa.schema([("id", pa.large_string()), ("copies", pa.int32())])
INDEX = np.dtype([("key", "<u8"), ("row", "<i8"), ("start", "<i8"), ("tokens", "<i8")])
GATE_DOCUMENTS = 200


@dataclass(frozen=True)
class TokeniseSettings:
    """encoder: which of data.encoder.KINDS. boundary_split: share of combined punctuation and line breaks split.
    upsample: (copies, times), rising: a document that stands for at least so many is stored so many times.
    """

    seed: int
    encoder: str
    boundary_split: float
    upsample: tuple[tuple[int, int], ...] = ()


def tokenise_shards(
    runner: Runner, training: Mapping[str, list[Done]], tokenizer: Done, settings: TokeniseSettings
) -> dict[str, list[Done]]:
    """Token shards of every source, one for each training shard."""
    parts = [(name, part) for name, group in training.items() for part in group]
    tasks = [
        Task(
            "tokenise",
            part.name,
            (part.file(SHARD_FILE), tokenizer.file(TOKENIZER_FILE), tokenizer.file(CONFIG_FILE)),
            settings,
        )
        for _, part in parts
    ]
    tokens: dict[str, list[Done]] = {name: [] for name in training}
    for (name, _), done in zip(parts, runner.run("tokenise", tasks, tokenise), strict=True):
        tokens[name].append(done)
    return tokens


def tokenise(task: Task, directory: Path) -> Counts:
    """One shard. Counts by language: documents, and tokens with those of the documents' ends, as often as they are
    stored; repeated: [documents stored more than once, documents, bytes and tokens that this adds].
    """
    settings = task.settings
    folder = Path(task.inputs[1]).parent
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, folder)
    shard = task.inputs[0]
    sample = next(read_shard(shard, ["text"]), pa.table({"text": pa.array([], pa.string())}))["text"]
    content = (folder / TOKENIZER_FILE).read_bytes()
    encoder, chosen = choose_encoder(content, settings.encoder, sample[:GATE_DOCUMENTS].to_pylist())
    splits = boundary_split(tokenizer, encoder)
    rows: list[tuple[int, int, int, int]] = []
    totals: dict[str, list[int]] = {}
    tokens: dict[str, int] = {}
    repeated: dict[str, list[int]] = {}
    place = row = 0
    with (directory / TOKENS_FILE).open("wb") as file, ipc.new_file(directory / IDS_FILE, IDENTITIES) as ids:
        for batch in read_shard(shard):
            texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
            sources, identities = batch["source"].to_pylist(), batch["id"].to_pylist()
            times_D = times_stored(batch["copies"].to_numpy(), settings.upsample)
            ids.write_table(batch.select(IDENTITIES.names).cast(IDENTITIES))
            for i, content_N in enumerate(encoder.encode(texts)):
                key = split_key(settings.seed, sources[i], identities[i])
                content_N = splits.apply(content_N, settings.boundary_split, key)
                stored_N = np.concatenate([[special.bos], content_N, [special.eos]]).astype(TOKEN_DTYPE)
                file.write(stored_N.tobytes())
                times, size, name = int(times_D[i]), len(texts[i].encode()), ("shuffle", settings.seed, sources[i])
                for repetition in range(times):
                    # The first has the key that it has without repetitions, so that nothing else changes its place.
                    key = key64(*name, identities[i], *((repetition,) if repetition else ()))
                    rows.append((key, row, place, len(stored_N)))
                place, row = place + len(stored_N), row + 1
                _count(totals, languages[i], (times, times * size))
                tokens[languages[i]] = tokens.get(languages[i], 0) + times * len(stored_N)
                if times > 1:
                    more = times - 1
                    _count(repeated, languages[i], (1, more, more * size, more * len(stored_N)))
    index_D = np.array(rows, dtype=INDEX)
    np.save(directory / INDEX_FILE, index_D[np.lexsort((index_D["row"], index_D["key"]))], allow_pickle=False)
    return {"documents": totals, "tokens": tokens, "repeated": repeated, "encoder": chosen}


def repetitions(counts: Sequence[Counts]) -> dict[str, list[int]]:
    """`repeated` of the counts of many tasks, summed by language."""
    summed: dict[str, list[int]] = {}
    for count in counts:
        for language, values in count["repeated"].items():
            _count(summed, language, values)
    return summed


def times_stored(copies_D: np.ndarray, upsample: Sequence[tuple[int, int]]) -> np.ndarray:
    """How often documents are stored, int64 [D], given how many each stands for: `times` of the largest `copies` of
    `upsample` that it reaches, else 1. FineWeb-2 (Penedo et al. 2025, arXiv 2506.20920) upsamples by cluster size so.
    """
    copies_U, times_U = np.array([(1, 1), *upsample], dtype=np.int64).T
    times_D: np.ndarray = times_U[np.searchsorted(copies_U, copies_D, side="right") - 1]
    return times_D


def _count(totals: dict[str, list[int]], language: str, values: Sequence[int]) -> None:
    held = totals.setdefault(language, [0] * len(values))
    held[:] = [a + b for a, b in zip(held, values, strict=True)]


def read_identities(path: str | Path) -> pa.Table:
    """IDENTITIES of a token shard by row, mapped."""
    with pa.memory_map(str(path)) as file:
        return ipc.open_file(file).read_all()
