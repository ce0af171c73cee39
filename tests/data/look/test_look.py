"""Looking at data: a sample's parts against the stream's tokens, the page against its corpus."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data.__main__ import main
from data.build import build
from data.config import DataConfig, SourceConfig, StoreConfig, TokenizerConfig
from data.contract import IGNORE
from data.look.html import html_page, table_section
from data.look.inspect import document_runs, read_sample
from data.look.report import change_tables, curves, groups_of_copies, language_shares, read_corpus
from data.stream.fim import apply_fim
from data.stream.stream import open_stream
from tests.data.synthetic import planted, token_corpus, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    # Made-up English is no language that the language model would know.
    write_jsonl(folder / "zh.jsonl", [d for d in planted(5, 14, (0.0, 0.01)) if d.source == "zh"])
    config = DataConfig(
        out=str(folder / "corpus"),
        sources={"zh": SourceConfig(path=str(folder / "zh.jsonl"), language="zh")},
        tokenizer=TokenizerConfig(vocab_size=700),
        store=StoreConfig(block_tokens=4096, plan_lengths=[256]),
    )
    said = io.StringIO()
    build(config, Console(file=said, width=200))
    assert "encoder: gigatoken, equal to huggingface on" in said.getvalue()
    return folder / "corpus"


@pytest.mark.parametrize("parts", [(0, 0, 0), (3, 0, 2), (4, 5, 6), (0, 7, 0)])
def test_runs_are_where_fim_puts_its_parts(parts: tuple[int, int, int]) -> None:
    prefix, suffix, middle = parts
    content = np.arange(100, 100 + sum(parts))
    # The middle lies between prefix and suffix in the stored text.
    document = np.concatenate([[0], content, [1]])
    read = apply_fim(document, prefix, prefix + middle, (3, 4, 5))
    runs = document_runs(len(read), (prefix, suffix, middle))
    found = {kind: read[first:end].tolist() for kind, first, end in runs if kind != "special"}
    assert found["prefix"] == content[:prefix].tolist()
    assert found["middle"] == content[prefix : prefix + middle].tolist()
    assert found["suffix"] == content[prefix + middle :].tolist()
    assert [read[first] for kind, first, _ in runs if kind == "special"] == [0, 3, 4, 5, 1]
    assert runs[0][1] == 0 and runs[-1][2] == len(read)
    assert all(left[2] == right[1] for left, right in pairwise(runs))


def test_a_sample_is_described_as_it_is_read(corpus: Path) -> None:
    stream = open_stream(corpus, 256, mtp_depth=0, seed=3, stage="x", fim_rate=0.5)
    rearranged = 0
    copies: dict[str, int | None] = {}
    for number in range(40):
        sample, batch = read_sample(stream, number), stream.read([number])
        assert sample.tokens == tuple(batch.tokens[0].tolist())
        assert sample.labels == int((batch.labels[0] != IGNORE).sum())
        assert sample.padding == int((~batch.real[0]).sum())
        for piece in sample.pieces:
            inside = batch.documents[0, piece.place : piece.place + piece.length]
            assert set(inside.tolist()) == {piece.number}
            assert piece.runs[0].first == piece.place and piece.runs[-1].end == piece.place + piece.length
            specials = [sample.tokens[r.first] for r in piece.runs if r.kind == "special"]
            assert set(specials) <= {0, 1, 3, 4, 5}
            rearranged += piece.fim is not None
            assert piece.id
            copies[piece.id] = piece.copies
    assert rearranged > 5
    removed = pq.read_table(corpus / "dedup" / "removed.parquet")
    groups = Counter(removed["kept_id"].to_pylist())
    assert copies == {name: 1 + groups[name] for name in copies} and 3 in copies.values()


def test_a_corpus_without_identities_is_described(tmp_path: Path) -> None:
    token_corpus(tmp_path, {"one": 30})
    sample = read_sample(open_stream(tmp_path, 64, mtp_depth=0, seed=3, stage="x"), 0)
    assert {(piece.id, piece.copies) for piece in sample.pieces} == {("", None)}


def test_inspect_prints_documents_and_one_object(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"data={corpus}", "sample=2", "length=256", "fim_rate=0.5", "seed=3"]) == 0
    said = capsys.readouterr().out
    last = json.loads(said.splitlines()[-1])
    assert "copies" in said and all(document["copies"] in (1, 2, 3) for document in last["documents"])
    assert last["source"] == "zh" and sum(d["tokens"] for d in last["documents"]) + last["padding"] == 256
    assert main(["inspect", f"data={corpus}", "sample=-1"]) == 64
    assert "sample: found -1" in capsys.readouterr().err


def test_the_page_holds_its_pictures(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"data={corpus}", f"out={tmp_path / 'page'}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["pictures"] == ["languages", "steps", "lengths", "copies", "fertility"]
    text = (tmp_path / "page" / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 5
    assert "Removed beside kept" in text and "<mark>" in text
    assert all((tmp_path / "page" / f"{name}.png").stat().st_size > 5000 for name in last["pictures"])


def test_many_sources_are_drawn_by_language(corpus: Path) -> None:
    one = read_corpus(corpus, {})
    source = one.manifest.sources[0]
    names = [f"s{number}" for number in range(7)]
    sources = tuple(replace(source, name=name, language="ab"[i % 2]) for i, name in enumerate(names))
    many = replace(
        one,
        manifest=replace(one.manifest, sources=sources),
        length_D={name: np.array([i]) for i, name in enumerate(names)},
    )
    assert {name: lengths.tolist() for name, lengths in curves(many).items()} == {"a": [0, 2, 4, 6], "b": [1, 3, 5]}
    assert curves(one) is one.length_D


def test_shares_of_languages(corpus: Path) -> None:
    one = read_corpus(corpus, {})
    source = one.manifest.sources[0]
    sources = (replace(source, weight="1/3"), replace(source, name="b", language="en", weight="2/3"))
    shares = language_shares(replace(one, manifest=replace(one.manifest, sources=sources)))
    assert shares["samples"] == {"zh": 1 / 3, "en": 2 / 3}
    lines = (corpus.parent / "zh.jsonl").read_text().splitlines()
    assert shares["text read"] == {"zh": sum(len(json.loads(line)["text"].encode()) for line in lines)}
    assert shares["tokens"] == {"zh": source.tokens}
    assert shares["text kept"] == {"zh": source.text_bytes} and source.text_bytes < shares["text read"]["zh"]


def test_a_page_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"data={tmp_path}"]) == 65
    assert "cannot read the manifest" in capsys.readouterr().err


def test_groups_of_copies_count_the_one_that_stays() -> None:
    rows = [("a", "1", "9"), ("a", "2", "9"), ("a", "3", "8"), ("b", "4", "8")]
    table = pa.table({key: [row[i] for row in rows] for i, key in enumerate(("kept_source", "id", "kept_id"))})
    assert groups_of_copies(table) == {2: 2, 3: 1}
    assert groups_of_copies(table.slice(0, 0)) == {}


def test_text_is_escaped() -> None:
    shown = html_page("<t>", "", [table_section("<h>", "&", ("<c>",), [("<x>",), (1234,), (0.5,)])])
    assert "<t>" not in shown.replace("<title>", "") and "&lt;x&gt;" in shown and "1,234" in shown and "0.5" in shown


def test_plans_are_made_beforehand(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["plans", f"data={corpus}", "lengths=[128,512]", "fim_rates=[0.1]", "seeds=[3]", "epochs=[0,1]"]
    assert main(said) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == 8
    made = {path.name for path in (corpus / "plans").glob("*seed3*.npy")}
    assert made == {f"zh-{length}-fim0.1-seed3-epoch{epoch}.npy" for length in (128, 512) for epoch in (0, 1)}
    for wrong, message in (
        ("workers=0", "workers: found 0"),
        ("fim_rates=[2]", "FIM rate: found 2"),
        ("lengths=[1]", "1, need"),
    ):
        assert main(["plans", f"data={corpus}", wrong]) == 64
        assert message in capsys.readouterr().err


def test_repetitions_are_told() -> None:
    counts = {"repeated_documents": 3, "added_documents": 5, "added_tokens": 1234}
    told = {"steps": {}, "dropped": {}, "languages": {"zh": counts, "en": dict.fromkeys(counts, 0)}}
    (table,) = change_tables(told)
    assert "<h2>Repeated</h2>" in table and "1,234" in table and "zh" in table and "en" not in table.split("<tr>")[-1]
    assert change_tables({**told, "languages": {"en": dict.fromkeys(counts, 0)}}) == []
