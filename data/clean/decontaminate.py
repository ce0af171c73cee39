"""Benchmark texts kept out of training: a document that shares a run of 10 tokens with one is marked.

Tokens are those of near-dedup (data/dedup/fold.py): folded, one per CJK character, one per word of other scripts, so
that spacing, case, width and punctuation hide nothing. GPT-3 (Brown et al. 2020, appendix C) took 13-grams of words;
10 finds more, and chance matches of 10 tokens are quotations.

Shapes: G n-grams, K pairs of n-gram and text, D documents, N n-grams of one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.dedup.minhash import shingle_sets, shingles, tokens
from data.errors import DataError
from data.hashing import UINT64

NGRAM = 10
BATCH = 256


@dataclass(frozen=True)
class Match:
    """A document (source, id) that shares `ngrams` distinct n-grams with benchmark text `benchmark`."""

    source: str
    id: str
    benchmark: str
    ngrams: int


@dataclass(frozen=True)
class BenchmarkIndex:
    """Of benchmark texts. ngram_G: sorted distinct uint64 [G]. owner_K: int64 [K, 2], ascending pairs of an n-gram's
    place in ngram_G and a text's place in `ids`. short: ids of texts of fewer than `n` tokens, which have no n-gram.
    """

    n: int
    ngram_G: np.ndarray
    owner_K: np.ndarray
    ids: tuple[str, ...]
    short: tuple[str, ...]


def ngram_index(texts: Iterable[str], n: int = NGRAM) -> np.ndarray:
    """Distinct n-grams of all texts as sorted uint64 [G]. A text of fewer than n tokens gives none: it would mark every
    document that holds those few words.
    """
    parts = [_ngrams(text, n) for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, UINT64)


def contaminated(documents: pa.Table, index: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Which documents share an n-gram with `index` (sorted, distinct): bool [D]. A pure function of each text."""
    texts = documents.column("text").to_pylist()
    return np.array([len(shared_N) > 0 for shared_N in _shared(texts, index, n)], dtype=bool)


def benchmark_index(texts: Mapping[str, str], n: int = NGRAM) -> BenchmarkIndex:
    """The index that also tells which texts an n-gram is from. Error (DataError): no text has n tokens."""
    ids = tuple(texts)
    parts = [_ngrams(texts[name], n) for name in ids]
    short = tuple(name for name, part in zip(ids, parts, strict=True) if not len(part))
    if len(short) == len(ids):
        raise DataError(f"benchmark texts: none of {len(ids)} has {n} tokens")
    ngram_G = np.unique(np.concatenate(parts))
    owner = [np.stack([np.searchsorted(ngram_G, part), np.full(len(part), i)], 1) for i, part in enumerate(parts)]
    pairs = np.concatenate(owner).astype(np.int64)
    return BenchmarkIndex(n, ngram_G, pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], ids, short)


def matches(documents: pa.Table, index: BenchmarkIndex) -> list[Match]:
    """For the report: every pair of a document and a benchmark text that share n-grams, in order."""
    found = []
    sources, ids, texts = (documents.column(name).to_pylist() for name in ("source", "id", "text"))
    for row, shared_N in enumerate(_shared(texts, index.ngram_G, index.n)):
        place_N = np.searchsorted(index.ngram_G, shared_N)
        first_N, last_N = (np.searchsorted(index.owner_K[:, 0], place_N, side) for side in ("left", "right"))
        owners = [index.owner_K[first:last, 1] for first, last in zip(first_N, last_N, strict=True)]
        if owners:
            for owner, count in zip(*np.unique(np.concatenate(owners), return_counts=True), strict=True):
                found.append(Match(sources[row], ids[row], index.ids[owner], int(count)))
    return found


def _ngrams(text: str, n: int) -> np.ndarray:
    return shingles(text, n) if len(tokens(text)) >= n else np.empty(0, UINT64)


def _shared(texts: Sequence[str], index: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Per text, those of its n-grams that are in the index, sorted distinct. A shorter text's only shingle is in no
    index but by a clash of hashes.
    """
    for first in range(0, len(texts), BATCH):
        for ngram_N in shingle_sets(texts[first : first + BATCH], n):
            place_N = np.minimum(np.searchsorted(index, ngram_N), max(0, len(index) - 1))
            yield ngram_N[index[place_N] == ngram_N] if len(index) else ngram_N[:0]
