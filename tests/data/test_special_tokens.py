"""Special tokens of our tokenizer and of others, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from data.errors import DataError
from data.special_tokens import SpecialTokens, special_tokens
from data.tokenizer import CONFIG_FILE, SPECIALS, tokenizer_config_json


def tokenizer(*names: str) -> Tokenizer:
    made = Tokenizer(BPE({"a": 0, "b": 1}, []))
    made.add_special_tokens([AddedToken(name, special=True) for name in names])
    return made


def write(directory: Path, **settings: object) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(settings))


def test_ours(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(tokenizer_config_json())
    assert special_tokens(tokenizer(*SPECIALS), tmp_path) == SpecialTokens(2, 3, 4, (5, 6, 7))


def test_one_with_an_end_only(tmp_path: Path) -> None:
    assert special_tokens(tokenizer("<|endoftext|>"), tmp_path) == SpecialTokens(2, 2, 2, None)


def test_named_by_its_settings_also_as_an_object(tmp_path: Path) -> None:
    write(tmp_path, bos_token={"content": "[B]", "special": True}, eos_token="[E]", pad_token=None)
    found = special_tokens(tokenizer("[E]", "[B]", "<fim_suffix>", "<fim_prefix>", "<fim_middle>"), tmp_path)
    assert found == SpecialTokens(3, 2, 2, (5, 4, 6))


def test_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no end token: tokenizer_config\.json must name it as eos_token"):
        special_tokens(tokenizer("<s>"), tmp_path)


def test_a_name_that_is_no_entry(tmp_path: Path) -> None:
    write(tmp_path, eos_token="</s>")
    with pytest.raises(DataError, match="eos_token '</s>' is no entry of the tokenizer"):
        special_tokens(tokenizer("<s>"), tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token": 3}'])
def test_settings_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(DataError, match=CONFIG_FILE):
        special_tokens(tokenizer("</s>"), tmp_path)
