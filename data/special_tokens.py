"""Which ids of a tokenizer mean beginning, end, padding and fill-in-the-middle, for ours and for any other in Hugging
Face form.

A document is stored as `BOS + tokens + EOS`, both always; the loss counts on EOS (to predict it is to know that a text
is over) and never on what follows it, BOS of the next document or padding. A tokenizer without a beginning gets its end
token there (as GPT-2's); one without padding gets its end token too, which no label ever sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.errors import DataError
from data.tokenizer import CONFIG_FILE, SPECIALS

# Spellings of (prefix follows, hole or suffix follows, middle follows): DeepSeek, StarCoder, Qwen and CodeLlama.
FIM_SPELLINGS = (
    SPECIALS[3:],
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
END_SPELLINGS = (SPECIALS[1], "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. fim: begin, hole, end as DeepSeek orders them (prefix, suffix, middle follow); None without them."""

    bos: int
    eos: int
    pad: int
    fim: tuple[int, int, int] | None


def special_tokens(tokenizer: Tokenizer, directory: Path) -> SpecialTokens:
    """Ids by the names in `directory`'s tokenizer_config.json, or by their usual spellings where it names none.

    Error: DataError when it has no end token, or names one that the tokenizer does not have.
    """
    settings = _settings(directory / CONFIG_FILE)
    eos = _named(tokenizer, settings, "eos_token", directory)
    if eos is None:
        eos = next((i for name in END_SPELLINGS if (i := tokenizer.token_to_id(name)) is not None), None)
    if eos is None:
        raise DataError(f"{directory}: the tokenizer has no end token: {CONFIG_FILE} must name it as eos_token")
    bos, pad = (_named(tokenizer, settings, key, directory) for key in ("bos_token", "pad_token"))
    found = [tuple(tokenizer.token_to_id(name) for name in names) for names in FIM_SPELLINGS]
    fim = next(((a, b, c) for a, b, c in found if a is not None and b is not None and c is not None), None)
    return SpecialTokens(eos if bos is None else bos, eos, eos if pad is None else pad, fim)


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the tokenizer's settings: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: found {type(content).__name__}, need an object")
    return content


def _named(tokenizer: Tokenizer, settings: dict[str, Any], key: str, directory: Path) -> int | None:
    value = settings.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None:
        return None
    identity = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if identity is None:
        raise DataError(f"{directory / CONFIG_FILE}: {key} {name!r} is no entry of the tokenizer")
    return identity
