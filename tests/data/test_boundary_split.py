"""Splits of punctuation with line breaks: only those tokens, the same text, the share asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.boundary_split import BoundarySplit, boundary_split, split_key
from data.config import TokenizerConfig
from data.encoder import Encoder, huggingface_encoder
from data.tokenizer import decode, tokenizer_json, train_tokenizer
from tests.data.synthetic import chinese, english

RNG = random.Random(3)
LINES = [*english(RNG, 2000), *chinese(RNG, 2000)]
ENDS = [".\n", "。\n\n", "!\r\n", " --\n", "，\n"]
TEXT = "".join(line + RNG.choice(ENDS) for line in LINES)


@pytest.fixture(scope="module")
def made() -> tuple[Tokenizer, Encoder, BoundarySplit]:
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=900))
    encoder = huggingface_encoder(tokenizer_json(tokenizer))
    return tokenizer, encoder, boundary_split(tokenizer, encoder)


def combined(text: str) -> bool:
    """By the definition, in plain words: something that is neither letter, digit nor blank, then line breaks. Half a
    character with a line break (U+FFFD here) is no text of its own."""
    mark = text.rstrip("\r\n")
    if mark == text:
        return False
    mark = mark.removeprefix(" ")
    return bool(mark) and "\ufffd" not in mark and not any(c.isalnum() or c.isspace() for c in mark)


def test_the_table_holds_the_combined_tokens_and_no_other(made: tuple[Tokenizer, Encoder, BoundarySplit]) -> None:
    tokenizer, _, split = made
    texts = {identity: tokenizer.decode([identity], skip_special_tokens=False) for identity in range(900)}
    assert set(split.pieces) == {identity for identity, text in texts.items() if combined(text)}
    assert len(split.pieces) > 4
    for identity, pieces in split.pieces.items():
        first, second = "".join(texts[identity]).rstrip("\r\n"), texts[identity][len(texts[identity].rstrip("\r\n")) :]
        assert decode(tokenizer, pieces) == first + second
        assert not split.combined_V[pieces].any()


def test_text_is_unchanged_and_the_share_is_right(made: tuple[Tokenizer, Encoder, BoundarySplit]) -> None:
    tokenizer, encoder, split = made
    (tokens,) = encoder.encode([TEXT])
    before = int(split.combined_V[tokens].sum())
    assert before > 500
    for rate in (0.1, 0.5):
        after = split.apply(tokens, rate, split_key(1, "en", "a"))
        assert after.dtype == np.uint32
        assert decode(tokenizer, after) == TEXT
        share = 1 - int(split.combined_V[after].sum()) / before
        assert abs(share - rate) < 4 * (rate * (1 - rate) / before) ** 0.5
    assert not split.combined_V[split.apply(tokens, 1.0, 5)].any()


def test_choice_is_fixed_by_the_key(made: tuple[Tokenizer, Encoder, BoundarySplit]) -> None:
    _, encoder, split = made
    (tokens,) = encoder.encode([TEXT])
    once, again = (split.apply(tokens, 0.3, split_key(1, "en", "a")) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, split.apply(tokens, 0.3, split_key(1, "en", "b")))
    np.testing.assert_array_equal(split.apply(tokens, 0.0, 1), tokens)
    assert len(split.apply(tokens[:0], 0.5, 1)) == 0
