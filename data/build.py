"""From raw documents to token blocks with a manifest: the steps of `python -m data build`, in order.

Everything in the output follows from the configuration and the bytes of the sources; the same two give the same
manifest digest. A finished build of the same two is reused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from data.clean.language import language
from data.clean.normalise import normalise
from data.config import DataConfig, parse_weight, validate
from data.contract import Manifest, Source
from data.dedup.memory import exact_duplicates, near_duplicates
from data.dedup.minhash import MinHash
from data.documents import Document, read_jsonl
from data.errors import DataError
from data.hashing import canonical_json, file_sha256, json_sha256, key64
from data.ledger import Ledger
from data.publish import locked, make_directory, published, write_file
from data.store.blocks import BlockStore, split_into_blocks, write_block
from data.store.manifest import FORMAT_VERSION, MANIFEST_FILE, load_manifest, manifest_json, verify_files, with_digest
from data.stream.mixture import Mixture
from data.stream.plan import build_plan, plan_file, plan_json
from data.tokenizer import (
    BOS_ID,
    CONFIG_FILE,
    EOS_ID,
    PAD_ID,
    TOKENIZER_FILE,
    encode,
    padded_vocabulary,
    tokenizer_config_json,
    tokenizer_json,
    train_tokenizer,
)

REPORT_FILE = "report.json"
ENCODE_BATCH = 64
Advance = Callable[[int], object]


def build(config: DataConfig, console: Console) -> dict[str, Any]:
    """Build `config.out`, or reuse it. Returns the report, which is also written there as report.json.

    Errors: UsageError for the configuration, DataError for the sources, CannotWriteError, BusyError. Nothing
    half-written is left.
    """
    validate(config)
    Mixture({name: parse_weight(source.weight, name) for name, source in config.sources.items()})
    out = Path(config.out)
    inputs = {}
    for name, source in config.sources.items():
        if not Path(source.path).is_file():
            raise DataError(f"source '{name}': no such file: {source.path}")
        inputs[name] = file_sha256(Path(source.path))
    build_digest = _build_digest(config, inputs)
    with locked(out):
        if (report := _finished(out, build_digest)) is not None:
            return {**report, "reused": True}
        with published(out, MANIFEST_FILE) as directory, _progress(console) as steps:
            report = _Build(config, directory, steps).run()
            report["build_digest"] = build_digest
            write_file(directory / REPORT_FILE, json.dumps(report, ensure_ascii=False, indent=1).encode())
    return {**report, "reused": False}


def _build_digest(config: DataConfig, inputs: dict[str, str]) -> str:
    settings = asdict(config)
    del settings["out"], settings["raw"]
    for source in settings["sources"].values():
        del source["path"]
    versions = {"format": FORMAT_VERSION, "tokenizers": tokenizers.__version__}
    return json_sha256({"settings": settings, "inputs": inputs, "versions": versions})


def _finished(out: Path, build_digest: str) -> dict[str, Any] | None:
    """The report of a whole, undamaged build of this digest in `out`; None if there is none."""
    try:
        report = json.loads((out / REPORT_FILE).read_bytes())
        if report["build_digest"] != build_digest:
            return None
        manifest = load_manifest(out)
        verify_files(out, manifest, digests=True)
        others = report["files"]
        if any(file_sha256(out / name) != sha256 for name, sha256 in others.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return dict(report)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], Advance]]:
    if not console.is_terminal:

        def line(name: str, total: int) -> Advance:
            console.print(f"{name} ({total})")
            return lambda count: None

        yield line
        return
    with Progress(console=console, transient=True) as bars:

        def bar(name: str, total: int) -> Advance:
            task = bars.add_task(name, total=total)
            return lambda count: bars.advance(task, count)

        yield bar


class _Build:
    """One build into `directory`: each method is one step."""

    def __init__(self, config: DataConfig, directory: Path, steps: Callable[[str, int], Advance]) -> None:
        self.config, self.directory, self.steps = config, directory, steps
        self.ledger = Ledger()
        self.files: dict[str, str] = {}
        self.languages = sorted({source.language for source in config.sources.values()})

    def run(self) -> dict[str, Any]:
        documents = self.clean(self.read())
        documents, removed = self.deduplicate(documents)
        training, heldout = self.split(documents)
        tokenizer = self.tokenizer(training)
        manifest = self.tokenise(training, tokenizer)
        store = BlockStore(self.directory, manifest)
        for length in self.config.plan_lengths:
            self.write(plan_file(length), plan_json(build_plan(store, length)))
        self.write(MANIFEST_FILE, manifest_json(manifest))
        return {
            "manifest_digest": manifest.digest,
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "vocabulary": tokenizer.get_vocab_size(),
            "vocabulary_padded": manifest.vocab_size,
            "steps": self.ledger.steps,
            "near_duplicates": removed,
            "languages": {language: self.summary(language, manifest, heldout[language]) for language in self.languages},
            "mixture": {source.name: source.weight for source in manifest.sources},
            "files": self.files,
        }

    def write(self, name: str, content: bytes) -> None:
        make_directory((self.directory / name).parent)
        write_file(self.directory / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()

    def read(self) -> list[Document]:
        documents = []
        advance = self.steps("read", len(self.config.sources))
        for name, source in self.config.sources.items():
            found = sorted(read_jsonl(Path(source.path), name, source.language), key=lambda document: document.id)
            for left, right in pairwise(found):
                if left.id == right.id:
                    raise DataError(f"source '{name}': {source.path}: id '{left.id}' is given twice")
            documents += found
            advance(1)
        self.ledger.record("read", documents)
        return documents

    def clean(self, documents: list[Document]) -> list[Document]:
        advance = self.steps("normalise, language", len(documents))
        normalised = [replace(document, text=normalise(document.text)) for document in documents]
        normalised = [document for document in normalised if document.text]
        self.ledger.record("normalised", normalised)
        kept = []
        for document in normalised:
            if language(document.text) == document.language:
                kept.append(document)
            advance(1)
        self.ledger.record("language", kept)
        return kept

    def deduplicate(self, documents: list[Document]) -> tuple[list[Document], list[dict[str, Any]]]:
        documents = [d for d, keep in zip(documents, exact_duplicates(documents).keep, strict=True) if keep]
        self.ledger.record("exact dedup", documents)
        settings = self.config.dedup
        parameters = MinHash(settings.shingle, settings.bands, settings.rows, settings.seed)
        found = near_duplicates(documents, parameters, settings.threshold, self.steps("near dedup", len(documents)))
        removed = [
            {"source": documents[i].source, "removed": documents[i].id, "kept": documents[int(found.survivor[i])].id}
            for i in np.flatnonzero(~found.keep).tolist()
        ]
        documents = [document for document, keep in zip(documents, found.keep, strict=True) if keep]
        self.ledger.record("near dedup", documents)
        return documents, removed

    def split(self, documents: list[Document]) -> tuple[list[Document], dict[str, list[Document]]]:
        """Whole documents held out by hash, after dedup, so that none of them has a copy in training."""
        heldout: dict[str, list[Document]] = {}
        chosen = set()
        for language_ in self.languages:
            group = [document for document in documents if document.language == language_]
            if len(group) < 2:
                raise DataError(f"language '{language_}': {len(group)} documents left after cleaning, need at least 2")
            count = min(len(group) - 1, max(1, round(len(group) * self.config.heldout_share)))
            group.sort(key=lambda document: key64("heldout", self.config.seed, document.source, document.id))
            heldout[language_] = sorted(group[:count], key=lambda document: (document.source, document.id))
            chosen |= {(document.source, document.id) for document in heldout[language_]}
            lines = [canonical_json({"id": d.id, "text": d.text, "source": d.source}) for d in heldout[language_]]
            self.write(f"heldout/{language_}.jsonl", b"\n".join(lines) + b"\n")
        training = [document for document in documents if (document.source, document.id) not in chosen]
        self.ledger.record("held out", training)
        empty = [name for name in self.config.sources if all(document.source != name for document in training)]
        if empty:
            raise DataError(f"source '{empty[0]}': no documents left to train on")
        return training, heldout

    def tokenizer(self, training: list[Document]) -> Tokenizer:
        advance = self.steps("train tokenizer", 1)
        tokenizer = train_tokenizer(self.sample(training), self.config.tokenizer)
        self.write(TOKENIZER_FILE, tokenizer_json(tokenizer))
        self.write(CONFIG_FILE, tokenizer_config_json())
        advance(1)
        return tokenizer

    def sample(self, training: list[Document]) -> Iterator[str]:
        """Texts to train the tokenizer on: of each source, documents by hash up to its share of `sample_bytes`."""
        weights = {name: parse_weight(source.weight, name) for name, source in self.config.sources.items()}
        for name, weight in weights.items():
            budget = int(self.config.tokenizer.sample_bytes * weight / sum(weights.values()))
            group = [document for document in training if document.source == name]
            for document in sorted(group, key=lambda document: key64("sample", self.config.seed, name, document.id)):
                if budget <= 0:
                    break
                budget -= document.bytes
                yield document.text

    def tokenise(self, training: list[Document], tokenizer: Tokenizer) -> Manifest:
        advance = self.steps("tokenise", len(training))
        sources = []
        for name, source in self.config.sources.items():
            group = [document for document in training if document.source == name]
            group.sort(key=lambda document: key64("shuffle", self.config.seed, name, document.id))
            arrays = _with_ends(tokenizer, [document.text for document in group], advance)
            ranges = split_into_blocks([len(array) for array in arrays], self.config.block_tokens)
            blocks = []
            for number, (first, last) in enumerate(ranges):
                stem = f"blocks/{name}/{number:06d}"
                blocks.append(write_block(self.directory, stem, arrays[first:last]))
                self.write(f"{stem}.ids.json", canonical_json([document.id for document in group[first:last]]))
            tokens = sum(len(array) for array in arrays)
            size = sum(document.bytes for document in group)
            weight = str(parse_weight(source.weight, name))
            sources.append(Source(name, source.language, len(group), tokens, size, tuple(blocks), weight))
        return with_digest(
            Manifest(
                version=FORMAT_VERSION,
                tokenizer_sha256=self.files[TOKENIZER_FILE],
                vocab_size=padded_vocabulary(tokenizer.get_vocab_size()),
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                sources=tuple(sources),
                digest="",
            )
        )

    def summary(self, language_: str, manifest: Manifest, heldout: list[Document]) -> dict[str, Any]:
        sources = [source for source in manifest.sources if source.language == language_]
        tokens, size = sum(source.tokens for source in sources), sum(source.text_bytes for source in sources)
        documents = sum(source.documents for source in sources)
        rows = [row[language_] for row in self.ledger.steps.values()]
        dropped = {step: row[language_]["dropped_documents"] for step, row in self.ledger.steps.items()}
        if rows[0]["documents"] != documents + sum(dropped.values()):
            raise AssertionError(f"{language_}: documents kept and dropped do not add up: {rows}")
        return {
            "documents_read": rows[0]["documents"],
            "exact_duplicates": dropped["exact dedup"],
            "near_duplicates": dropped["near dedup"],
            "heldout_documents": len(heldout),
            "heldout_bytes": sum(document.bytes for document in heldout),
            "documents": documents,
            "bytes": size,
            "tokens": tokens,
            "bytes_per_token": size / (tokens - 2 * documents),
            "blocks": sum(len(source.blocks) for source in sources),
        }


def _with_ends(tokenizer: Tokenizer, texts: Sequence[str], advance: Advance) -> list[np.ndarray]:
    """BOS + tokens + EOS of each text, uint32."""
    arrays = []
    for first in range(0, len(texts), ENCODE_BATCH):
        batch = encode(tokenizer, texts[first : first + ENCODE_BATCH])
        arrays += [np.concatenate([[BOS_ID], content, [EOS_ID]]).astype(np.uint32) for content in batch]
        advance(len(batch))
    return arrays
