"""Dedup over files against dedup in memory, whatever the files, processes and parts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.dedup.index import check_index
from data.dedup.memory import exact_duplicates, near_duplicates
from data.dedup.minhash import MinHash, jaccard, shingles
from data.dedup.settings import DedupSettings
from data.documents import Document
from data.errors import DataError, UsageError
from tests.data.dedup.files import kept, run_dedup, write_shards
from tests.data.synthetic import planted


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    documents = planted(seed=5, bases=30, shares=(0.01, 0.03, 0.3))
    documents += [Document(f"{d.id}/same", d.text, d.source, d.language) for d in documents[::7]]
    documents += [Document(f"empty{i}", "…" * (i + 1), "en", "en") for i in range(3)]
    documents += [Document(f"short{i}", "two words", "en", "en") for i in range(3)]
    random.Random(1).shuffle(documents)
    return documents


def in_memory(documents: list[Document], threshold: float) -> tuple[dict[tuple[str, str], int], Counter[str]]:
    """Survivors and group sizes from the functions over lists."""
    exact = exact_duplicates(documents)
    near = near_duplicates([d for d, keep in zip(documents, exact.keep) if keep], MinHash(), threshold)
    left = [index for index, keep in enumerate(exact.keep.tolist()) if keep]
    final = {index: left[near.survivor[place]] for place, index in enumerate(left)}
    sizes = Counter(final[int(index)] for index in exact.survivor)
    identities = {(documents[i].source, documents[i].id): size for i, size in sizes.items()}
    counts = Counter(exact=int((~exact.keep).sum()), near=int((~near.keep).sum()), kept=len(identities))
    return identities, counts


@pytest.mark.parametrize("threshold", [0.7, 0.0])
def test_files_give_what_memory_gives(corpus: list[Document], tmp_path: Path, threshold: float) -> None:
    expected, counts = in_memory(corpus, threshold)
    splits = {"one": ([], corpus, 1), "several": ([1, 0, 70, 31], corpus[::-1], 3)}
    for name, (sizes, documents, parts) in splits.items():
        shards = write_shards(tmp_path / name / "in", documents, sizes)
        outcome = run_dedup(tmp_path / name / "work", shards, DedupSettings(threshold=threshold, parts=parts))
        assert kept(outcome) == expected
        assert {kind: outcome.counts[kind] for kind in counts} == counts
        removed = pq.read_table(outcome.removed).to_pylist()
        assert len(removed) == len(corpus) - len(expected)
        assert {(row["kept_source"], row["kept_id"]) for row in removed} <= set(expected)
        text = {(d.source, d.id): d.text for d in corpus}
        for row in removed:
            like = jaccard(
                *(shingles(text[row[s], row[i]], 5) for s, i in (("source", "id"), ("like_source", "like_id")))
            )
            if row["kind"] == "near":
                assert row["jaccard"] == (pytest.approx(like, abs=1e-12) if threshold else None)
                assert like >= threshold
            else:
                assert text[row["source"], row["id"]] == text[row["like_source"], row["like_id"]]
        totals = Counter[str]()
        for part in outcome.parts:
            for kind, rows in (("kept", part["documents"]), *part["removed"].items()):
                totals[kind] += sum(row[0] for row in rows.values())
        assert +totals == +counts


def test_processes_do_not_matter(corpus: list[Document], tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", corpus, [60, 60])
    found = {workers: run_dedup(tmp_path / f"work{workers}", shards, DedupSettings(), workers) for workers in (1, 2)}
    for one, two in zip(found[1].shards, found[2].shards, strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()
    assert Path(found[1].removed).read_bytes() == Path(found[2].removed).read_bytes()


def test_scopes_keep_copies_of_another_language_or_dump(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(100))
    near = text.replace("word50", "other")
    documents = [
        Document("a", text, "first", "en"),
        Document("b", text, "second", "en"),
        Document("c", near, "third", "zh"),
    ]
    shards = write_shards(tmp_path / "in", documents, [1])
    expected = {"global": {"a"}, "language": {"a", "c"}, "dump": {"a", "b"}}
    for scope, ids in expected.items():
        settings = DedupSettings(threshold=0.5, scope=scope, dumps=(("third", "second"),))
        outcome = run_dedup(tmp_path / scope, shards, settings)
        assert {id_ for _, id_ in kept(outcome)} == ids
    with pytest.raises(UsageError, match="allowed global, language, dump"):
        DedupSettings(scope="file")


@pytest.mark.parametrize("sizes", [[], [3, 50]])
def test_documents_of_an_earlier_corpus_go(corpus: list[Document], tmp_path: Path, sizes: list[int]) -> None:
    words = [f"w{i}" for i in range(400)]
    chain = [Document(f"chain{i}", " ".join(words[50 * i : 50 * i + 300]), "en", "en") for i in range(3)]
    old = [*corpus[::2], chain[0]]
    new = [Document(f"new/{d.id}", d.text, d.source, d.language) for d in [*corpus[1::2], corpus[0], *chain[1:]]]
    minhash = MinHash(bands=28, rows=4)  # misses no copy at any seed
    first = run_dedup(tmp_path / "old", write_shards(tmp_path / "in_old", old, [20]), DedupSettings(minhash))
    shards = write_shards(tmp_path / "in", new, sizes)
    index = Path(first.index[0]).parent
    settings = DedupSettings(minhash, threshold=0.6)
    alone = kept(run_dedup(tmp_path / "alone", shards, settings))
    outcome = run_dedup(tmp_path / "new", shards, settings, earlier=index)
    here = kept(outcome)
    assert set(here) < set(alone)
    rows = {(row["source"], row["id"]): row for row in pq.read_table(outcome.removed).to_pylist()}
    survivors = kept(first)
    text = {(d.source, d.id): d.text for d in [*old, *new]}
    earlier = [row for row in rows.values() if row["kind"] == "earlier"]
    assert len(earlier) == outcome.counts["earlier"] > 20
    assert all((row["kept_source"], row["kept_id"]) in survivors for row in earlier)
    # What stays is like nothing that stayed before; what is like something is gone.
    for source, id_ in here:
        assert max(jaccard(shingles(text[source, id_], 5), shingles(text[other], 5)) for other in survivors) < 0.75
    direct = [row for row in earlier if (row["like_source"], row["like_id"]) in survivors]
    for row in direct:
        exact = jaccard(
            shingles(text[row["source"], row["id"]], 5), shingles(text[row["like_source"], row["like_id"]], 5)
        )
        assert abs(row["jaccard"] - exact) < 5 * 0.05
    assert rows["en", "new/chain1"]["kept_id"] == "chain0"
    # The third of the chain is only like the second, and goes with it.
    assert rows["en", "new/chain2"]["kind"] == "earlier"
    assert (rows["en", "new/chain2"]["like_id"], rows["en", "new/chain2"]["kept_id"]) == ("new/chain1", "chain0")
    # An index made against an earlier one holds both corpora.
    both = Path(outcome.index[0]).parent
    assert check_index(both, settings)["documents"] == len(survivors) + len(here)
    assert kept(run_dedup(tmp_path / "again", shards, settings, earlier=both)) == {}
    assert (
        kept(run_dedup(tmp_path / "old_again", write_shards(tmp_path / "in_again", old, []), settings, earlier=both))
        == {}
    )


def test_an_index_of_other_settings_is_refused(corpus: list[Document], tmp_path: Path) -> None:
    outcome = run_dedup(tmp_path / "old", write_shards(tmp_path / "in", corpus[:20], []), DedupSettings())
    index = Path(outcome.index[0]).parent
    with pytest.raises(UsageError, match="made with minhash"):
        run_dedup(tmp_path / "a", [], DedupSettings(MinHash(seed=2)), earlier=index)
    with pytest.raises(UsageError, match="made with scope global, this corpus has dump"):
        run_dedup(tmp_path / "b", [], DedupSettings(scope="dump"), earlier=index)
    with pytest.raises(DataError, match="no signature index"):
        run_dedup(tmp_path / "c", [], DedupSettings(), earlier=tmp_path)


def test_examples_show_where_texts_differ(corpus: list[Document], tmp_path: Path) -> None:
    outcome = run_dedup(tmp_path / "work", write_shards(tmp_path / "in", corpus, [40]), DedupSettings())
    examples = json.loads(Path(outcome.examples).read_text(encoding="utf-8"))
    text = {(d.source, d.id): d.text for d in corpus}
    assert {example["kind"] for example in examples} == {"exact", "near"}
    for example in examples:
        removed, stays = text[tuple(example["removed"])], text[tuple(example["kept"])]
        shown = example["difference"]
        assert shown["before"] + shown["removed"] in removed
        assert shown["before"] + shown["kept"] in stays
        assert (shown["removed"] == shown["kept"] == "") == (removed == stays)
        assert example["jaccard"] == pytest.approx(jaccard(shingles(removed, 5), shingles(stays, 5)))
