"""Fertility of tokenizers: how many bytes of a language one token stands for, beside other tokenizers at hand.

More bytes per token is a shorter sequence for the same text. Text is measured as it is, special tokens spelled in it
as text; BOS and EOS are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from data.encoder import huggingface_encoder
from data.errors import DataError
from data.tokenizer import TOKENIZER_FILE


@dataclass(frozen=True)
class Fertility:
    """Of one tokenizer on one language. bytes_per_token, characters_per_token: UTF-8 bytes and characters of the text
    by content tokens. single_byte_share: tokens that stand for one byte of a longer character, of all tokens: what the
    vocabulary lacks."""

    bytes_per_token: float
    characters_per_token: float
    single_byte_share: float


def fertility(content: bytes, texts: Sequence[str]) -> Fertility:
    """content: of a tokenizer.json. Error: DataError when it is none or the texts are empty."""
    encoder = huggingface_encoder(content)
    size, characters = sum(len(text.encode()) for text in texts), sum(len(text) for text in texts)
    if not size:
        raise DataError("fertility: no text to measure on")
    tokens = encoder.encode(texts)
    count = sum(len(part) for part in tokens)
    # One character that a byte-level vocabulary spells by bytes decodes to U+FFFD byte by byte.
    names = encoder.tokenizer.decode_batch([[token] for token in range(encoder.tokenizer.get_vocab_size())])
    lone = {token for token, name in enumerate(names) if name == "\ufffd"}
    single = sum(1 for part in tokens for token in part.tolist() if token in lone)
    return Fertility(size / count, characters / count, single / count)


def tokenizer_content(folder: Path) -> bytes:
    """tokenizer.json of a Hugging Face folder, or such a file itself. Error: DataError."""
    path = folder / TOKENIZER_FILE if folder.is_dir() else folder
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from None


def compare(folders: Mapping[str, Path], texts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict[str, float]]]:
    """tokenizer name -> language -> the fields of Fertility. Errors: DataError, naming the folder."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in folders.items():
        content = tokenizer_content(folder)
        try:
            found[name] = {language: asdict(fertility(content, some)) for language, some in texts.items()}
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
    return found


def fertility_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """The comparison, one row per tokenizer."""
    languages = list(next(iter(found.values())))
    table = Table(title="held-out text: bytes per token (tokens of a lone byte)")
    for column in ("tokenizer", *languages):
        table.add_column(column, justify="right" if column != "tokenizer" else "left")
    for name, row in found.items():
        cells = [f"{row[x]['bytes_per_token']:.2f} ({100 * row[x]['single_byte_share']:.1f} %)" for x in languages]
        table.add_row(name, *cells)
    return table
