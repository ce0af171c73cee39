"""Made-up corpora for `benchmarks/stream.py` and what their packing costs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain_stages import peak_bytes
from data.contract import Block, Manifest, Source
from data.hashing import key64
from data.publish import make_directory
from data.store.blocks import BLOCK_TOKENS, BlockStore, split_into_blocks, write_block
from data.store.manifest import FORMAT_VERSION, load_manifest, with_digest, write_manifest
from data.store.table import BLOCK_DTYPE, BlockTable
from data.stream.documents import PlanKey
from data.stream.packing import pack
from data.stream.plan import build_plans, plan_files
from data.stream.stream import open_stream

VOCABULARY, FIM_IDS = 129_280, (3, 4, 5)
MEAN_TOKENS, SIGMA = 1200, 1.0
LARGE_TOKENS = 14_800_000_000_000
PLANNED_BLOCKS = 100


def document_lengths(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Log-normal lengths of mean MEAN_TOKENS, BOS and EOS included, of about `tokens` together, int64."""
    mu = np.log(MEAN_TOKENS) - SIGMA**2 / 2
    length_D = np.maximum(rng.lognormal(mu, SIGMA, int(1.2 * tokens / MEAN_TOKENS)).astype(np.int64), 3)
    return length_D[: int(np.searchsorted(np.cumsum(length_D), tokens)) + 1]


def make_corpus(directory: Path, tokens: int, seed: int) -> Manifest:
    """One source of random tokens in blocks of BLOCK_TOKENS."""
    rng = np.random.default_rng(seed)
    length_D = document_lengths(rng, tokens)
    blocks = []
    for number, (first, last) in enumerate(split_into_blocks(length_D, BLOCK_TOKENS)):
        offset_D = np.concatenate([[0], np.cumsum(length_D[first:last])])
        token_N = rng.integers(6, VOCABULARY, int(offset_D[-1]), dtype=np.uint32)
        token_N[offset_D[:-1]], token_N[offset_D[1:] - 1] = 0, 1
        blocks.append(write_block(directory, "made", number, np.split(token_N, offset_D[1:-1])))
    total = sum(block.tokens for block in blocks)
    source = Source("made", "en", len(length_D), total, 0, blocks)
    write_manifest(directory, _manifest(source))
    return load_manifest(directory)


