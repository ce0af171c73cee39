"""A build killed at any moment, split in any way, by any number of workers: the same corpus, no finished task twice."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from data.build import STAGE_COMMANDS, build, run_stage
from data.documents import Document
from data.errors import UsageError
from data.stages.marker import MARKER_FILE
from data.stages.runner import LOG_FILE
from tests.data.stages.corpus import documents, settings
from tests.data.synthetic import write_jsonl

ROOT = Path(__file__).resolve().parents[3]
QUIET = Console(quiet=True)
CONTAMINATED = "decontaminated/contaminated.jsonl"
BUILD = """
import pickle, sys
from rich.console import Console
from data.build import build
if __name__ == "__main__":
    build(pickle.loads(sys.stdin.buffer.read()), Console(quiet=True))
"""


@dataclass(frozen=True)
class Corpus:
    """Files by language: English in one plain file, which is read in ranges, Chinese in one that is read as a chain."""

    paths: dict[str, list[Path]]
    report: dict[str, Any]


def compressed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else zstandard.compress(content))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("sources")
    paths = {}
    for language in ("en", "zh"):
        paths[language] = [directory / f"{language}.jsonl"]
        write_jsonl(paths[language][0], [d for d in documents() if d.language == language])
    content = paths["zh"][0].read_bytes()
    paths["zh"] = [compressed(directory / "zh.jsonl.gz", content)]
    return Corpus(paths, build(settings(directory / "out", paths), QUIET))


def test_the_corpus_is_what_was_planted(corpus: Corpus) -> None:
    for language in ("en", "zh"):
        row = corpus.report["languages"][language]
        assert (row["documents_read"], row["exact_duplicates"], row["near_duplicates"]) == (56, 8, 8)
        assert row["documents"] + row["heldout_documents"] == 40
        assert row["blocks"] > 1


def split_files(directory: Path, seed: int) -> dict[str, list[Path]]:
    """The same documents in other order, in many files of all kinds."""
    rng = random.Random(seed)
    paths = {}
    for language in ("en", "zh"):
        found = [d for d in documents() if d.language == language]
        rng.shuffle(found)
        cut = sorted(rng.sample(range(1, len(found)), 3))
        groups = [found[a:b] for a, b in zip([0, *cut], [*cut, len(found)], strict=True)]
        place = directory / language
        place.mkdir()
        write_jsonl(place / "a.jsonl", groups[0])
        for name, group in (("b.jsonl.zst", groups[1]), ("c.jsonl.gz", groups[2])):
            write_jsonl(place / "x", group)
            compressed(place / name, (place / "x").read_bytes())
            (place / "x").unlink()
        pq.write_table(pa.Table.from_pylist([asdict(d) for d in groups[3]]), place / "d.parquet", row_group_size=5)
        paths[language] = [place]
    return paths


@pytest.mark.parametrize("workers", [1, pytest.param(2), pytest.param(4, marks=pytest.mark.slow)])
def test_same_digest_for_any_split_and_number_of_workers(corpus: Corpus, tmp_path: Path, workers: int) -> None:
    paths = split_files(tmp_path, seed=workers)
    report = build(settings(tmp_path / "out", paths, workers, shard_bytes=7_000 + 5_000 * workers), QUIET)
    assert report["manifest_digest"] == corpus.report["manifest_digest"]
    assert {key: report[key] for key in ("steps", "languages", "near_duplicates")} == {
        key: corpus.report[key] for key in ("steps", "languages", "near_duplicates")
    }
    assert not (tmp_path / "out.work").exists()


def finished(work: Path) -> set[str]:
    """Tasks whose outputs are there; one killed after its marker was written and before it got its name is not."""
    places = [path.parent.relative_to(work) for path in work.rglob(MARKER_FILE)]
    return {str(place) for place in places if not place.name.startswith(".")}


def begun(work: Path) -> list[str]:
    if not (work / LOG_FILE).exists():
        return []
    lines = (work / LOG_FILE).read_text().splitlines()
    return [f"{event['stage']}/{event['task']}" for event in map(json.loads, lines) if event["event"] == "begun"]


@pytest.mark.parametrize(("kills", "workers"), [(3, 2), pytest.param(10, 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on(corpus: Corpus, tmp_path: Path, kills: int, workers: int) -> None:
    rng = random.Random(kills)
    config = settings(tmp_path / "out", corpus.paths, workers)
    config.keep_work = True
    work = tmp_path / "out.work"
    whole = whole_build(corpus, tmp_path)
    stops = sorted(rng.sample(range(1, whole), kills))
    for stop in stops:
        before, seen = finished(work), len(begun(work))
        process = subprocess.Popen([sys.executable, "-c", BUILD], stdin=subprocess.PIPE, cwd=ROOT)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(config))
        process.stdin.close()
        while process.poll() is None and len(begun(work)) < stop:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.wait()
        assert not before & set(begun(work)[seen:])
        assert before <= finished(work)
    before, seen = finished(work), len(begun(work))
    assert 0 < len(before) < whole
    report = build(config, QUIET)
    assert report["manifest_digest"] == corpus.report["manifest_digest"]
    assert not before & set(begun(work)[seen:])


def whole_build(corpus: Corpus, directory: Path) -> int:
    """How many tasks a whole build has, from the log of one."""
    config = settings(directory / "whole", corpus.paths)
    config.keep_work = True
    build(config, QUIET)
    return len(begun(directory / "whole.work"))


def test_stages_one_by_one(corpus: Corpus, tmp_path: Path) -> None:
    config = settings(tmp_path / "out", corpus.paths)
    with pytest.raises(
        UsageError, match=r"stage 'import' is not finished \(0 of \d+ tasks done\): run `python -m data"
    ):
        run_stage(config, QUIET, "clean")
    for stage in STAGE_COMMANDS[:-1]:
        found = run_stage(config, QUIET, stage)
        assert found["stage"] == stage
        assert all(counts["done_before"] == 0 < counts["done_now"] for counts in found["tasks"].values())
        assert not (tmp_path / "out").exists()
    assert run_stage(config, QUIET, "publish")["manifest_digest"] == corpus.report["manifest_digest"]
    assert run_stage(config, QUIET, "import")["reused"]


def test_benchmark_texts_are_kept_out(corpus: Corpus, tmp_path: Path) -> None:
    found = [d for d in documents() if d.language == "en" and "/" not in d.id][:2]
    asked = [Document("q1", found[0].text[40:160], "b", "en"), Document("q2", "too short", "b", "en")]
    write_jsonl(tmp_path / "benchmark.jsonl", asked)
    config = settings(tmp_path / "out", corpus.paths)
    config.decontaminate.paths = [str(tmp_path / "benchmark.jsonl")]
    report = build(config, QUIET)
    assert report["steps"]["benchmarks"]["en"]["dropped_documents"] == 3
    assert report["steps"]["benchmarks"]["zh"]["dropped_documents"] == 0
    published = (tmp_path / "out" / CONTAMINATED).read_bytes()
    assert hashlib.sha256(published).hexdigest() == report["files"][CONTAMINATED]
    told = [json.loads(line) for line in published.splitlines()]
    assert [(match["source"], match["id"], match["benchmark"]) for match in told] == [
        ("en", name, "benchmark.jsonl:q1")
        for name in sorted([found[0].id, f"{found[0].id}/near", f"{found[0].id}/same"])
    ]
    assert CONTAMINATED not in corpus.report["files"]
    again = settings(tmp_path / "again", split_files(tmp_path, seed=5), shard_bytes=7_000)
    again.decontaminate.paths = config.decontaminate.paths
    assert build(again, QUIET)["files"][CONTAMINATED] == report["files"][CONTAMINATED]
    # What a file may hold depends on its size, also of benchmarks.
    rows = {"id": [d.id for d in asked], "text": [d.text for d in asked]}
    pq.write_table(pa.table(rows), tmp_path / "benchmark.parquet")
    again.decontaminate.paths = [str(tmp_path / "benchmark.parquet")]
    again.decontaminate.read.slack_bytes = 1
    assert build(again, QUIET)["steps"]["benchmarks"]["en"]["dropped_documents"] == 3


def test_a_source_of_several_languages(corpus: Corpus, tmp_path: Path) -> None:
    config = settings(tmp_path / "out", {"auto": corpus.paths["en"] + corpus.paths["zh"]})
    write_jsonl(tmp_path / "zh.jsonl", [replace(d, id=f"zh{d.id}") for d in documents() if d.language == "zh"])
    config.sources["auto"].paths = [str(corpus.paths["en"][0]), str(tmp_path / "zh.jsonl")]
    report = build(config, QUIET)
    for language in ("en", "zh"):
        assert report["steps"]["read"][language]["documents"] == 56
        assert report["languages"][language]["heldout_documents"] == 4


def test_changed_settings_redo_what_they_touch(corpus: Corpus, tmp_path: Path) -> None:
    config = settings(tmp_path / "out", corpus.paths)
    config.keep_work = True
    build(config, QUIET)
    seen = len(begun(tmp_path / "out.work"))
    config.store.block_tokens = 2500
    assert build(config, QUIET)["manifest_digest"] != corpus.report["manifest_digest"]
    assert {task.split("/")[0] for task in begun(tmp_path / "out.work")[seen:]} == {"shuffle", "plan"}


def test_damaged_work_is_made_again(corpus: Corpus, tmp_path: Path) -> None:
    config = settings(tmp_path / "out", corpus.paths)
    for stage in STAGE_COMMANDS[:-1]:
        run_stage(config, QUIET, stage)
    work = tmp_path / "out.work"
    shard = next(path for path in sorted((work / "clean").iterdir()) if not path.name.startswith("."))
    content = (shard / "documents.parquet").read_bytes()
    (shard / "documents.parquet").write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    seen = len(begun(work))
    config.keep_work = True
    assert build(config, QUIET)["manifest_digest"] == corpus.report["manifest_digest"]
    assert begun(work)[seen:] == [f"clean/{shard.name}"]
