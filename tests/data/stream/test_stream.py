"""The stream against brute force over a made-up corpus: order, labels, counts, epochs, resume."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.contract import IGNORE, Manifest, MicroBatch, StreamState
from data.errors import DataError, UsageError
from data.store.blocks import BlockStore
from data.store.manifest import MANIFEST_FILE, load_manifest, manifest_json, with_digest
from data.stream.documents import PlanKey
from data.stream.plan import load_plan
from data.stream.stream import Stream, open_stream
from tests.data.synthetic import VOCABULARY, token_corpus

LENGTH = 32
DEPTH = 2
WEIGHTS = {"one": "2", "two": "1/2", "three": "1"}
DOCUMENTS = {"one": 70, "two": 41, "three": 25}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    token_corpus(directory, DOCUMENTS)
    return directory


def stream(corpus: Path, **changes: object) -> Stream:
    settings = {"length": LENGTH, "mtp_depth": DEPTH, "seed": 5, "stage": "pretrain", "weights": WEIGHTS, **changes}
    return open_stream(corpus, settings.pop("length"), **settings)  # type: ignore[arg-type]


def stored_documents(corpus: Path, name: str) -> list[list[int]]:
    """Documents of a source in the order of its blocks, read with nothing of the stream's."""
    documents = []
    for block in sorted(path.with_suffix("").relative_to(corpus) for path in corpus.glob(f"blocks/{name}/*.bin")):
        tokens = np.fromfile(corpus / f"{block}.bin", dtype="<u4").tolist()
        offsets = np.load(corpus / f"{block}.npy").tolist()
        documents += [tokens[a:b] for a, b in pairwise(offsets)]
    return documents


def pieces(batch: MicroBatch, row: int) -> list[tuple[int, list[int]]]:
    """(document, tokens) of each piece of a sequence, split where the document number changes."""
    found: list[tuple[int, list[int]]] = []
    for document, token in zip(batch.documents[row].tolist(), batch.tokens[row].tolist()):
        if document < 0:
            continue
        if not found or found[-1][0] != document:
            found.append((document, []))
        found[-1][1].append(token)
    return found


