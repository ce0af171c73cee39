"""Documents that stand for many are stored several times: what repeats, where it lies, and sums that add up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data.__main__ import main
from data.build import build
from data.config import validate
from data.documents import Document
from data.errors import UsageError
from data.hashing import key64
from data.stages.tokenising import times_stored
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from tests.data.stages.corpus import documents, settings
from tests.data.synthetic import write_jsonl

QUIET = Console(quiet=True)
UPSAMPLE = {2: 2, 4: 3}
LANGUAGES = ("en", "zh")


def planted() -> list[Document]:
    """Each fifth document stands for three, each tenth for five."""
    found = documents()
    more = [d for d in found if d.id.endswith("/same") and int(d.id.split("/")[0]) % 10 == 0]
    return found + [replace(d, id=f"{d.id}{number}") for d in more for number in (1, 2)]


@dataclass(frozen=True)
class Built:
    """A build's directory, its report, and (identity, copies, tokens) of every document stored, in order, by source."""

    out: Path
    report: dict[str, Any]
    stored: dict[str, list[tuple[str, int, tuple[int, ...]]]]


def built(out: Path, paths: dict[str, list[Path]], upsample: dict[int, int], **changes: int) -> Built:
    config = settings(out, paths, **changes)
    config.dedup.upsample = upsample
    report = build(config, QUIET)
    manifest = load_manifest(out)
    store = BlockStore(out, manifest)
    stored: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {}
    for source in manifest.sources:
        stored[source.name] = held = []
        for block in source.blocks:
            named, tokens, offsets = store.identities(block), store.tokens(block), store.offsets(block)
            assert named.copies is not None
            pieces = (tuple(tokens[a:b].tolist()) for a, b in pairwise(offsets))
            held += list(zip(named.id, named.copies, pieces, strict=True))
        assert len(held) == source.documents
    return Built(out, report, stored)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    directory = tmp_path_factory.mktemp("sources")
    for language in LANGUAGES:
        write_jsonl(directory / f"{language}.jsonl", [d for d in planted() if d.language == language])
    return {language: [directory / f"{language}.jsonl"] for language in LANGUAGES}


