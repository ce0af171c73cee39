"""The tokenizer: round trips, special tokens as data, DeepSeek-V3's cuts, the Hugging Face form."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokenizer import (
    BOS,
    CONFIG_FILE,
    SPECIALS,
    TOKENIZER_FILE,
    decode,
    encode,
    load_tokenizer,
    padded_vocabulary,
    pre_tokenizer,
    tokenizer_config_json,
    tokenizer_json,
    train_tokenizer,
)
from tests.data.synthetic import chinese, english

TEXTS = [
    "Hello, world! It's 2026; café naïve — ①２３ …",
    "滚滚长江东逝水，浪花淘尽英雄。\n\n\u3000\u3000是非成败转头空",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇳 e\u0301 ｆｕｌｌ　ｗｉｄｔｈ ゃらカナ 한국어 \U00020000",
    "tabs\t\tand  spaces \r\n\n\n   x = {'a': [1, 22, 333, 4444]}\n",
    f"text that spells {' '.join(SPECIALS)} is data",
    "",
]
CONFIG = TokenizerConfig(vocab_size=600)


def corpus() -> list[str]:
    rng = random.Random(4)
    return ["".join(english(rng, 300)) for _ in range(20)] + ["".join(chinese(rng, 400)) for _ in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(corpus(), CONFIG)


def test_round_trip_and_no_special_token_from_text(tokenizer: Tokenizer) -> None:
    for text, tokens in zip(TEXTS, encode(tokenizer, TEXTS), strict=True):
        assert decode(tokenizer, tokens) == text
        assert tokens.dtype == np.uint32
        assert (tokens >= len(SPECIALS)).all()


def test_sizes_and_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 600
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2, 3, 4, 5]
    assert [padded_vocabulary(n) for n in (1, 128, 129, 600, 8192)] == [128, 128, 256, 640, 8192]


def test_training_is_deterministic_whatever_the_order(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(reversed(corpus()), CONFIG)
    assert tokenizer_json(again) == tokenizer_json(tokenizer)


def test_cuts_of_the_three_stages() -> None:
    def cuts(text: str, han_run: int | None = None) -> list[str]:
        return [text[a:b] for _, (a, b) in pre_tokenizer(han_run).pre_tokenize_str(text)]

    assert cuts("12345 abc中文字x,y. 3") == ["123", "45", " abc", "中文字", "x", ",y", ".", " ", "3"]
    assert cuts("a!\n\nb  c\u3000ゃカ") == ["a", "!\n\n", "b", " ", " c", "\u3000", "ゃカ"]
    assert cuts("一二三四五六七", han_run=3) == ["一二三", "四五六", "七"]


def test_long_han_runs_are_cut_only_in_training(tokenizer: Tokenizer) -> None:
    trained = train_tokenizer(["一二三四五六七八九十" * 40] * 3, TokenizerConfig(vocab_size=400, han_run=4))
    assert max(len(decode(trained, [i])) for i in range(400)) <= 4
    assert tokenizer_json(tokenizer).count(b"{1,8}") == 0


def test_opens_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_bytes(tokenizer_json(tokenizer))
    (tmp_path / CONFIG_FILE).write_bytes(tokenizer_config_json())
    from transformers import PreTrainedTokenizerFast

    opened = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    text = TEXTS[1]
    assert opened(text).input_ids == [0, *encode(tokenizer, [text])[0].tolist()]
    assert opened.decode(opened(text).input_ids, skip_special_tokens=True) == text
    assert opened.convert_ids_to_tokens(0) == BOS


def test_another_or_damaged_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / TOKENIZER_FILE).write_bytes(tokenizer_json(tokenizer))
    with pytest.raises(DataError, match="another tokenizer than the data's"):
        load_tokenizer(tmp_path, "0" * 64)
    (tmp_path / TOKENIZER_FILE).write_bytes(b"{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
