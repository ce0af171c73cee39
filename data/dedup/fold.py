"""Folding text (NFKC, lower case) and finding its tokens, over whole arrays of code points.

The definition is `folded` and `TOKEN`, plain Python. The array path looks every code point up in one table, which is
right where folding a text is folding its characters one by one: no character may reorder or compose with the one
before it (Unicode Annex 15, section 9), and none may depend on its neighbours for its lower case (the final sigma).
Texts with other characters, or with one that becomes several letters, are folded by Python first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
TOKEN = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
OTHER, WORD, CHARACTER = 0, 1, 2  # classes of code points: between tokens, part of a word, a token by itself
_ROUGH = 3  # to be folded by Python
_SHIFT = 21  # an entry is a code point and, above its 21 bits, its class
_CODE = np.uint32((1 << _SHIFT) - 1)
_TABLED = 0x31350  # code points beyond are tags and private use
_ALL = 0x110000
_SIGMA = "\u03a3"
_JAMO = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # vowels and finals, composed by rule, not by table


def folded(text: str) -> str:
    """NFKC, then lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def tokens(text: str) -> list[str]:
    """Folded tokens: one per CJK character, one per word of any other script; punctuation and spaces give none."""
    return TOKEN.findall(folded(text))


def classified(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Folded code points of several texts, their classes, and which text stands where.

    Returns code uint32 [N], class uint8 [N], length int64 [D], order int64 [D]: the k-th stretch of length[k] code
    points is texts[order[k]] and one separator. Plain texts come first, those folded by Python after them. Error:
    UnicodeEncodeError for lone surrogates.
    """
    folding, classes = _tables()
    entry_N, length_D = _looked_up(texts, folding)
    order_D = np.arange(len(texts))
    rough_N = np.flatnonzero(entry_N >= np.uint32(_ROUGH << _SHIFT))
    if len(rough_N):
        rough_D = np.zeros(len(texts), dtype=bool)
        rough_D[np.searchsorted(np.cumsum(length_D), rough_N, side="right")] = True
        plain_N, plain_D = entry_N[~np.repeat(rough_D, length_D)], length_D[~rough_D]
        order_D = np.argsort(rough_D, kind="stable")
        entry_N, length_D = _looked_up([folded(texts[i]) for i in np.flatnonzero(rough_D).tolist()], classes)
        entry_N, length_D = np.concatenate([plain_N, entry_N]), np.concatenate([plain_D, length_D])
    return entry_N & _CODE, (entry_N >> np.uint32(_SHIFT)).astype(np.uint8), length_D, order_D


def _looked_up(texts: Sequence[str], table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    code_N = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), dtype=np.uint32)
    return table[code_N], np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Two tables uint32 [code points]: of text as it comes, and of text already folded (whose code stays)."""
    class_C = np.zeros(_ALL, dtype=np.uint32)
    every = "".join(map(chr, range(_ALL)))
    for match in re.finditer("[^\\W_]+", every):
        class_C[match.start() : match.end()] = WORD
    for match in re.finditer(f"[{CJK}]+", every):
        class_C[match.start() : match.end()] = CHARACTER
    code_C = np.arange(_ALL, dtype=np.uint32)
    classes = code_C | class_C << np.uint32(_SHIFT)
    folding = classes.copy()
    folding[_TABLED:] = _ROUGH << _SHIFT
    attaching = _attaching()
    for code in range(_TABLED):
        character = chr(code)
        result = folded(character)
        if result == character and code not in attaching:
            continue
        first = ord(unicodedata.normalize("NFKD", character)[0])
        if first in attaching or unicodedata.combining(chr(first)) or character == _SIGMA:
            folding[code] = _ROUGH << _SHIFT
        elif len(result) == 1 and _SIGMA not in unicodedata.normalize("NFKC", character):
            folding[code] = classes[ord(result)]
        elif not class_C[[ord(each) for each in result]].any():
            folding[code] = ord(" ")
        else:
            folding[code] = _ROUGH << _SHIFT
    for code in range(0xD800, 0xE000):
        folding[code] = _ROUGH << _SHIFT
    return folding, classes


def _attaching() -> set[int]:
    """Code points that reorder with, or compose with, what stands before them."""
    found = set(_JAMO)
    for code in range(_TABLED):
        if unicodedata.combining(chr(code)):
            found.add(code)
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return found
