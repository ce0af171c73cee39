"""Who reads, and after how many interruptions, never shows in what is read; and the order is pinned for good."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.contract import MicroBatch, StreamState
from data.errors import DataError
from data.stream.stream import Stream, open_stream
from tests.data.synthetic import token_corpus

WORLDS = (1, 2, 3, 4, 8)
BATCH = 24
STEPS = 7
GOLDEN = Path(__file__).with_name("golden.txt")
GOLDEN_BATCH = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    token_corpus(directory, {"one": 70, "two": 41, "three": 25})
    return directory


def stream(corpus: Path, **changes: object) -> Stream:
    weights = {"one": "2", "two": "1/2", "three": "1"}
    kept = {"mtp_depth": 1, "seed": 5, "stage": "pretrain", "weights": weights, "fim_rate": 0.3, "verify": False}
    return open_stream(corpus, 32, **{**kept, **changes})  # type: ignore[arg-type]


def global_batch(opened: Stream, step: int, world: int) -> MicroBatch:
    """A step's batch from `world` ranks, each with its slice; the ranks read in reverse order."""
    share = BATCH // world
    parts = []
    for rank in reversed(range(world)):
        first = step * BATCH + rank * share
        parts.insert(0, opened.read(list(range(first, first + share))))
    joined = {
        field: np.concatenate([getattr(part, field) for part in parts], axis=1 if "mtp" in field else 0)
        for field in asdict(parts[0])
    }
    return MicroBatch(**joined)


def digest(batch: MicroBatch) -> str:
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in asdict(batch).values())
    return hashlib.sha256(content).hexdigest()[:16]


def test_world_sizes_give_the_same_global_batches(corpus: Path) -> None:
    found = {world: [digest(global_batch(stream(corpus), step, world)) for step in range(4)] for world in WORLDS}
    assert len(set(found[1])) == 4
    assert all(digests == found[1] for digests in found.values())


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_killed_anywhere_and_resumed_twice_elsewhere(corpus: Path, data: st.DataObject) -> None:
    whole = stream(corpus)
    expected = [digest(global_batch(whole, step, 1)) for step in range(STEPS)]
    stops = sorted(data.draw(st.lists(st.integers(0, STEPS - 1), min_size=2, max_size=2, unique=True)))
    worlds = data.draw(st.lists(st.sampled_from(WORLDS), min_size=3, max_size=3, unique=True))
    found: list[str] = []
    saved = json.dumps(asdict(whole.state(0)))
    for world, stop in zip(worlds, [*stops, STEPS], strict=True):
        # A new process knows the state alone.
        opened = stream(corpus)
        first = opened.resume(StreamState.from_json(json.loads(saved))) // BATCH
        assert first == len(found)
        found += [digest(global_batch(opened, step, world)) for step in range(first, stop)]
        saved = json.dumps(asdict(opened.state(stop * BATCH)))
    assert found == expected


def golden(corpus: Path) -> list[str]:
    """A line for each of the first 1,000 batches: without fill-in-the-middle and with it."""
    plain, rearranged = stream(corpus, fim_rate=0.0), stream(corpus)
    lines = []
    for step in range(1000):
        samples = list(range(step * GOLDEN_BATCH, (step + 1) * GOLDEN_BATCH))
        lines.append(f"{digest(plain.read(samples))} {digest(rearranged.read(samples))}")
    return lines


def test_the_first_thousand_batches_are_pinned(corpus: Path) -> None:
    found, expected = golden(corpus), GOLDEN.read_text().splitlines()
    first = next((step for step in range(1000) if found[step] != expected[step]), None)
    assert first is None, f"batch {first} of {len(expected)} differs"
    assert len(expected) == 1000


def test_skipped_samples_are_never_served(corpus: Path) -> None:
    plain, skipping = stream(corpus), stream(corpus, skip=[(40, 50), (7, 9), (45, 61), (300, 301)])
    served = [k for k in range(330) if not (7 <= k < 9 or 40 <= k < 61 or k == 300)]
    assert np.array_equal(skipping.read(list(range(len(served)))).tokens, plain.read(served).tokens)
    assert skipping.blocks_read(len(served)) == plain.blocks_read(served[-1] + 1)
    assert skipping.epochs(len(served)) == plain.epochs(served[-1] + 1)
    assert skipping.state(20).per_source == plain.state(22).per_source


def test_a_range_may_be_added_ahead_but_not_behind(corpus: Path) -> None:
    for before in ([], [(3, 8)]):
        state = stream(corpus, skip=before).state(96)
        end = 96 + (5 if before else 0)
        assert stream(corpus, skip=[*before, (end, end + 24)]).resume(state) == 96
        for behind in ((end - 1, end + 3), (0, 1), (20, 30)):
            with pytest.raises(DataError, match="another stream"):
                stream(corpus, skip=[*before, behind]).resume(state)


def test_other_ranges_of_the_same_size_are_refused(corpus: Path) -> None:
    state = stream(corpus, skip=[(3, 8)]).state(96)
    with pytest.raises(DataError, match="another stream"):
        stream(corpus, skip=[(10, 15)]).resume(state)


def test_state_is_small_and_versioned(tmp_path: Path) -> None:
    names = {f"{'n' * 90}{number:02d}": 3 for number in range(40)}
    token_corpus(tmp_path, names)
    opened = open_stream(tmp_path, 32, mtp_depth=0, seed=1, stage="s" * 60, fim_rate=0.1)
    state = opened.state(10**12)
    text = json.dumps(asdict(state))
    assert len(text) < 2048
    assert opened.resume(StreamState.from_json(json.loads(text))) == 10**12
    old = {**json.loads(text), "version": 1}
    with pytest.raises(DataError, match="stream state has version 1, this program reads"):
        StreamState.from_json(old)
    with pytest.raises(DataError, match="damaged stream state"):
        StreamState.from_json({"version": state.version, "seed": 1})
    for key, value in (("sample", "x"), ("sample", -1), ("per_source", [1, "2"]), ("per_source", 3), ("seed", None)):
        with pytest.raises(DataError, match="damaged stream state: sample, per_source and seed must be whole numbers"):
            StreamState.from_json({**json.loads(text), key: value})
    with pytest.raises(DataError, match="damaged stream state: stage must be text"):
        StreamState.from_json({**json.loads(text), "stage": 5})


def test_other_settings_are_refused(corpus: Path) -> None:
    state = stream(corpus).state(48)
    for change in ({"fim_rate": 0.2}, {"document_lengths": {"one": (10, 500)}}, {"start_blocks": {"two": 1}}):
        with pytest.raises(DataError, match="another stream") as caught:
            stream(corpus, **change).resume(state)
        assert "\n" not in str(caught.value)


if __name__ == "__main__":  # prints what golden.txt is to hold
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        token_corpus(Path(made), {"one": 70, "two": 41, "three": 25})
        print(*golden(Path(made)), sep="\n")
