"""A build with a tokenizer made elsewhere: its ids, its special tokens, its hash; what is none is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.baselines import heldout_documents
from data.build import build
from data.config import DataConfig
from data.errors import DataError
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.stream.stream import open_stream
from data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from tests.data.stages.corpus import documents, settings
from tests.data.synthetic import write_jsonl

QUIET = Console(quiet=True)
LANGUAGES = ("en", "zh")
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@dataclass(frozen=True)
class Made:
    """A tokenizer's folder, the ids it has (beginning, end, padding, fill-in-the-middle) and a build with it."""

    tokenizer: Tokenizer
    folder: Path
    ids: tuple[int, int, int, tuple[int, ...]]
    config: DataConfig
    report: dict[str, Any]


def byte_level(folder: Path) -> Tokenizer:
    """GPT-2's kind: one special token outside the vocabulary, no settings beside it. It cuts and pads what it encodes,
    and surrounds it, which documents must not meet.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([document.text for document in documents()], trainer)
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.add_tokens([AddedToken("  ", special=False)])
    end = made.token_to_id("<|endoftext|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    made.enable_truncation(20)
    made.enable_padding(length=30, pad_id=end, pad_token="<|endoftext|>")
    made.save(str(folder / TOKENIZER_FILE))
    return made


def sentence_piece(folder: Path) -> Tokenizer:
    """Llama's kind, of whole words and bytes, with StarCoder's tokens for fill-in-the-middle, saved by transformers."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<pad>", *FIM, "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=200, special_tokens=special, show_progress=False)
    made.train_from_iterator([document.text for document in documents()[:30]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return made


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    directory = tmp_path_factory.mktemp("sources")
    found = {}
    for language in LANGUAGES:
        found[language] = [directory / f"{language}.jsonl"]
        write_jsonl(found[language][0], [d for d in documents() if d.language == language])
    return found


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, paths: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = KINDS[request.param](folder)
    vocabulary = tokenizer.get_vocab()
    if request.param == "byte level":
        end = vocabulary["<|endoftext|>"]
        ids: tuple[int, int, int, tuple[int, ...]] = (end, end, end, ())
    else:
        ids = (vocabulary["<s>"], vocabulary["</s>"], vocabulary["<pad>"], tuple(vocabulary[name] for name in FIM))
    config = with_folder(settings(tmp_path_factory.mktemp("build") / "out", paths), folder)
    return Made(tokenizer, folder, ids, config, build(config, QUIET))


def with_folder(config: DataConfig, folder: Path) -> DataConfig:
    return replace(config, tokenizer=replace(config.tokenizer, path=str(folder), boundary_split=0.0))


def test_the_manifest_knows_the_tokenizer(made: Made) -> None:
    manifest = load_manifest(Path(made.config.out))
    content = (made.folder / TOKENIZER_FILE).read_bytes()
    assert manifest.tokenizer_sha256 == hashlib.sha256(content).hexdigest() == made.report["tokenizer_sha256"]
    assert (Path(made.config.out) / TOKENIZER_FILE).read_bytes() == content
    assert (manifest.bos_id, manifest.eos_id, manifest.pad_id, manifest.fim_ids) == made.ids
    entries = made.tokenizer.get_vocab_size()
    assert made.report["vocabulary"] == entries
    assert manifest.vocab_size == made.report["vocabulary_padded"] == -(-entries // 128) * 128


def test_stored_ids_are_what_the_tokenizer_says_of_the_texts(made: Made) -> None:
    out = Path(made.config.out)
    manifest = load_manifest(out)
    plain = Tokenizer.from_str(made.tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    store = BlockStore(out, manifest)
    begin, end, *_ = made.ids
    for source in manifest.sources:
        held = {document.id for document in heldout_documents(out, source.language)}
        texts = {d.text.strip() for d in documents() if d.language == source.language and d.id not in held}
        known = {(begin, *plain.encode(text, add_special_tokens=False).ids, end) for text in texts}
        stored = []
        for block in source.blocks:
            tokens = store.tokens(block)
            stored += [tuple(tokens[a:b].tolist()) for a, b in pairwise(store.offsets(block))]
        assert len(set(stored)) == len(stored) == source.documents
        assert set(stored) <= known


def test_the_corpus_opens(made: Made) -> None:
    stream = open_stream(made.config.out, 64, mtp_depth=1, seed=1, stage="pretrain")
    tokens = stream.read(range(200)).tokens
    begin, end, *_, fim = made.ids
    assert tokens.max() < made.tokenizer.get_vocab_size()
    assert begin in tokens and end in tokens
    assert not np.isin(tokens, fim).any()


def test_fill_in_the_middle_is_for_those_that_have_it(made: Made) -> None:
    fim = made.ids[3]
    if not fim:
        with pytest.raises(DataError, match="has no begin, hole and end tokens"):
            open_stream(made.config.out, 64, mtp_depth=1, seed=1, stage="pretrain", fim_rate=1.0)
        return
    stream = open_stream(made.config.out, 64, mtp_depth=1, seed=1, stage="pretrain", fim_rate=1.0)
    tokens = stream.read(range(8)).tokens
    assert all(token in tokens for token in fim)


def test_another_tokenizer_in_the_folder_is_another_corpus(made: Made) -> None:
    assert build(made.config, QUIET) == {**made.report, "reused": True}
    if made.ids[3]:
        return
    path = made.folder / TOKENIZER_FILE
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"\n")
        again = build(made.config, QUIET)
    finally:
        path.write_bytes(content)
    assert (again["reused"], again["tokenizer_sha256"]) == (False, hashlib.sha256(content + b"\n").hexdigest())
    assert again["manifest_digest"] != made.report["manifest_digest"]


def test_what_is_no_tokenizer_is_refused(paths: dict[str, list[Path]], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    config = with_folder(settings(tmp_path / "out", paths), folder)
    cases: list[tuple[str, dict[str, object]]] = [("cannot read the tokenizer", {}), ("not a tokenizer", {"model": 1})]
    folder.mkdir()
    for message, content in cases:
        if content:
            (folder / TOKENIZER_FILE).write_text(json.dumps(content))
        with pytest.raises(DataError, match=message) as caught:
            build(config, QUIET)
        assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / TOKENIZER_FILE))
    for message, text in (("has no end token", None), ("eos_token '</s>' is no entry", '{"eos_token": "</s>"}')):
        if text:
            (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            build(config, QUIET)
        assert caught.value.exit_code == 65
    assert not Path(config.out).exists()