@pytest.fixture(scope="module")
def once(paths: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(tmp_path_factory.mktemp("once") / "out", paths, {})


@pytest.fixture(scope="module")
def several(paths: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(tmp_path_factory.mktemp("several") / "out", paths, UPSAMPLE)


def heldout(out: Path, language: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "heldout" / f"{language}.jsonl").read_text().splitlines()]


def test_copies_are_kept_to_the_end(once: Built) -> None:
    removed = pq.read_table(once.out / "dedup" / "removed.parquet").to_pylist()
    groups = Counter((row["kept_source"], row["kept_id"]) for row in removed)
    for language in LANGUAGES:
        held = [(row["id"], row["copies"]) for row in heldout(once.out, language)]
        stored = [(identity, copies) for identity, copies, _ in once.stored[language]]
        assert len(held) == 4 and len(dict(stored + held)) == len(stored + held) == 40
        for identity, copies in stored + held:
            assert copies == 1 + groups[language, identity]
            assert copies == (5 if int(identity.split("/")[0]) % 10 == 0 else 3 if copies > 1 else 1)
        assert Counter(copies for _, copies in stored + held) == {1: 32, 3: 4, 5: 4}


def test_documents_that_stand_for_many_are_stored_several_times(once: Built, several: Built) -> None:
    for language in LANGUAGES:
        before, after = once.stored[language], several.stored[language]
        counts = Counter(after)
        assert set(counts) == set(before)
        assert all(count == {1: 1, 3: 2, 5: 3}[copies] for (_, copies, _), count in counts.items())
        # Every document has the key that it had; its repetitions lie elsewhere.
        rest = iter(after)
        assert all(document in rest for document in before)
        assert sum(a == b for a, b in pairwise(after)) < 3
        assert heldout(once.out, language) == heldout(several.out, language)
    assert several.report["tokenizer_sha256"] == once.report["tokenizer_sha256"]


def test_documents_lie_in_the_order_of_their_keys(once: Built) -> None:
    for language in LANGUAGES:
        names = [identity for identity, _, _ in once.stored[language]]
        assert names == sorted(names, key=lambda name: key64("shuffle", 17, language, name))


def test_sums_add_up(once: Built, several: Built) -> None:
    for language in LANGUAGES:
        steps = [row[language] for row in several.report["steps"].values()]
        for before, after in pairwise(steps):
            for what in ("documents", "bytes"):
                gained = before[what] + after.get(f"added_{what}", 0)
                assert gained == after[what] + after[f"dropped_{what}"]
        plain, row = once.report["languages"][language], several.report["languages"][language]
        last = several.report["steps"]["upsampled"][language]
        assert last["dropped_documents"] == last["dropped_bytes"] == 0
        many = [(copies, len(tokens)) for _, copies, tokens in once.stored[language] if copies > 1]
        times = {3: 1, 5: 2}
        assert row["repeated_documents"] == len(many) > 4
        assert row["added_documents"] == last["added_documents"] == sum(times[copies] for copies, _ in many)
        assert row["added_tokens"] == sum(times[copies] * length for copies, length in many)
        assert row["documents"] == plain["documents"] + row["added_documents"] == last["documents"]
        assert row["tokens"] == plain["tokens"] + row["added_tokens"]
        assert row["bytes"] == plain["bytes"] + last["added_bytes"] == last["bytes"]
        assert plain["repeated_documents"] == plain["added_documents"] == plain["added_tokens"] == 0
        texts = {d.id: len(d.text.encode()) for d in planted() if d.language == language}
        repeated = [(identity, times[copies]) for identity, copies, _ in once.stored[language] if copies > 1]
        # Texts lose the space at their end when they are normalised.
        size = sum(more * texts[identity] for identity, more in repeated)
        assert 0 <= size - last["added_bytes"] <= row["added_documents"]
    assert "upsampled" not in once.report["steps"]


def test_what_reaches_nothing_changes_nothing(once: Built, paths: dict[str, list[Path]], tmp_path: Path) -> None:
    same = built(tmp_path / "out", paths, {6: 2})
    assert same.report["manifest_digest"] == once.report["manifest_digest"]
    assert same.report["steps"]["upsampled"]["en"]["added_documents"] == 0


def test_same_digest_for_any_number_of_shards_and_workers(
    several: Built, paths: dict[str, list[Path]], tmp_path: Path
) -> None:
    again = built(tmp_path / "out", paths, {4: 3, 2: 2}, workers=2, shard_bytes=23_000)
    assert again.report["manifest_digest"] == several.report["manifest_digest"] != ""
    assert again.report["languages"] == several.report["languages"]


def test_times_are_those_of_the_largest_size_reached() -> None:
    copies = np.arange(1, 13, dtype=np.int32)
    for upsample in ((), ((2, 1),), ((2, 2), (10, 3)), ((3, 5), (4, 6), (12, 100))):
        wanted = [max([1, *(times for least, times in upsample if count >= least)]) for count in copies.tolist()]
        assert times_stored(copies, upsample).tolist() == wanted


@pytest.mark.parametrize(
    ("upsample", "message"),
    [
        ({2: 0}, "dedup.upsample.2: found 0 times, allowed 1 to 100"),
        ({3: 101}, "dedup.upsample.3: found 101 times, allowed 1 to 100"),
        ({1: 2}, "dedup.upsample: found 1 copies, need at least 2"),
        ({10: 2, 2: 2}, "dedup.upsample.10: found 2 times, need more than the 2 of 2 copies"),
        ({2: 3, 10: 2}, "dedup.upsample.10: found 2 times, need more than the 3 of 2 copies"),
        ({2: 1.5}, "dedup.upsample: found 2: 1.5, need whole numbers"),
        ({"2": 2}, "dedup.upsample: found 2: 2, need whole numbers"),
        ({2: True}, "dedup.upsample: found 2: True, need whole numbers"),
    ],
)
def test_wrong_values_are_one_line(upsample: dict[int, int], message: str) -> None:
    config = settings(Path("out"), {"en": [Path("en.jsonl")]})
    config.dedup.upsample = upsample
    with pytest.raises(UsageError, match=f"^{message}$") as error:
        validate(config)
    assert error.value.exit_code == 64
    config.dedup.upsample = {2: 1, 10: 100}
    validate(config)


def test_the_command_shows_it(
    several: Built, paths: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"sources.{language}.path={files[0]}" for language, files in paths.items()]
    small = ["heldout_share=0.1", "dedup.bands=4", "dedup.rows=4", "tokenizer.vocab_size=400"]
    assert main(["build", f"out={tmp_path / 'out'}", *given, *small, "+dedup.upsample={2: 2, 4: 3}"]) == 0
    said = capsys.readouterr().out
    table = said.partition("repeated for their copies")[2].splitlines()
    for language in LANGUAGES:
        row = several.report["languages"][language]
        (line,) = [line for line in table[:12] if f" {language} " in line]
        assert f" {row['repeated_documents']} " in line and f" {row['added_documents']} " in line
    last = json.loads(said.splitlines()[-1])
    assert last["languages"]["en"]["added_documents"] == several.report["languages"]["en"]["added_documents"]
