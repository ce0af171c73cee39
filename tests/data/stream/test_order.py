"""Blocks in the order of their epochs, against an order written out; stages that read some documents only."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UsageError
from data.hashing import key64, permutation
from data.stream.order import BlockOrder
from data.stream.skip import SkipList
from data.stream.stream import open_stream
from tests.data.stream.test_stream import pieces, stored_documents
from tests.data.synthetic import token_corpus


def written_out(counts: list[list[int]], seed: int, first_block: int) -> list[tuple[int, int, int]]:
    found = []
    for epoch, count_B in enumerate(counts):
        for place, block in enumerate(permutation(len(count_B), key64("blocks", seed, "s", epoch)).tolist()):
            if epoch * len(count_B) + place >= first_block:
                found += [(epoch, block, sequence) for sequence in range(count_B[block])]
    return found


@settings(max_examples=50, deadline=None)
@given(st.data(), st.booleans(), st.integers(1, 6), st.integers(0, 99))
def test_order_against_one_written_out(data: st.DataObject, steady: bool, blocks: int, seed: int) -> None:
    count = st.lists(st.integers(0, 4), min_size=blocks, max_size=blocks).filter(any)
    counts = [data.draw(count)] * 4 if steady else [data.draw(count) for _ in range(4)]
    first_block = data.draw(st.integers(0, 2 * blocks))
    expected = written_out(counts, seed, first_block)
    order = BlockOrder("s", blocks, lambda epoch: np.array(counts[epoch % 4]), steady, seed, first_block)
    samples = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=20))
    columns = order.locate(np.array(samples))
    assert list(zip(*(column.tolist() for column in columns))) == [expected[n] for n in samples]
    permuted = [permutation(blocks, key64("blocks", seed, "s", epoch)).tolist() for epoch in range(4)]
    for n in samples:
        epoch, block, _ = expected[n]
        place = permuted[epoch].index(block)
        assert order.blocks_begun(n + 1) == epoch * blocks + place + 1
        assert order.following(n, 3) == (epoch, permuted[epoch][place : place + 3])
        done = sum(1 for e, _, _ in written_out(counts, seed, 0)[: expected_start(expected, counts, n)] if e == epoch)
        assert order.passed(n) == pytest.approx(epoch + done / sum(counts[epoch]))
    assert order.blocks_begun(0) == first_block


def expected_start(expected: list[tuple[int, int, int]], counts: list[list[int]], n: int) -> int:
    """Where sample n stands when nothing is passed over at the start."""
    return sum(map(sum, counts)) - len(expected) + n


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6), st.integers(0, 70))
def test_skip_list_against_counting(spans: list[tuple[int, int]], served: int) -> None:
    skip = SkipList([(first, first + length) for first, length in spans])
    left = [k for k in range(400) if not any(first <= k < first + length for first, length in spans)]
    assert skip.raw(np.arange(80)).tolist() == left[:80]
    assert skip.raw_end(served) == (left[served - 1] + 1 if served else 0)
    for bad in ((3, 3), (-1, 2), (5, 2)):
        with pytest.raises(UsageError, match="skipped samples: found"):
            SkipList([bad])


def test_documents_by_length_and_nothing_twice_over_stages(tmp_path: Path) -> None:
    token_corpus(tmp_path, {"one": 240, "two": 60})
    limits = (20, 60)
    settings_ = {"mtp_depth": 0, "seed": 5}
    first = open_stream(tmp_path, 32, stage="a", **settings_)  # type: ignore[arg-type]
    begun = first.blocks_read(40)
    second = open_stream(
        tmp_path,
        64,
        stage="b",
        weights={"one": "1"},
        start_blocks=begun,
        document_lengths={"one": limits},
        **settings_,  # type: ignore[arg-type]
    )
    expected = stored_documents(tmp_path, "one")
    order = second._orders[0]
    left = int(order._end_E[0])
    batch = second.read(list(range(left)))
    seen = [number for row in range(left) for number, _ in pieces(batch, row)]
    fitting = {n for n, stored in enumerate(expected) if limits[0] <= len(stored) <= limits[1]}
    assert len(seen) == len(set(seen))
    blocks = permutation(20, key64("blocks", 5, "one", 0)).tolist()
    assert set(seen) == {n for n in fitting if blocks.index(n // 12) >= begun["one"]}
    earlier = first.read(list(range(40)))
    rows = np.flatnonzero(earlier.source == 0).tolist()
    assert not set(seen) & {number for row in rows for number, _ in pieces(earlier, row)}
    assert second.blocks_read(left + 1)["one"] > 20
    assert second.blocks_read(left)["two"] == begun["two"] > 0
    with pytest.raises(UsageError, match="source one: none of its documents is of the lengths asked for"):
        open_stream(tmp_path, 64, stage="b", document_lengths={"one": (9000, 9001)}, **settings_)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="need 0 <= shortest <= longest"):
        open_stream(tmp_path, 64, stage="b", document_lengths={"one": (9, 8)}, **settings_)  # type: ignore[arg-type]


def test_a_million_blocks_are_found_in_a_moment() -> None:
    count_B = np.full(900_000, 4000, dtype=np.uint32)
    tracemalloc.start()
    began = time.process_time()
    order = BlockOrder("s", len(count_B), lambda epoch: count_B, False, 1, 450_000)
    epoch_N, _, sequence_N = order.locate(np.array([10**9, 7 * 10**9]))
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch_N.tolist() == [0, 2]
    assert sequence_N.tolist() == [0, 0]
    assert seconds < 1
    assert peak < 150e6
