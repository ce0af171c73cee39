"""Text to content tokens: Hugging Face's `tokenizers`, which defines them, or gigatoken, about ten to thirty times as
fast, which must first give the same tokens.

Special tokens that a text spells are data: both encoders work on the tokenizer without its special entries, so that
such text becomes ordinary tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from data.errors import DataError, UsageError
from data.special_tokens import END_SPELLINGS, FIM_SPELLINGS
from data.tokenizer import SPECIALS

KINDS = ("auto", "huggingface", "gigatoken")
FAST_PACKAGE = "gigatoken"
# The gate: so many lines of the corpus, and these, which hold what encoders get wrong.
GATE_LINES = 2000
GATE_TEXTS = (
    "",
    " ",
    "\r\n\r\n \n\t\n",
    "1 22 333 4444 55555 ①２３ ४५६ Ⅷ ½",
    "don't DON'T can’t «naïve» e\u0301 ǅ ﬁ ÅΩ",
    "滚滚长江东逝水，浪花淘尽英雄。\n\n\u3000\u3000是非成败转头空。\r\n",
    "ゃらカナ・한국어ㅎㅎ \U00020000\U0001f468\u200d\U0001f469\u200d\U0001f467 👍🏽🇨🇳 \u200b\ufeff",
    "if (a[1]!=b{2})\n{\n\treturn `x`;\n}\n\n\n  # 3.14e-10 --- ===...!!!\n",
    "Ελληνικά русский עברית العربية हिन्दी ไทย",
    "a" * 300 + "\n" * 50 + "-" * 300 + " " * 200 + "é",
    " ".join(SPECIALS),
)
_NEVER_TEXT = {*SPECIALS, *END_SPELLINGS, *(name for names in FIM_SPELLINGS for name in names)}


class Encoder(Protocol):
    """Content tokens of texts, without BOS and EOS. name: as in KINDS."""

    @property
    def name(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 tokens of each text."""
        ...


@dataclass(frozen=True)
class HuggingFaceEncoder:
    """The definition."""

    tokenizer: Tokenizer
    name: str = "huggingface"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]


@dataclass(frozen=True)
class GigatokenEncoder:
    """gigatoken on the calling thread: processes are the parallelism here."""

    tokenizer: Any
    name: str = "gigatoken"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.tokenizer.encode_batch_list(list(texts), parallel=False)
        return [np.array(tokens, dtype=np.uint32) for tokens in found]


def content_tokenizer(content: bytes) -> bytes:
    """A tokenizer.json whose special entries are no longer looked for in texts; ids stay. Error: DataError."""
    try:
        settings = json.loads(content)
        added = settings.get("added_tokens") or []
        kept = [not token["special"] and token["content"] not in _NEVER_TEXT for token in added]
        vocabulary = (settings.get("model") or {}).get("vocab") or {}
        names = set(vocabulary if isinstance(vocabulary, dict) else (name for name, _ in vocabulary))
        # An added token that is not in the vocabulary has its id by its place among those: another, which no text can
        # spell for documents hold no NUL, takes the place of one that goes before one that stays.
        found = []
        for number, (token, stays) in enumerate(zip(added, kept, strict=True)):
            if stays:
                found.append(token)
            elif any(kept[number:]) and token["content"] not in names:
                found.append({**token, "content": f"\0{number}\0", "normalized": False})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a tokenizer.json: {error!r}") from None
    settings |= {"added_tokens": found, "post_processor": None, "truncation": None, "padding": None}
    return json.dumps(settings, ensure_ascii=False).encode()


def huggingface_encoder(content: bytes) -> HuggingFaceEncoder:
    """From the content of a tokenizer.json. Error: DataError."""
    try:
        return HuggingFaceEncoder(Tokenizer.from_str(content_tokenizer(content).decode()))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"not a tokenizer.json: {error}") from None


def gigatoken_encoder(content: bytes) -> GigatokenEncoder:
    """From the content of a tokenizer.json. Error: UsageError when the package is missing or does not know the
    tokenizer's pre-tokenizer."""
    if find_spec(FAST_PACKAGE) is None:
        raise UsageError("tokenizer.encoder: gigatoken is not installed; install bireme[fast] or give huggingface")
    import gigatoken

    try:
        return GigatokenEncoder(gigatoken.Tokenizer.from_json(content_tokenizer(content)))
    except (RuntimeError, ValueError, ImportError) as error:
        raise UsageError(f"tokenizer.encoder: gigatoken cannot use this tokenizer: {_first_line(error)}") from None


def choose_encoder(content: bytes, kind: str, sample: Sequence[str]) -> tuple[Encoder, str]:
    """(encoder, what was chosen and why, one line). content: of tokenizer.json. sample: texts of the corpus for the
    gate.

    auto: gigatoken where it is installed and passes the gate. gigatoken: that, or an error. Errors: UsageError for an
    unknown kind or a missing package, DataError when a demanded gigatoken gives other tokens.
    """
    if kind not in KINDS:
        raise UsageError(f"tokenizer.encoder: found '{kind}', allowed {', '.join(KINDS)}")
    plain = huggingface_encoder(content)
    if kind == "huggingface":
        return plain, "huggingface, as asked for"
    try:
        fast = gigatoken_encoder(content)
    except UsageError as error:
        if kind == "gigatoken":
            raise
        return plain, f"huggingface: {error}"
    texts = gate_texts(sample)
    if (difference := first_difference(plain, fast, texts)) is not None:
        if kind == "gigatoken":
            raise DataError(f"tokenizer.encoder: gigatoken gives other tokens than huggingface for {difference}")
        return plain, f"huggingface: gigatoken gives other tokens for {difference}"
    return fast, f"gigatoken, equal to huggingface on {len(texts)} texts"


def gate_texts(sample: Sequence[str]) -> list[str]:
    """Up to GATE_LINES lines of the sample with their line ends, its first texts whole, and GATE_TEXTS."""
    lines: list[str] = []
    for text in sample:
        lines += text.splitlines(keepends=True)[: GATE_LINES - len(lines)]
        if len(lines) >= GATE_LINES:
            break
    return [*GATE_TEXTS, *sample[:10], *lines]


def first_difference(plain: Encoder, fast: Encoder, texts: Sequence[str]) -> str | None:
    """The start of the first text that the two encode differently; None if there is none."""
    for text, left, right in zip(texts, plain.encode(texts), fast.encode(texts), strict=True):
        if not np.array_equal(left, right):
            return repr(text[:40])
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
