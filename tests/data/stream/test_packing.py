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
    length_N = np.array(lengths, dtype=np.int64)
    bin_N = best_fit_decreasing(length_N, 50)
    levels = np.bincount(bin_N, weights=length_N)
    assert sorted(levels) == sorted(best_fit_reference(lengths, 50))
    assert packed_count(length_N, 50) == len(levels)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(2, 150), st.integers(0, 2**64 - 1))
def test_packed_block_holds_every_token_once(lengths: list[int], capacity: int, key: int) -> None:
    offset_D = np.cumsum([0, *lengths])
    packed = pack(np.array(lengths), capacity, key)
    assert packed.sequences == packed_count(np.array(lengths), capacity)
    assert (packed.labels(0) <= capacity).all()
    seen = np.zeros(offset_D[-1], dtype=int)
    cut = set()
    for document, start, length in zip(packed.document_P, packed.start_P, packed.length_P, strict=True):
        first = offset_D[document] + start
        seen[first : first + length] += 1
        assert start + length <= lengths[document]
        if length < lengths[document]:
            cut.add(int(document))
    assert (seen == 1).all()
    assert all(lengths[document] > capacity for document in cut)


def test_key_changes_the_order_and_nothing_else() -> None:
    length_D = np.random.default_rng(1).integers(1, 90, size=200)
    one, other = pack(length_D, 64, 1), pack(length_D, 64, 2)
    assert one.sequences == other.sequences
    assert one.document_P.tolist() != other.document_P.tolist()
    assert one.document_P.tolist() == pack(length_D, 64, 1).document_P.tolist()


def test_padding_is_small_on_long_tailed_lengths() -> None:
    length_D = np.random.default_rng(2).lognormal(6.5, 1.0, size=20_000).astype(np.int64) + 2
    sequences = packed_count(length_D, 4096)
    assert 1 - length_D.sum() / (sequences * 4096) < 0.002


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 3000))
def test_blocks_are_whole_documents_in_order(lengths: list[int], block_tokens: int) -> None:
    ranges = split_into_blocks(lengths, block_tokens)
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    sizes = [sum(lengths[first:last]) for first, last in ranges]
    assert all(size <= 1.5 * block_tokens + 2 * max(lengths) for size in sizes)
