"""MinHash signatures of Chinese-aware shingles (Broder 1997; banding as in Leskovec et al., Mining of Massive
Datasets, 3.4).

Text is folded (NFKC, lower case) and cut into tokens: every CJK character is one token, other scripts give words. Five
tokens are a shingle. With words alone a Chinese clause is one token, and a copy with 1 % of its characters changed is
found in 44-75 % of cases; with characters, always.

`signature_reference` is the definition. `signatures` computes the same from arrays that run over many documents at
once: a word's hash is the difference of two prefix sums, shingles are rolled from token hashes, and every permutation
is one pass.

Shapes: D documents, N tokens, S shingles, P permutations (112 = 14 bands of 8 rows), B bands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.dedup.fold import CHARACTER, WORD, classified, tokens
from data.hashing import UINT64, key64, mix

EMPTY = np.iinfo(UINT64).max  # in all places of the signature of a text without tokens
_ROLL = 0x9E3779B97F4A7C15
_POWER = 0xD6E8FEB86659FD93
_BATCH_CHARACTERS = 1 << 19
_PASS_SHINGLES = 1 << 15  # 256 KiB: what a permutation reads and writes stays in the second-level cache


@dataclass(frozen=True)
class MinHash:
    """Parameters: `bands` x `rows` permutations of `shingle`-token shingles. `seed` draws the permutations; the default
    is one whose recall was measured (docs/dedup.md), since some draws find fewer copies than others.
    """

    shingle: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 8

    @property
    def permutations(self) -> int:
        return self.bands * self.rows

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Odd multipliers and offsets, uint64 [P] each: permutation p sends h to multiplier[p] * h + offset[p] modulo
        2^64.
        """
        draws = [key64("minhash", self.seed, i) for i in range(2 * self.permutations)]
        multiplier_P = np.array(draws[: self.permutations], dtype=UINT64) | UINT64(1)
        return multiplier_P, np.array(draws[self.permutations :], dtype=UINT64)


def token_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`token_hash` of every token: uint64 [N], count int64 [D] of tokens of each text, and the order int64 [D] in which
    the texts stand in them.
    """
    code_N, class_N, length_D, order_D = classified(texts)
    single_N, word_N = class_N == CHARACTER, class_N == WORD
    first_N, last_N = single_N | word_N, single_N | word_N
    first_N[1:] &= single_N[1:] | ~word_N[:-1]
    last_N[:-1] &= single_N[:-1] | ~word_N[1:]
    start_T, last_T = np.flatnonzero(first_N), np.flatnonzero(last_N)
    power_N, inverse_N = _powers(1 << max(_BATCH_CHARACTERS, len(code_N)).bit_length())
    with np.errstate(over="ignore"):
        sum_N = _letters()[code_N]
        sum_N *= power_N[: len(code_N)]
        before_T = sum_N[start_T]
        np.cumsum(sum_N, out=sum_N)
        before_T -= sum_N[start_T]
        before_T += sum_N[last_T]
        hash_T = mix(before_T * inverse_N[start_T])
    edge_D = np.searchsorted(start_T, np.concatenate([[0], np.cumsum(length_D)]))
    return hash_T, np.diff(edge_D), order_D


def token_hash(token: str) -> int:
    """The definition of a token's hash: its letters as a polynomial modulo 2^64, mixed. The letter of a code point is
    `mix` of it.
    """
    letter_N = mix(np.array([ord(character) for character in token], dtype=UINT64)).tolist()
    value = 0
    for letter in reversed(letter_N):
        value = (value * _POWER + letter) % 2**64
    return int(mix(np.array([value], dtype=UINT64))[0])


@lru_cache(maxsize=1)
def _letters() -> np.ndarray:
    return mix(np.arange(sys.maxunicode + 1, dtype=UINT64))


@lru_cache(maxsize=1)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0 .. count - 1 (itself a power of two) of _POWER and of its inverse modulo 2^64, uint64 each."""
    power, inverse = np.ones(count, dtype=UINT64), np.ones(count, dtype=UINT64)
    for filled, base in ((power, _POWER), (inverse, pow(_POWER, -1, 2**64))):
        done = 1
        while done < count:
            np.multiply(filled[:done], UINT64(pow(base, done, 2**64)), out=filled[done : 2 * done])
            done *= 2
    return power, inverse