def test_every_token_of_an_epoch_exactly_once(corpus: Path) -> None:
    opened = stream(corpus)
    store = BlockStore(corpus, load_manifest(corpus))
    sizes = {s.name: int(load_plan(store, s, PlanKey(s.name, LENGTH)).sum()) for s in store.manifest.sources}
    samples = 2 * max(opened.mixture.period * size for size in sizes.values())
    source_N, count_N = opened.mixture.locate(np.arange(samples))
    for source, name in enumerate(opened.source_names):
        expected = stored_documents(corpus, name)
        orders = []
        for epoch in range(2):
            own = (source_N == source) & (count_N // sizes[name] == epoch)
            wanted = np.flatnonzero(own).tolist()
            assert len(wanted) == sizes[name]
            parts: dict[int, list[list[int]]] = {}
            order = []
            batch = opened.read(wanted)
            assert (batch.source == source).all()
            for row in range(len(wanted)):
                for document, tokens in pieces(batch, row):
                    parts.setdefault(document, []).append(tokens)
                    order.append(document)
            assert sorted(parts) == list(range(DOCUMENTS[name]))
            for document, tokens in enumerate(expected):
                cut = [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]
                assert sorted(parts[document]) == sorted(cut)
            orders.append(order)
        assert orders[0] != orders[1]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_labels_against_brute_force(corpus: Path, rate: float) -> None:
    opened = stream(corpus, fim_rate=rate)
    batch = opened.read(list(range(100)))
    padding = 0
    for row in range(100):
        tokens, document = batch.tokens[row].tolist(), batch.documents[row].tolist()
        for i in range(LENGTH):
            padding += document[i] < 0
            assert bool(batch.real[row, i]) == (document[i] >= 0)
            assert tokens[i] == 2 or document[i] >= 0
            for depth in range(DEPTH + 1):
                target = i + depth + 1
                inside = target < LENGTH and document[i] >= 0 and document[target] == document[i]
                labels = batch.labels if depth == 0 else batch.mtp_labels[depth - 1]
                assert labels[row, i] == (tokens[target] if inside else IGNORE)
                if depth:
                    assert batch.mtp_tokens[depth - 1, row, i] == (tokens[i + depth] if i + depth < LENGTH else 2)
    assert padding > 0
    assert (batch.positions == np.arange(LENGTH)).all()
    assert {array.dtype for array in (batch.tokens, batch.labels, batch.mtp_labels, batch.documents)} == {
        np.dtype("int64")
    }


@pytest.mark.parametrize("changes", [{}, {"fim_rate": 0.5, "skip": [(10, 30), (305, 310)]}])
def test_counts_are_those_of_the_batch(corpus: Path, changes: dict[str, object]) -> None:
    opened = stream(corpus, **changes)
    for first, samples in ((0, 64), (17, 1), (300, 41), (1000, 7)):
        counts = stream(corpus, **changes).counts(first, samples)
        batch = opened.read(list(range(first, first + samples)))
        assert counts.main == (batch.labels != IGNORE).sum()
        assert counts.mtp == tuple((batch.mtp_labels != IGNORE).sum(axis=(1, 2)).tolist())
        assert (counts.sequences, counts.tokens) == (samples, batch.real.sum())
        per_row = (batch.labels != IGNORE).sum(axis=1)
        assert counts.sources == {
            name: per_row[batch.source == source].sum() for source, name in enumerate(opened.source_names)
        }


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("length", [8, LENGTH, 200])
def test_reading_against_its_reference(corpus: Path, depth: int, length: int) -> None:
    opened = stream(corpus, length=length, mtp_depth=depth, fim_rate=0.4)
    for samples in (list(range(60)), [977], [5, 3, 900, 3]):
        fast, plain = opened.read(samples), opened.read_reference(samples)
        for field in asdict(plain):
            left, right = getattr(fast, field), getattr(plain, field)
            assert left.dtype == right.dtype
            assert np.array_equal(left, right), field


def test_same_samples_whatever_the_reading_order(corpus: Path) -> None:
    def equal(left: MicroBatch, right: MicroBatch) -> bool:
        return all(np.array_equal(getattr(left, field), getattr(right, field)) for field in asdict(left))

    whole = stream(corpus).read(list(range(200)))
    shuffled = list(range(200))
    random.Random(1).shuffle(shuffled)
    other = stream(corpus)
    for sample in shuffled:
        one = other.read([sample])
        cut = MicroBatch(
            *(getattr(whole, f)[:, [sample]] if "mtp" in f else getattr(whole, f)[[sample]] for f in asdict(whole))
        )
        assert equal(one, cut)
    for ranks in (2, 4, 5):
        for rank in range(ranks):
            mine = list(range(rank, 200, ranks))
            assert np.array_equal(stream(corpus).read(mine).tokens, whole.tokens[mine])


def test_seeds_and_shares(corpus: Path) -> None:
    one, other = stream(corpus), stream(corpus, seed=6)
    assert not np.array_equal(one.read(list(range(20))).tokens, other.read(list(range(20))).tokens)
    taken = Counter(one.read(list(range(700))).source.tolist())
    assert taken == {0: 400, 1: 100, 2: 200}
    only = stream(corpus, weights={"two": "1"})
    assert (only.read(list(range(20))).source == 1).all()
    assert only.source_names == ("one", "two", "three")


def test_state_resumes_and_refuses_other_data(corpus: Path, tmp_path: Path) -> None:
    opened = stream(corpus)
    state = opened.state(123)
    assert sum(state.per_source) == 123
    text = json.dumps(asdict(state))
    assert len(text) < 2048
    assert stream(corpus).resume(StreamState.from_json(json.loads(text))) == 123
    for change in ({"seed": 6}, {"stage": "extend"}, {"length": 64}, {"weights": {"one": "1", "two": "1"}}):
        with pytest.raises(DataError, match="another stream"):
            stream(corpus, **change).resume(state)
    token_corpus(tmp_path, DOCUMENTS, seed=1)
    with pytest.raises(DataError, match="stream state is of manifest"):
        stream(tmp_path).resume(state)


def test_next_stage_goes_on_where_the_last_stopped(corpus: Path) -> None:
    first = stream(corpus)
    begun = first.blocks_read(60)
    seen: dict[str, set[int]] = {name: set() for name in DOCUMENTS}
    batch = first.read(list(range(60)))
    for row, source in enumerate(batch.source.tolist()):
        seen[first.source_names[source]] |= {document for document, _ in pieces(batch, row)}
    second = stream(corpus, length=64, stage="extend", start_blocks=begun)
    blocks = {name: -(-count // 12) for name, count in DOCUMENTS.items()}
    for source, name in enumerate(second.source_names):
        left = (blocks[name] - begun[name] % blocks[name]) % blocks[name]
        assert begun[name] > 0
        order = second._orders[source]
        new = set()
        for count in range(200):
            epoch, block = (int(column[0]) for column in order.locate(np.array([count]))[:2])
            if epoch == begun[name] // blocks[name] == 0 and left:
                new |= set(range(block * 12, min(block * 12 + 12, DOCUMENTS[name])))
        assert not new & seen[name]
    assert any(begun[name] < blocks[name] for name in DOCUMENTS)
    assert second.epochs(1)["one"] > second.epochs(0)["one"] > 0
    assert second.blocks_read(0) == begun


def test_damage_is_named(tmp_path: Path) -> None:
    manifest = token_corpus(tmp_path, {"one": 30})
    path = tmp_path / MANIFEST_FILE

    def refused(pattern: str, **settings: object) -> None:
        with pytest.raises(DataError, match=pattern):
            stream(tmp_path, weights=None, **settings).read(list(range(40)))

    path.write_bytes(manifest_json(manifest).replace(b'"tokens"', b'"tokenz"', 1))
    refused("content has digest")
    path.write_bytes(manifest_json(replace(manifest, vocab_size=640)))
    refused("content has digest")
    _save(path, replace(manifest, sources=manifest.sources * 2))
    refused("given twice")
    _save(path, replace(manifest, vocab_size=VOCABULARY // 2))
    refused(r"token \d+ at index \d+, but the vocabulary has 256", verify=False)
    _save(path, manifest)
    stream(tmp_path, weights=None)

    block = tmp_path / manifest.sources[0].blocks[1].file
    content = block.read_bytes()
    block.write_bytes(content[:40] + b"\x05" + content[41:])
    refused(f"{block}: sha256 is")
    block.write_bytes(content[:-4])
    refused("bytes, the manifest has", verify=False)
    block.unlink()
    refused("missing")


def test_wrong_settings_are_named(corpus: Path) -> None:
    with pytest.raises(UsageError, match="unknown sources four; found one, two, three"):
        stream(corpus, weights={"four": "1"})
    with pytest.raises(UsageError, match="weight of one: found 'many'"):
        stream(corpus, weights={"one": "many"})
    with pytest.raises(UsageError, match=r"weights: one=1/2, two=1/3 are shares that sum to 5/6, need 1"):
        stream(corpus, weights={"one": "1/2", "two": "1/3"})
    with pytest.raises(UsageError, match="at least 2"):
        stream(corpus, length=1)
    with pytest.raises(UsageError, match="found 16777217, need at least 2 and at most 16777216"):
        stream(corpus, length=2**24 + 1)
    for weight in ("1e400", "1e999999999", "-1", "0", "0.0", "1/0", "nan"):
        with pytest.raises(UsageError, match=f"weight of one: found '{weight}', need a rational above 0"):
            stream(corpus, weights={"one": weight, "two": "2"})
    for weight in ("1/9999999999999999999", "98765432109876543211"):
        with pytest.raises(UsageError, match=r"repeat only after more than 10\^18 samples"):
            stream(corpus, weights={"one": weight, "two": "1"})
    for sample in (-1, 2**63, 10**30):
        with pytest.raises(UsageError, match=f"sample: found {sample}, allowed 0 to"):
            stream(corpus).place(sample)
    with pytest.raises(UsageError, match=r"comes after some \d+ epochs; allowed 10000"):
        stream(corpus, fim_rate=0.5).place(2**62)
    with pytest.raises(DataError, match="cannot read the manifest"):
        stream(corpus / "nowhere")


def test_a_corpus_built_anew_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    for name in ("corpus", "anew"):
        token_corpus(tmp_path / name, {"one": 40, "two": 40, "three": 40})
    begun = stream(tmp_path / "corpus")
    (tmp_path / "corpus").rename(tmp_path / "old")
    (tmp_path / "anew").rename(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"blocks/.*: another corpus has taken the place of the one that was opened"):
        begun.read(list(range(40)))
    stream(tmp_path / "corpus").read(list(range(40)))


def _save(path: Path, manifest: Manifest) -> None:
    path.write_bytes(manifest_json(with_digest(manifest)))
