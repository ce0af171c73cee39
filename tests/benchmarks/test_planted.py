"""The planted corpus and its checks, on 2,000 made-up documents."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import planted as benchmark
from benchmarks.planted_corpus import CHUNK_CHARACTERS, planted
from data.dedup.minhash import jaccard, shingles
from data.errors import DataError
from tests.data.synthetic import chinese, english

DOCUMENTS = 2000


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts for 1,150 English and 450 Chinese chunks, in a few long documents."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(3)
    texts = {
        "en": ["".join(english(rng, 45_000)) for _ in range(13)],
        "zh": ["".join(chinese(rng, 63_000)) for _ in range(5)],
    }
    for language, parts in texts.items():
        lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(parts)]
        (folder / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_copies_are_what_they_are_called(raw: Path) -> None:
    corpus = planted(raw, DOCUMENTS, seed=11)
    assert len(corpus.documents) == DOCUMENTS
    assert Counter(d.language for d in corpus.documents if "/" not in d.id) == {"en": 1150, "zh": 450}
    assert Counter(kind for _, _, kind in corpus.pairs)["edit1"] == 120
    found: dict[str, list[float]] = {}
    for base, copy, kind in corpus.pairs:
        left, right = corpus.documents[base], corpus.documents[copy]
        assert right.id == f"{left.id}/{kind}"
        assert (left.text == right.text) == (kind == "exact")
        found.setdefault(kind, []).append(jaccard(shingles(left.text, 5), shingles(right.text, 5)))
    average = {kind: sum(values) / len(values) for kind, values in found.items()}
    assert average["space"] == 1.0
    # n edits in a run of 5 tokens: a share (1 - e)^5 of the runs stays on either side.
    for kind, share in (("edit1", 0.01), ("edit3", 0.03), ("edit10", 0.1), ("edit25", 0.25)):
        same = (1 - share) ** 5
        assert average[kind] == pytest.approx(same / (2 - same), abs=0.03)
    assert planted(raw, DOCUMENTS, seed=11) == corpus
    with pytest.raises(DataError, match=r"give .* chunks of 2000 bytes, need 2300"):
        planted(raw, 2 * DOCUMENTS, seed=11)


def test_every_check_holds_on_made_up_texts(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = benchmark.main(["--raw", str(raw), "--documents", str(DOCUMENTS), "--seeds", "1", "--processes", "1"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (code, result["failed"]) == (0, [])
    assert set(CHUNK_CHARACTERS) == {row["language"] for row in result["seeds"]["1"]["recall"]}
    assert result["control_recall"] < 0.8 < 0.995 <= result["seeds"]["1"]["chinese_1_percent"]


@pytest.mark.slow
def test_every_check_holds_on_real_texts_for_any_number_of_processes() -> None:
    raw = Path("data_cache/corpus")
    if not raw.is_dir():
        pytest.skip("no data_cache/corpus: get it with launch/corpus.sh")
    assert benchmark.main(["--raw", str(raw)]) == 0


def test_a_check_that_does_not_hold_is_named() -> None:
    band = {"jaccard": [0.9, 1.0], "language": "zh", "recall": 0.98, "bound": 0.99}
    estimate = {"mean": 0.02, "rms": 0.03, "theory_rms": 0.03}
    row = {"recall": [band], "chinese_1_percent": 0.99, "under_half": 0.03, "estimate": estimate}
    result = {"seeds": {1: row}, "control_recall": 0.9, "survivors": {"a": "1", "b": "2"}}
    assert len(benchmark.failures(result)) == 6


def test_without_texts_one_line_says_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--raw", str(tmp_path)]) == 65
    assert capsys.readouterr().err.count("\n") == 1