def packing(directory: Path, length: int, seed: int = 0) -> dict[str, Any]:
    """What packing costs over all sources of a corpus, without fill-in-the-middle.

    padding: share of the positions of all sequences but the emptiest of each block, where its remainder lies.
    cut_shorter: documents no longer than a sequence that were cut. concat_cut: share of documents that
    concatenating and cutting every `length` tokens would cut.
    """
    manifest = load_manifest(directory)
    store = BlockStore(directory, manifest)
    empty = positions = empty_all = positions_all = documents = longer = cut_shorter = concat_cut = 0
    for source in manifest.sources:
        before = 0
        for block in source.blocks:
            offset_D = store.offsets(block)
            length_D = np.diff(offset_D)
            packed = pack(length_D, length, key64("documents", seed, source.name, 0, block.number))
            fill_S = np.sort(packed.labels(0))
            empty_all += int((length - fill_S).sum())
            positions_all += len(fill_S) * length
            empty += int((length - fill_S[1:]).sum())
            positions += (len(fill_S) - 1) * length
            pieces_D = np.bincount(packed.document_P, minlength=len(length_D))
            cut_shorter += int((pieces_D[length_D <= length] != 1).sum())
            longer += int((length_D > length).sum())
            documents += len(length_D)
            start_D = before + offset_D[:-1]
            concat_cut += int((start_D // length != (start_D + length_D - 1) // length).sum())
            before += block.tokens
    return {
        "padding": empty / positions if positions else None,
        "padding_with_last": empty_all / positions_all,
        "documents": documents,
        "tokens": sum(source.tokens for source in manifest.sources),
        "cut_shorter": cut_shorter,
        "cut_longer": longer / documents,
        "concat_cut": concat_cut / documents,
    }


def large(directory: Path, length: int, seed: int) -> dict[str, Any]:
    """A manifest and plan of LARGE_TOKENS: time and size of the plan from PLANNED_BLOCKS blocks, and the opening."""
    part, whole = directory / "part", directory / "whole"
    rng = np.random.default_rng(seed)
    blocks = [_index_only(part, number, document_lengths(rng, BLOCK_TOKENS)) for number in range(PLANNED_BLOCKS)]
    tokens = sum(block.tokens for block in blocks)
    write_manifest(part, _manifest(Source("made", "en", sum(b.documents for b in blocks), tokens, 0, blocks)))
    planned = {rate: build_plans(part, [length], fim_rates=[rate]) for rate in (0.0, 0.1)}
    count = round(LARGE_TOKENS / (tokens / PLANNED_BLOCKS))

    one = make_corpus(directory / "one", BLOCK_TOKENS, seed).sources[0].blocks[0]
    record_B = np.repeat(_record(one), count)
    record_B["first_document"] = np.arange(count, dtype=np.uint64) * np.uint64(one.documents)
    record_B["first_token"] = np.arange(count, dtype=np.uint64) * np.uint64(one.tokens)
    source = Source("made", "en", one.documents * count, one.tokens * count, 0, BlockTable("made", record_B))
    manifest = _manifest(source)
    write_manifest(whole, manifest)
    key = PlanKey("made", length)
    offset_D = np.load(directory / "one" / one.index_file)
    sequences = pack(np.diff(offset_D), length, 0).sequences
    (whole / "plans").mkdir()
    plan_bytes = 0
    for name, content in plan_files(manifest.digest, key, np.full(count, sequences, np.uint32)).items():
        (whole / name).write_bytes(content)
        plan_bytes += len(content)
    sample = int(rng.integers(sequences * count))
    # All blocks are alike; only the one that holds the sample needs to be there.
    number = _block_of(whole, length, sample)
    (whole / "blocks" / "made").mkdir()
    for suffix in (".bin", ".npy"):
        os.link(directory / "one" / f"blocks/made/000000{suffix}", whole / f"blocks/made/{number:06d}{suffix}")
    command = [sys.executable, str(Path(__file__).resolve()), str(whole), str(length), str(sample)]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    scale = count / PLANNED_BLOCKS
    return {
        "tokens": source.tokens,
        "blocks": count,
        "plan_bytes": plan_bytes,
        "table_bytes": (whole / "blocks" / "made.npy").stat().st_size,
        "plan_core_hours": planned[0.0]["seconds"] * scale / 3600,
        "fim_plan_core_hours": planned[0.1]["seconds"] * scale / 3600,
        "sample": sample,
        **sorted(found, key=lambda each: each["open_and_seek_seconds"])[1],
    }


def _record(block: Block) -> np.ndarray:
    """A table of one block under its digests."""
    record_B = np.zeros(1, dtype=BLOCK_DTYPE)
    record_B["documents"], record_B["tokens"] = block.documents, block.tokens
    for field in ("sha256", "index_sha256"):
        record_B[field] = np.frombuffer(bytes.fromhex(getattr(block, field)), dtype=np.uint8)
    return record_B


def _index_only(directory: Path, number: int, length_D: np.ndarray) -> Block:
    """A block whose tokens nobody reads: only its index is there."""
    offset_D = np.concatenate([[0], np.cumsum(length_D)])
    buffer = io.BytesIO()
    np.save(buffer, offset_D)
    index_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    block = Block("made", number, len(length_D), int(offset_D[-1]), "0" * 63 + "1", index_sha256)
    make_directory((directory / block.file).parent)
    (directory / block.index_file).write_bytes(buffer.getvalue())
    return block


def _manifest(source: Source) -> Manifest:
    manifest = Manifest(FORMAT_VERSION, "0" * 64, VOCABULARY, 0, 1, 2, (source,), "", FIM_IDS)
    return with_digest(manifest)


def _block_of(directory: Path, length: int, sample: int) -> int:
    stream = open_stream(directory, length, mtp_depth=1, seed=7, stage="large", verify=False)
    return int(stream._locate(np.array([sample]))[2][0])


def _opened(directory: Path, length: int, sample: int) -> None:
    """In a fresh process: open, seek, read; prints seconds and the most memory held."""
    started, processor = time.perf_counter(), time.process_time()
    stream = open_stream(directory, length, mtp_depth=1, seed=7, stage="large", verify=False)
    opened = time.perf_counter()
    block = int(stream._locate(np.array([sample]))[2][0])
    sought = time.perf_counter()
    spent, sought_bytes = time.process_time() - processor, peak_bytes()
    batch = stream.read([sample])
    read = time.perf_counter()
    figures = {
        "open_seconds": opened - started,
        "open_and_seek_seconds": sought - started,
        "open_and_seek_processor_seconds": spent,
        "first_read_seconds": read - sought,
        "open_and_seek_bytes": sought_bytes,
        "first_read_bytes": peak_bytes(),
        "block": block,
        "real_tokens": int(batch.real.sum()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    _opened(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