def rolled_shingles(hash_N: np.ndarray, count_D: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `size` tokens that stay inside one document: uint64 [S], and how many each document has,
    int64 [D]. A document of fewer tokens is one shingle; one without tokens has none. Repetitions are kept.
    """
    shingle_D = np.where(count_D >= size, count_D - size + 1, np.minimum(count_D, 1))
    if not len(hash_N):
        return np.empty(0, dtype=UINT64), shingle_D
    first_D = np.cumsum(count_D) - count_D
    rolled_N = hash_N.copy()
    inside_N = np.ones(len(hash_N), dtype=bool)
    end_D = first_D + count_D
    for back in range(1, size):
        inside_N[end_D[count_D >= back] - back] = False
    with np.errstate(over="ignore"):
        for offset in range(1, size):
            rolled_N *= UINT64(_ROLL)
            rolled_N[: max(0, len(hash_N) - offset)] += hash_N[offset:]
        for short in np.flatnonzero((count_D > 0) & (count_D < size)).tolist():
            rolled = UINT64(0)
            for value in hash_N[first_D[short] : end_D[short]]:
                rolled = rolled * UINT64(_ROLL) + value
            rolled_N[first_D[short]] = rolled
            inside_N[first_D[short]] = True
    return mix(rolled_N[inside_N]), shingle_D


def shingles(text: str, size: int) -> np.ndarray:
    """Distinct 64-bit hashes of all runs of `size` tokens, sorted uint64 [S]. A shorter text is one shingle; one
    without tokens has none.
    """
    hash_N, count_D, _ = token_hashes([text])
    return np.unique(rolled_shingles(hash_N, count_D, size)[0])


def shingle_sets(texts: Sequence[str], size: int) -> list[np.ndarray]:
    """`shingles` of each text, computed together."""
    sets: list[np.ndarray] = [np.empty(0, dtype=UINT64)] * len(texts)
    for first, last in _batches(texts):
        hash_N, count_D, order_D = token_hashes(texts[first:last])
        shingle_S, shingle_D = rolled_shingles(hash_N, count_D, size)
        for row, part in zip(order_D.tolist(), np.split(shingle_S, np.cumsum(shingle_D)[:-1]), strict=True):
            sets[first + row] = np.unique(part)
    return sets


def signatures(texts: Sequence[str], parameters: MinHash) -> np.ndarray:
    """Signatures uint64 [D, P]. A text without tokens gets all ones (2^64 - 1) and never enters a band. A pure
    function of each text. Memory beyond the result: some 45 bytes for each character of the longest text.
    """
    signature_DP = np.empty((len(texts), parameters.permutations), dtype=UINT64)
    for first, last in _batches(texts):
        hash_N, count_D, order_D = token_hashes(texts[first:last])
        signature_DP[first + order_D] = signatures_of_tokens(hash_N, count_D, parameters)
    return signature_DP


def signatures_of_tokens(hash_N: np.ndarray, count_D: np.ndarray, parameters: MinHash) -> np.ndarray:
    """Signatures uint64 [D, P] of documents of any tokens: hash uint64 [N], one document after the other, of count
    int64 [D] tokens each.
    """
    shingle_S, shingle_D = rolled_shingles(hash_N, count_D, parameters.shingle)
    signature_DP = np.full((len(count_D), parameters.permutations), EMPTY, dtype=UINT64)
    multiplier_P, offset_P = parameters.coefficients()
    row_D = np.flatnonzero(shingle_D)
    start_D = np.cumsum(shingle_D[row_D]) - shingle_D[row_D]
    permuted = np.empty(min(_PASS_SHINGLES, len(shingle_S)), dtype=UINT64)
    for first in range(0, len(shingle_S), _PASS_SHINGLES):
        part_S = shingle_S[first : first + _PASS_SHINGLES]
        permuted_S = permuted[: len(part_S)]
        low, high = np.searchsorted(start_D, [first, first + len(part_S)])
        cut_D = start_D[low:high] - first
        if not len(cut_D) or cut_D[0]:  # the document before goes on in this pass
            cut_D = np.concatenate([[0], cut_D])
            low -= 1
        minima_DP = np.empty((len(cut_D), parameters.permutations), dtype=UINT64)
        with np.errstate(over="ignore"):
            for p in range(parameters.permutations):
                np.multiply(part_S, multiplier_P[p], out=permuted_S)
                np.add(permuted_S, offset_P[p], out=permuted_S)
                minima_DP[:, p] = np.minimum.reduceat(permuted_S, cut_D)
        signature_DP[row_D[low:high]] = np.minimum(signature_DP[row_D[low:high]], minima_DP)
    return signature_DP


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts of about _BATCH_CHARACTERS characters together, at least one text each."""
    first = held = 0
    for row, text in enumerate(texts):
        held += len(text)
        if held >= _BATCH_CHARACTERS:
            yield first, row + 1
            first, held = row + 1, 0
    if first < len(texts):
        yield first, len(texts)


def signature_reference(text: str, parameters: MinHash) -> list[int]:
    """The definition of one signature in plain integers."""
    words = tokens(text)
    size = min(parameters.shingle, len(words))
    hashed = [token_hash(word) for word in words]
    found = set()
    for first in range(len(words) - size + 1 if words else 0):
        rolled = 0
        for value in hashed[first : first + size]:
            rolled = (rolled * _ROLL + value) % 2**64
        found.add(int(mix(np.array([rolled], dtype=UINT64))[0]))
    multiplier_P, offset_P = parameters.coefficients()
    return [
        min(((int(a) * h + int(b)) % 2**64 for h in found), default=2**64 - 1)
        for a, b in zip(multiplier_P, offset_P, strict=True)
    ]


def band_keys(signature_DP: np.ndarray, parameters: MinHash) -> np.ndarray:
    """One uint64 key per document and band, [D, B]: documents that agree in all rows of a band share its key."""
    rows_DBR = signature_DP.reshape(len(signature_DP), parameters.bands, parameters.rows)
    key_DB = np.zeros(rows_DBR.shape[:2], dtype=UINT64)
    with np.errstate(over="ignore"):
        for row in range(parameters.rows):
            key_DB = mix(key_DB * UINT64(_ROLL) + rows_DBR[:, :, row])
    return key_DB


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|left ∩ right| / |left ∪ right| of two sorted sets of shingles; 0 when both are empty."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - common
    return common / union if union else 0.0
