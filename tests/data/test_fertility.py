"""Fertility against counts made by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data.config import TokenizerConfig
from data.errors import DataError
from data.fertility import compare, fertility
from data.tokenizer import TOKENIZER_FILE, encode, load_tokenizer, tokenizer_json, train_tokenizer
from tests.data.synthetic import chinese, english

RNG = random.Random(6)
ENGLISH, CHINESE = (["".join(make(RNG, 300)) for _ in range(4)] for make in (english, chinese))


def byte_tokenizer() -> bytes:
    """Every byte a token."""
    content = json.loads(tokenizer_json(train_tokenizer([], TokenizerConfig(vocab_size=262))))
    assert content["model"]["merges"] == []
    return json.dumps(content).encode()


def test_bytes_as_tokens() -> None:
    found = fertility(byte_tokenizer(), ["滚滚a"])
    assert found.bytes_per_token == 1.0
    assert found.characters_per_token == 3 / 7
    assert found.single_byte_share == 6 / 7


def test_counts_equal_the_encoding(tmp_path: Path) -> None:
    for name, texts in (("small", ENGLISH), ("both", ENGLISH + CHINESE)):
        (tmp_path / name).mkdir()
        content = tokenizer_json(train_tokenizer(texts, TokenizerConfig(vocab_size=700)))
        (tmp_path / name / TOKENIZER_FILE).write_bytes(content)
    found = compare({name: tmp_path / name for name in ("small", "both")}, {"en": ENGLISH, "zh": CHINESE})
    for name, row in found.items():
        for language, texts in (("en", ENGLISH), ("zh", CHINESE)):
            tokens = sum(len(part) for part in encode(load_tokenizer(tmp_path / name), texts))
            assert row[language]["bytes_per_token"] == sum(len(text.encode()) for text in texts) / tokens
    assert found["both"]["zh"]["bytes_per_token"] > 1.5 * found["small"]["zh"]["bytes_per_token"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        compare({"x": tmp_path}, {"en": ENGLISH})
    (tmp_path / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(DataError, match=f"{tmp_path}: not a tokenizer"):
        compare({"x": tmp_path}, {"en": ENGLISH})
    with pytest.raises(DataError, match="no text"):
        fertility(byte_tokenizer(), [""])
