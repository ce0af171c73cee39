"""Tokenise: training shards to token shards, each with an index by shuffle key.

A token shard: `tokens.bin` (uint32 little-endian; every document as BOS + content + EOS), `index.npy` (INDEX, sorted by
key and row) and `ids.arrow` (identities, by row).
"""

from __future__ import annotations

from collections.abc import Mapping
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
INDEX = np.dtype([("key", "<u8"), ("row", "<i8"), ("start", "<i8"), ("tokens", "<i8")])
GATE_DOCUMENTS = 200


@dataclass(frozen=True)
class TokeniseSettings:
    """encoder: which of data.encoder.KINDS. boundary_split: share of combined punctuation and line breaks split."""

    seed: int
    encoder: str
    boundary_split: float


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
    """One shard. Counts: tokens, those of the documents' ends included, also by language."""
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
    place = 0
    schema = pa.schema([("id", pa.large_string())])
    with (directory / TOKENS_FILE).open("wb") as file, ipc.new_file(directory / IDS_FILE, schema) as ids:
        for batch in read_shard(shard):
            texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
            sources, identities = batch["source"].to_pylist(), batch["id"].to_pylist()
            ids.write_table(batch.select(["id"]).cast(schema))
            for i, content_N in enumerate(encoder.encode(texts)):
                key = split_key(settings.seed, sources[i], identities[i])
                content_N = splits.apply(content_N, settings.boundary_split, key)
                stored_N = np.concatenate([[special.bos], content_N, [special.eos]]).astype(TOKEN_DTYPE)
                file.write(stored_N.tobytes())
                rows.append(
                    (key64("shuffle", settings.seed, sources[i], identities[i]), len(rows), place, len(stored_N))
                )
                place += len(stored_N)
                held = totals.setdefault(languages[i], [0, 0])
                held[0] += 1
                held[1] += len(texts[i].encode())
                tokens[languages[i]] = tokens.get(languages[i], 0) + len(stored_N)
    index_D = np.array(rows, dtype=INDEX)
    np.save(directory / INDEX_FILE, index_D[np.lexsort((index_D["row"], index_D["key"]))], allow_pickle=False)
    return {"documents": totals, "tokens": tokens, "encoder": chosen}


def read_ids(path: str | Path) -> pa.ChunkedArray:
    """Identities of a token shard by row, mapped."""
    with pa.memory_map(str(path)) as file:
        return ipc.open_file(file).read_all()["id"]
