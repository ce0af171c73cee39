"""What the filters ask of a document, each computed once and only if asked for.

Words: a run of letters, digits and accents with inner apostrophes and hyphens is one, every CJK character is one, every
other sign but blanks is one. Repeats of n-grams are found by rolling hashes: a repeated n-gram begins with a repeated
(n-1)-gram, so that after the first sort little is left to look at.

Shapes: W words, N n-grams of one size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from data.hashing import UINT64, mix

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_LETTERS = rf"[^\W_{CJK}]+(?:[\u0300-\u036f]+[^\W_{CJK}]*)*"
_WORD = re.compile(rf"[{CJK}]|{_LETTERS}(?:['’\-]{_LETTERS})*|[^\s{CJK}]")
_PARAGRAPH, _LINE = re.compile(r"\n{2,}"), re.compile(r"\n+")
_CJK = re.compile(f"[{CJK}]")
_ROLL = UINT64(0x9E3779B97F4A7C15)


class Statistics:
    """Of one text. Offers what follows as attributes; none changes."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return _WORD.findall(self.text)

    @cached_property
    def lexical(self) -> list[str]:
        """Words with a letter or digit: all but single signs."""
        return [word for word in self.words if word[0].isalnum() or len(word) > 1]

    @cached_property
    def alphabetic_words(self) -> int:
        return sum(word[0].isalpha() or any(map(str.isalpha, word)) for word in self.words)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def repeated_lines(self) -> tuple[int, int, int]:
        return repeated(_LINE.split(self.text))

    @cached_property
    def repeated_paragraphs(self) -> tuple[int, int, int]:
        return repeated(_PARAGRAPH.split(self.text.strip()))

    @cached_property
    def _ids(self) -> np.ndarray:
        known: dict[str, int] = {}
        return np.array([known.setdefault(word, len(known)) for word in self.words], dtype=UINT64)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Characters of the first w words, int64 [W + 1]."""
        return np.cumsum([0, *map(len, self.words)])

    @cached_property
    def _spaces(self) -> int:
        """Characters between the words of an n-gram: none in text that is mostly CJK."""
        return 0 if 2 * len(_CJK.findall(self.text)) > len(self.words) else 1

    def ngram_repeats(self, sizes: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Per size, ascending: places of the n-grams that occur more than once, int64 ascending, and for each a number
        that is the same for equal n-grams.
        """
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        place_N = np.arange(len(self._ids))
        hash_N = np.zeros(len(place_N), dtype=UINT64)
        hashed = 0
        for size in sorted(sizes):
            inside_N = place_N + size <= len(self._ids)
            place_N, hash_N = place_N[inside_N], hash_N[inside_N]
            if not len(place_N):
                found[size] = place_N, place_N
                continue
            with np.errstate(over="ignore"):
                for offset in range(hashed, size):
                    hash_N = mix(hash_N * _ROLL + self._ids[place_N + offset])
            hashed = size
            _, group_N, count_G = np.unique(hash_N, return_inverse=True, return_counts=True)
            again_N = count_G[group_N] > 1
            place_N, hash_N, group_N = place_N[again_N], hash_N[again_N], group_N[again_N]
            found[size] = place_N, group_N
        return found

    def top_characters(self, size: int, repeats: tuple[np.ndarray, np.ndarray]) -> int:
        """Characters of the commonest n-gram, all occurrences; the first of several."""
        if len(self.words) < size:
            return 0
        place_N, group_N = repeats
        first, count = 0, 1
        if len(place_N):
            count_N = np.bincount(group_N)[group_N]
            first, count = int(place_N[count_N.argmax()]), int(count_N.max())
        return count * (int(self._ends[first + size] - self._ends[first]) + self._spaces * (size - 1))

    def duplicate_characters(self, size: int, repeats: tuple[np.ndarray, np.ndarray]) -> int:
        """Characters of n-grams that stood before, none counted twice: after such a one reading goes on behind it."""
        place_N, group_N = (array.tolist() for array in repeats)
        seen: set[int] = set()
        free = characters = 0
        for place, group in zip(place_N, group_N, strict=True):
            if place < free:
                continue
            if group in seen:
                characters += int(self._ends[place + size] - self._ends[place])
                free = place + size
            else:
                seen.add(group)
        return characters


def repeated(parts: Sequence[str]) -> tuple[int, int, int]:
    """(number of parts, of those that stood before, their characters)."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return len(parts), count, characters


def top_characters_reference(words: Sequence[str], size: int, spaces: int) -> int:
    """The definition of `top_characters` (Rae et al. 2021, A.1.1) in plain words."""
    counts: dict[tuple[str, ...], int] = {}
    for first in range(len(words) - size + 1):
        ngram = tuple(words[first : first + size])
        counts[ngram] = counts.get(ngram, 0) + 1
    if not counts:
        return 0
    ngram = max(counts, key=lambda ngram: counts[ngram])
    return counts[ngram] * (len("".join(ngram)) + spaces * (size - 1))


def duplicate_characters_reference(words: Sequence[str], size: int) -> int:
    """The definition of `duplicate_characters` (Rae et al. 2021, A.1.1) in plain words."""
    seen = set()
    first = characters = 0
    while first + size <= len(words):
        ngram = tuple(words[first : first + size])
        if ngram in seen:
            characters += len("".join(ngram))
            first += size
        else:
            seen.add(ngram)
            first += 1
    return characters
