"""Made-up English and Chinese documents, and small corpora of token blocks, for tests without downloads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.contract import Manifest, Source
from data.documents import Document
from data.store.blocks import write_block
from data.store.manifest import FORMAT_VERSION, with_digest, write_manifest

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]
SYLLABLES = ["ba", "ke", "ti", "so", "mu", "ra", "ne", "lo", "vi", "da", "th", "er"]
VOCABULARY = 512


def chinese(rng: random.Random, characters: int) -> list[str]:
    """Characters, Zipf-like, with a comma or full stop about every twelve."""
    return [rng.choice("，。") if rng.random() < 0.08 else HAN[int(800 * rng.random() ** 2)] for _ in range(characters)]


def english(rng: random.Random, words: int) -> list[str]:
    """Words of one to three syllables, each with its space."""
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) + " " for _ in range(words)]


def edited(rng: random.Random, units: list[str], share: float) -> list[str]:
    """A copy in which `share` of the units is replaced by others."""
    units = list(units)
    for place in rng.sample(range(len(units)), round(share * len(units))):
        units[place] = rng.choice(units)
    return units


def planted(seed: int, bases: int, shares: tuple[float, ...]) -> list[Document]:
    """`bases` documents of each language, and of each one copy per share of edits; ids tell base and share."""
    rng = random.Random(seed)
    documents = []
    for language, make, size in (("zh", chinese, 400), ("en", english, 300)):
        for number in range(bases):
            units = make(rng, size)
            documents.append(Document(f"{number}", "".join(units), language, language))
            for share in shares:
                documents.append(Document(f"{number}/{share}", "".join(edited(rng, units, share)), language, language))
    return documents


def write_jsonl(path: Path, documents: list[Document]) -> None:
    lines = [json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def token_corpus(directory: Path, documents: Mapping[str, int], block_documents: int = 12, seed: int = 0) -> Manifest:
    """A corpus of random tokens: per source so many documents, in blocks of `block_documents`. Token ids are
    6..VOCABULARY - 1; 3, 4 and 5 are begin, hole and end.
    """
    rng = random.Random(seed)
    sources = []
    for name, count in documents.items():
        stored = []
        for _ in range(count):
            content = [rng.randrange(6, VOCABULARY) for _ in range(int(rng.lognormvariate(3.2, 1.0)) + 1)]
            stored.append(np.array([0, *content, 1], dtype=np.uint32))
        blocks = tuple(
            write_block(directory, name, number, stored[first : first + block_documents])
            for number, first in enumerate(range(0, count, block_documents))
        )
        sources.append(Source(name, "en", count, sum(map(len, stored)), 1, blocks))
    manifest = with_digest(Manifest(FORMAT_VERSION, "0" * 64, VOCABULARY, 0, 1, 2, tuple(sources), "", (3, 4, 5)))
    write_manifest(directory, manifest)
    return manifest
