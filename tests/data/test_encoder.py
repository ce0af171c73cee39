"""Encoders: the fast one equals the one that defines the tokens; text that spells a special token stays text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from data import encoder as encoders
from data.config import TokenizerConfig
from data.encoder import (
    GATE_LINES,
    GATE_TEXTS,
    choose_encoder,
    content_tokenizer,
    first_difference,
    gate_texts,
    gigatoken_encoder,
    huggingface_encoder,
)
from data.errors import DataError, UsageError
from data.tokenizer import SPECIALS, encode, tokenizer_json, train_tokenizer
from tests.data.synthetic import chinese, english

RNG = random.Random(8)
TEXTS = ["".join(english(RNG, 300)) for _ in range(20)] + ["".join(chinese(RNG, 400)) for _ in range(20)]


@pytest.fixture(scope="module")
def content() -> bytes:
    return tokenizer_json(train_tokenizer(TEXTS, TokenizerConfig(vocab_size=900)))


def test_content_tokens_are_those_of_the_tokenizer_itself(content: bytes) -> None:
    tokenizer = Tokenizer.from_str(content.decode())
    texts = [*TEXTS, *GATE_TEXTS]
    for left, right in zip(huggingface_encoder(content).encode(texts), encode(tokenizer, texts), strict=True):
        np.testing.assert_array_equal(left, right)


def test_text_that_spells_a_special_token_stays_text(content: bytes) -> None:
    for made in (huggingface_encoder(content), gigatoken_encoder(content)):
        for tokens in made.encode(list(SPECIALS)):
            assert len(tokens) > 1
            assert (tokens >= len(SPECIALS)).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_the_fast_encoder_gives_the_same_tokens(content: bytes, texts: list[str]) -> None:
    assert first_difference(huggingface_encoder(content), gigatoken_encoder(content), texts) is None


def test_auto_takes_the_fast_one_and_says_so(content: bytes) -> None:
    chosen, why = choose_encoder(content, "auto", TEXTS)
    assert chosen.name == "gigatoken"
    assert why == f"gigatoken, equal to huggingface on {len(gate_texts(TEXTS))} texts"


def test_gate_reads_lines_of_the_corpus() -> None:
    texts = gate_texts(["one\r\ntwo\n\nthree", *["x\n" * 50] * 60])
    assert texts[len(GATE_TEXTS) + 10 :][:4] == ["one\r\n", "two\n", "\n", "three"]
    assert len(texts) == len(GATE_TEXTS) + 10 + GATE_LINES


@dataclass(frozen=True)
class Wrong:
    name: str = "gigatoken"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.zeros(0, dtype=np.uint32) for _ in texts]


def test_an_encoder_that_differs_is_passed_over_or_refused(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "gigatoken_encoder", lambda _: Wrong())
    chosen, why = choose_encoder(content, "auto", TEXTS)
    assert chosen.name == "huggingface"
    assert "gives other tokens for ' '" in why
    with pytest.raises(DataError, match="gives other tokens than huggingface"):
        choose_encoder(content, "gigatoken", TEXTS)


def test_a_missing_package_is_named(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    assert choose_encoder(content, "auto", TEXTS)[1].startswith("huggingface: tokenizer.encoder: gigatoken is not")
    with pytest.raises(UsageError, match="install bireme"):
        choose_encoder(content, "gigatoken", TEXTS)
    with pytest.raises(UsageError, match="found 'fast', allowed auto, huggingface, gigatoken"):
        choose_encoder(content, "fast", TEXTS)


def test_a_pre_tokenizer_that_the_fast_one_does_not_know(content: bytes) -> None:
    settings = json.loads(content)
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,4}"
    chosen, why = choose_encoder(json.dumps(settings).encode(), "auto", TEXTS)
    assert chosen.name == "huggingface"
    assert "gigatoken cannot use this tokenizer" in why


@pytest.mark.parametrize("broken", [b"", b"[]", b'{"added_tokens": [1]}', b"\xff", b'{"added_tokens": []}'])
def test_what_is_no_tokenizer_is_refused(broken: bytes) -> None:
    with pytest.raises(DataError, match="not a tokenizer"):
        huggingface_encoder(broken)


def test_added_tokens_that_are_content_stay() -> None:
    added = [{"content": "  ", "special": False}, {"content": "<fim_prefix>", "special": False}]
    kept = json.loads(content_tokenizer(json.dumps({"added_tokens": added}).encode()))["added_tokens"]
    assert kept == added[:1]


def test_ids_of_added_tokens_stay_when_a_special_one_goes_before_them() -> None:
    """As in Qwen's: special tokens outside the vocabulary, then added tokens that are content."""
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))
    first = tokenizer.get_vocab_size()
    added = [("<|end|>", True), ("<tool>", False), ("<fim_prefix>", False), ("</tool>", False), ("<|pad|>", True)]
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in added])
    assert [tokenizer.token_to_id(name) for name, _ in added] == list(range(first, first + 5))
    encoder = huggingface_encoder(tokenizer_json(tokenizer))
    assert [tokens.tolist() for tokens in encoder.encode(["<tool>", "</tool>"])] == [[first + 1], [first + 3]]
    spelled = ["<|end|>", "<fim_prefix>", "<|pad|>", *SPECIALS]
    for text, tokens in zip(spelled, encoder.encode(spelled), strict=True):
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
        assert ((tokens >= len(SPECIALS)) & (tokens < first)).all()
    assert (
        first_difference(encoder, gigatoken_encoder(tokenizer_json(tokenizer)), [*spelled, "a<tool>b", *TEXTS]) is None
    )
