"""Random splits of tokens that combine punctuation with line breaks (DeepSeek-V3, section 4.1).

Such tokens (".\\n\\n") make a model that continues a prompt ending in "." see a token it never saw followed by a line
break: the token boundary bias. V3 splits "a certain proportion" of them in training, which it does not say. It happens
when documents are tokenised, because it changes their lengths.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from data.encoder import Encoder
from data.hashing import UINT64, key64, mix

_ENDS_IN_LINE_BREAK = re.compile("[Ċč]$")
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class BoundarySplit:
    """pieces: for a combined token its replacement, uint32. combined_V: bool [V], True for these."""

    pieces: dict[int, np.ndarray]
    combined_V: np.ndarray

    def apply(self, tokens_N: np.ndarray, rate: float, key: int) -> np.ndarray:
        """Content tokens of one document, each combined one split with probability `rate`, fixed by `key` and its
        place. uint32."""
        place_C = np.flatnonzero(self.combined_V[tokens_N])
        if rate <= 0 or not len(place_C):
            return tokens_N
        with np.errstate(over="ignore"):
            draw_C = mix(place_C.astype(UINT64) * UINT64(_GOLDEN) + UINT64(key))
        chosen = place_C[(draw_C >> UINT64(11)).astype(np.float64) * 2.0**-53 < rate]
        if not len(chosen):
            return tokens_N
        parts = np.split(tokens_N, np.stack([chosen, chosen + 1], axis=1).ravel())
        parts[1::2] = [self.pieces[int(token)] for token in tokens_N[chosen]]
        return np.concatenate(parts).astype(np.uint32)


def boundary_split(tokenizer: Tokenizer, encoder: Encoder) -> BoundarySplit:
    """The combined tokens of a byte-level tokenizer and what each becomes: its punctuation and its line breaks encoded
    apart. One of another kind has none."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    found: dict[int, np.ndarray] = {}
    for token, identity in tokenizer.get_vocab().items():
        if not _ENDS_IN_LINE_BREAK.search(token):
            continue
        try:
            text = bytes(byte_of[character] for character in token).decode()
        except (KeyError, UnicodeDecodeError):
            continue
        marks = text.rstrip("\r\n")
        if _is_punctuation(marks.removeprefix(" ")):
            found[identity] = np.concatenate(encoder.encode([marks, text.removeprefix(marks)]))
    combined_V = np.zeros(max(tokenizer.get_vocab().values(), default=-1) + 1, dtype=bool)
    combined_V[list(found)] = True
    return BoundarySplit(found, combined_V)


def split_key(seed: int, source: str, identity: str) -> int:
    """What fixes the splits of a document."""
    return key64("boundary", seed, source, identity)


def _is_punctuation(text: str) -> bool:
    """Whether the pre-tokenizer's `[\\p{P}\\p{S}]+` takes all of it."""
    return bool(text) and all(unicodedata.category(character)[0] in "PS" for character in text)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, [256]."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in plain else next(rest)) for byte in range(256)]
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    return characters
