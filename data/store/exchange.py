"""Corpora to and from Megatron-Core's `.bin` and `.idx`: `python -m data export-megatron` and `import-megatron`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING
from tokenizers import Tokenizer

from data.config import parse_weight, parse_weights
from data.contract import Block, Manifest, Source
from data.errors import DataError, UsageError
from data.hashing import file_sha256, permutation
from data.publish import locked, published, write_file
from data.store.blocks import BLOCK_TOKENS, BlockStore, Identities, split_into_blocks, write_block
from data.store.location import Location, Remote, open_location
from data.store.manifest import FIM_IDS, FORMAT_VERSION, MANIFEST_FILE, load_manifest, with_digest, write_manifest
from data.store.megatron import Indexed, checked_documents, read_indexed, write_indexed
from data.store.names import checked_source_name

TOKENIZER_FILE = "tokenizer.json"


@dataclass
class ExportConfig:
    """`python -m data export-megatron`. corpus: directory or URL of a built corpus. out: directory that gets one
    SOURCE.bin and SOURCE.idx for each of `sources` (none: all). cache: directory for files of a corpus at a URL.
    """

    corpus: str = MISSING
    out: str = MISSING
    sources: list[str] = field(default_factory=list)
    cache: str = ""


@dataclass
class ImportSourceConfig:
    """One dataset. prefix: path without .bin and .idx. language: ISO 639-1. weight: as in a build. text_bytes: UTF-8
    bytes of the texts where they are known.
    """

    prefix: str = MISSING
    language: str = MISSING
    weight: str = "1"
    text_bytes: int = 0


@dataclass
class ImportConfig:
    """`python -m data import-megatron`. out: the corpus to make. tokenizer: the tokenizer.json that the tokens were
    made with, or a directory with one.

    add_ends: put bos_id and eos_id around every document; otherwise each must begin and end with them. shuffle: seed of
    a new order of documents; below 0 the order is kept.
    """

    out: str = MISSING
    tokenizer: str = MISSING
    sources: dict[str, ImportSourceConfig] = field(default_factory=dict)
    vocab_size: int = MISSING
    bos_id: int = 0
    eos_id: int = 1
    pad_id: int = 2
    fim_ids: list[int] = field(default_factory=list)
    add_ends: bool = False
    shuffle: int = -1
    block_tokens: int = BLOCK_TOKENS


def export_megatron(config: ExportConfig) -> dict[str, Any]:
    """Write the sources of a corpus as indexed datasets, one sequence per document, in the corpus' order.

    Returns by source what `write_indexed` says. Errors: UsageError for an unknown source, DataError, CannotWriteError.
    """
    location: Location = open_location(config.corpus, Remote(cache=config.cache))
    manifest = load_manifest(location)
    store = BlockStore(location, manifest)
    known = [source.name for source in manifest.sources]
    if unknown := sorted(set(config.sources) - set(known)):
        raise UsageError(f"sources: unknown {', '.join(unknown)}; the corpus has {', '.join(known)}")

    def parts(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in source.blocks:
            yield store.tokens(block), np.diff(store.offsets(block))

    chosen = [source for source in manifest.sources if source.name in (config.sources or known)]
    return {
        "out": config.out,
        "sources": {
            source.name: write_indexed(Path(config.out) / source.name, manifest.vocab_size, parts(source))
            for source in chosen
        },
    }


def import_megatron(config: ImportConfig) -> dict[str, Any]:
    """Make a corpus of indexed datasets. Documents of several sequences are joined; identities are their numbers.

    Returns manifest_digest and documents, sequences, tokens and blocks by source. Errors: UsageError, DataError,
    CannotWriteError, BusyError; nothing half-written is left.
    """
    _validate(config)
    tokenizer = Path(config.tokenizer)
    tokenizer = tokenizer / TOKENIZER_FILE if tokenizer.is_dir() else tokenizer
    if not tokenizer.is_file():
        raise DataError(f"tokenizer: no such file: {tokenizer}")
    content = _tokenizer(tokenizer, config.vocab_size)
    datasets = {name: read_indexed(Path(source.prefix)) for name, source in config.sources.items()}
    out = Path(config.out)
    with locked(out), published(out, MANIFEST_FILE) as directory:
        write_file(directory / TOKENIZER_FILE, content)
        manifest = with_digest(
            Manifest(
                version=FORMAT_VERSION,
                tokenizer_sha256=file_sha256(directory / TOKENIZER_FILE),
                vocab_size=config.vocab_size,
                bos_id=config.bos_id,
                eos_id=config.eos_id,
                pad_id=config.pad_id,
                sources=tuple(_import_source(directory, config, name, data) for name, data in datasets.items()),
                digest="",
                fim_ids=tuple(config.fim_ids),
            )
        )
        write_manifest(directory, manifest)
    sources = {
        source.name: {
            "documents": source.documents,
            "sequences": datasets[source.name].sequences,
            "tokens": source.tokens,
            "blocks": len(source.blocks),
        }
        for source in manifest.sources
    }
    return {"out": config.out, "manifest_digest": manifest.digest, "sources": sources}


def _import_source(directory: Path, config: ImportConfig, name: str, data: Indexed) -> Source:
    given = config.sources[name]
    count = len(data.offset_D) - 1
    if not count:
        raise DataError(f"{data.prefix}: no documents")
    length_D = np.diff(data.offset_D)
    order_D = np.arange(count) if config.shuffle < 0 else permutation(count, config.shuffle)
    ends = (config.bos_id, config.eos_id) if config.add_ends else None
    blocks: list[Block] = []
    for number, (first, last) in enumerate(split_into_blocks(length_D[order_D] + 2 * bool(ends), config.block_tokens)):
        chosen = order_D[first:last].tolist()
        documents = checked_documents(data, chosen, config.vocab_size, ends)
        _check_ends(data, chosen, documents, config)
        identities = Identities([str(document) for document in chosen])
        blocks.append(write_block(directory, name, number, documents, identities))
    tokens = sum(block.tokens for block in blocks)
    return Source(name, given.language, count, tokens, given.text_bytes, blocks, str(parse_weight(given.weight, name)))


def _check_ends(data: Indexed, numbers: Sequence[int], documents: Sequence[np.ndarray], config: ImportConfig) -> None:
    for number, document in zip(numbers, documents, strict=True):
        found = (int(document[0]), int(document[-1]))
        if len(document) < 2 or found != (config.bos_id, config.eos_id):
            raise DataError(
                f"{data.prefix}: document {number} runs from token {found[0]} to {found[1]}, not from BOS "
                f"{config.bos_id} to EOS {config.eos_id}; add_ends=true puts them around it"
            )


def _tokenizer(path: Path, vocab_size: int) -> bytes:
    """Content of a tokenizer.json. Error: DataError where it is none, or has more entries than the vocabulary."""
    try:
        content = path.read_bytes()
        entries = Tokenizer.from_str(content.decode()).get_vocab_size()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    if entries > vocab_size:
        raise DataError(f"{path}: the tokenizer has {entries} entries, vocab_size is {vocab_size}")
    return content


def _validate(config: ImportConfig) -> None:
    if not config.sources:
        raise UsageError("sources: none given; sources.NAME.prefix=PATH sources.NAME.language=CODE")
    problems = []
    for name, source in config.sources.items():
        try:
            checked_source_name(name, "sources")
        except DataError as error:
            problems.append(str(error))
        parse_weight(source.weight, f"sources.{name}.weight")
        if not source.language.isalnum():
            problems.append(f"sources.{name}.language: found '{source.language}', need a code such as en")
        if Path(source.prefix).name in ("", ".."):
            problems.append(f"sources.{name}.prefix: found '{source.prefix}', need a path without .bin and .idx")
        if source.text_bytes < 0:
            problems.append(f"sources.{name}.text_bytes: found {source.text_bytes}, need at least 0")
    if len({name.casefold() for name in config.sources}) != len(config.sources):
        problems.append(f"sources: {', '.join(config.sources)} differ only in case")
    if not 1 <= config.vocab_size <= 2**31:
        problems.append(f"vocab_size: found {config.vocab_size}, allowed 1 to {2**31}")
    if not 1 <= config.block_tokens <= 2**31:
        problems.append(f"block_tokens: found {config.block_tokens}, allowed 1 to {2**31}")
    if config.shuffle >= 2**63:
        problems.append(f"shuffle: found {config.shuffle}, allowed up to {2**63 - 1}")
    if len(config.fim_ids) not in (0, FIM_IDS):
        problems.append(f"fim_ids: found {len(config.fim_ids)}, allowed none or {FIM_IDS}")
    ids = {"bos_id": config.bos_id, "eos_id": config.eos_id, "pad_id": config.pad_id}
    ids |= {f"fim_ids.{place}": each for place, each in enumerate(config.fim_ids)}
    problems += [
        f"{key}: found {each}, allowed 0 to {config.vocab_size - 1}"
        for key, each in ids.items()
        if not 0 <= each < config.vocab_size
    ]
    if problems:
        raise UsageError("; ".join(problems))
    parse_weights({name: source.weight for name, source in config.sources.items()}, "source weights")
