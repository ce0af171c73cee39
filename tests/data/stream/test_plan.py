"""Plan files: what they hold, that any number of workers writes the same, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data.contract import Source
from data.errors import DataError
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.stream.documents import PlanKey
from data.stream.plan import build_plans, load_plan, plan_files, plan_name
from data.stream.stream import open_stream
from tests.data.synthetic import token_corpus

DOCUMENTS = {"one": 210, "two": 41}
BLOCKS = {"one": 70, "two": 14}


def opened(directory: Path) -> tuple[BlockStore, Source]:
    store = BlockStore(directory, load_manifest(directory))
    return store, store.manifest.sources[0]


def written(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "plans").iterdir())}


def test_workers_write_the_same_files_and_they_are_those_counted_on_the_spot(tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        token_corpus(directory, DOCUMENTS, 3)
        store, source = opened(directory)
        keys = [PlanKey("one", 64, 8, 100, 0.2, 7, epoch) for epoch in range(2)] + [PlanKey("one", 32)]
        counted = [load_plan(store, source, key) for key in keys]
        assert not np.array_equal(*counted[:2])
        limits = {"one": (8, 100)}
        report = build_plans(directory, [64], [7], [0, 1], workers, fim_rates=[0.2], document_lengths=limits)
        build_plans(directory, [32], [7, 8], [0, 1], workers)
        assert report["files"] == 8
        assert report["blocks"] == sum(BLOCKS.values())
        found.append(written(directory))
        assert len(found[-1]) == 8 + 4
        assert report["bytes"] < sum(map(len, found[-1].values()))
        for key, count_B in zip(keys, counted, strict=True):
            assert np.array_equal(load_plan(store, source, key), count_B)
            stored = np.load(directory / f"{plan_name(key)}.npy")
            assert stored.dtype == np.uint32
            assert np.array_equal(stored, count_B)
    assert found[0] == found[1]


def test_the_stream_reads_the_same_with_and_without_plans(tmp_path: Path) -> None:
    token_corpus(tmp_path, DOCUMENTS, 3)
    settings = {"mtp_depth": 0, "seed": 7, "stage": "a", "fim_rate": 0.2}
    samples = list(range(0, 700, 13))
    before = open_stream(tmp_path, 64, **settings).read(samples)  # type: ignore[arg-type]
    build_plans(tmp_path, [64], [7], [0, 1, 2], fim_rates=[0.2])
    after = open_stream(tmp_path, 64, **settings).read(samples)  # type: ignore[arg-type]
    assert np.array_equal(before.tokens, after.tokens)


def test_wrong_plans_are_refused(tmp_path: Path) -> None:
    token_corpus(tmp_path, DOCUMENTS, 3)
    store, source = opened(tmp_path)
    key = PlanKey("one", 32)
    count_B = load_plan(store, source, key)
    header = tmp_path / f"{plan_name(key)}.json"

    def write(digest: str = store.manifest.digest, counts: np.ndarray = count_B, **changes: object) -> None:
        for name, content in plan_files(digest, key, counts).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        header.write_text(json.dumps({**json.loads(header.read_text()), **changes}))

    def refused(pattern: str) -> None:
        with pytest.raises(DataError, match=pattern) as caught:
            open_stream(tmp_path, 32, mtp_depth=0, seed=1, stage="a").read(list(range(400)))
        assert "\n" not in str(caught.value)
        assert "plans/one-32" in str(caught.value) or "packs into" in str(caught.value)

    write()
    open_stream(tmp_path, 32, mtp_depth=0, seed=1, stage="a").read(list(range(400)))
    write("f" * 64)
    refused("made for manifest ffff")
    write(counts=count_B + 1)
    refused(r"packs into \d+ sequences, the plan has")
    write(counts=count_B[:-1])
    refused("for 69 blocks")
    write(counts=count_B[:-1], blocks=70)
    refused(r"holds uint32 \(69,\), needs uint32 \(70,\)")
    write(version=9)
    refused("not a plan of version")
    write(length=64)
    refused("needed")
    write(sha256="0" * 64)
    refused("sha256 is")
    for content in (b"", b"PK\x03\x04"):
        write(sha256=hashlib.sha256(content).hexdigest())
        header.with_suffix(".npy").write_bytes(content)
        refused("damaged plan")
    for content in ("{}", "[1]", "{", '{"version": 1}'):
        header.write_text(content)
        refused("plan")
    write()
    header.with_suffix(".npy").unlink()
    refused("missing")


def test_seed_and_epoch_matter_only_with_fim() -> None:
    assert PlanKey("one", 32, seed=3, epoch=4) == PlanKey("one", 32)
    assert PlanKey("one", 32, fim_rate=0.1, seed=3).at(2) != PlanKey("one", 32, fim_rate=0.1, seed=3)
