"""Best-fit-decreasing against its quadratic definition, and packed blocks against the documents they were made of."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.store.blocks import split_into_blocks
from data.stream.packing import best_fit_decreasing, best_fit_reference, pack, packed_count


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_best_fit_against_its_definition(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    levels = [sum(lengths[item] for item in members) for members in bins]
    assert sorted(levels) == sorted(best_fit_reference(lengths, 50))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(2, 150), st.integers(0, 2**64 - 1))
def test_packed_block_holds_every_token_once(lengths: list[int], capacity: int, key: int) -> None:
    offset_D = np.cumsum([0, *lengths])
    packed = pack(offset_D, capacity, key)
    assert packed.sequences == packed_count(offset_D, capacity)
    assert (packed.labels(0) <= capacity).all()
    seen = np.zeros(offset_D[-1], dtype=int)
    cut = set()
    for document, start, length in zip(packed.document_P, packed.start_P, packed.length_P, strict=True):
        seen[start : start + length] += 1
        assert offset_D[document] <= start and start + length <= offset_D[document + 1]
        if length < lengths[document]:
            cut.add(int(document))
    assert (seen == 1).all()
    assert all(lengths[document] > capacity for document in cut)


def test_key_changes_the_order_and_nothing_else() -> None:
    offset_D = np.cumsum([0, *np.random.default_rng(1).integers(1, 90, size=200)])
    one, other = pack(offset_D, 64, 1), pack(offset_D, 64, 2)
    assert one.sequences == other.sequences
    assert one.start_P.tolist() != other.start_P.tolist()
    again = pack(offset_D, 64, 1)
    assert one.start_P.tolist() == again.start_P.tolist()


def test_padding_is_small_on_long_tailed_lengths() -> None:
    length_D = np.random.default_rng(2).lognormal(6.5, 1.0, size=20_000).astype(np.int64) + 2
    sequences = packed_count(np.cumsum([0, *length_D]), 4096)
    assert 1 - length_D.sum() / (sequences * 4096) < 0.002


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 3000))
def test_blocks_are_whole_documents_in_order(lengths: list[int], block_tokens: int) -> None:
    ranges = split_into_blocks(lengths, block_tokens)
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    sizes = [sum(lengths[first:last]) for first, last in ranges]
    assert all(size <= 1.5 * block_tokens + 2 * max(lengths) for size in sizes)
