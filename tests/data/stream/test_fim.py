"""Fill-in-the-middle: its form, its inverse, its share, and what it does to the documents of a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError, UsageError
from data.stream.fim import ADDED, apply_fim, check_fim, draw_fim, undo_fim, write_fim
from data.stream.stream import open_stream
from tests.data.stream.test_stream import pieces, stored_documents
from tests.data.synthetic import token_corpus

IDS = (3, 4, 5)
DOCUMENTS = {"one": 300, "two": 150}


def document(content: list[int]) -> np.ndarray:
    return np.array([0, *content, 1], dtype=np.uint32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(6, 99), max_size=30), st.data())
def test_form_and_inverse(content: list[int], data: st.DataObject) -> None:
    second = data.draw(st.integers(0, len(content)))
    first = data.draw(st.integers(0, second))
    stored = document(content)
    rearranged = apply_fim(stored, first, second, IDS)
    prefix, middle, suffix = content[:first], content[first:second], content[second:]
    assert rearranged.tolist() == [0, 3, *prefix, 4, *suffix, 5, *middle, 1]
    assert undo_fim(rearranged, IDS).tolist() == stored.tolist() == undo_fim(stored, IDS).tolist()
    start = data.draw(st.integers(0, len(rearranged)))
    stop = data.draw(st.integers(start, len(rearranged)))
    out = np.full(stop - start, 77, dtype=np.int64)
    write_fim(out, np.concatenate([stored, [9, 9, 9]]), len(stored), (first, second), start, IDS)
    assert out.tolist() == rearranged[start:stop].tolist()


def test_share_and_cuts_are_even() -> None:
    length_D = np.full(40_000, 12, dtype=np.int64)
    for rate in (0.1, 0.5, 1.0):
        chosen_D, cut_D2 = draw_fim(length_D, np.arange(40_000), 7, rate, 4096)
        error = 4 * math.sqrt(rate * (1 - rate) / len(length_D))
        assert abs(chosen_D.mean() - rate) <= error
        # Two draws from the 11 places: the pairs (a, b), sorted, with the weights of unordered draws.
        for a in range(11):
            share = np.mean((cut_D2 == a).sum(axis=1)) / 2
            assert abs(share - 1 / 11) < 5 * math.sqrt(1 / 11 / 80_000)
        assert (cut_D2[:, 0] <= cut_D2[:, 1]).all()
    again, _ = draw_fim(length_D, np.arange(40_000), 8, 0.5, 4096)
    before, _ = draw_fim(length_D, np.arange(40_000), 7, 0.5, 4096)
    assert 0.45 < (again == before).mean() < 0.55


def test_no_document_is_cut_for_it() -> None:
    length_D = np.arange(1, 200)
    chosen_D, _ = draw_fim(length_D, np.arange(len(length_D)), 1, 1.0, 100)
    assert set(length_D[~chosen_D].tolist()) == {1, 98, 99, 100}


def test_whole_epochs_with_it_undone(tmp_path: Path) -> None:
    token_corpus(tmp_path, DOCUMENTS)
    rate = 0.3
    opened = open_stream(tmp_path, 128, mtp_depth=0, seed=5, stage="a", fim_rate=rate)
    chosen: list[dict[int, bool]] = []
    for source, name in enumerate(opened.source_names):
        expected = stored_documents(tmp_path, name)
        found: dict[int, list[list[int]]] = {}
        order = opened._orders[source]
        size = int(order._epoch(0)[1][-1]), int(order._epoch(1)[1][-1])
        source_N, count_N = opened.mixture.locate(np.arange(opened.mixture.period * sum(size)))
        for first, last in ((0, size[0]), (size[0], sum(size))):
            wanted = np.flatnonzero((source_N == source) & (count_N >= first) & (count_N < last)).tolist()
            batch = opened.read(wanted)
            found = {}
            for row in range(len(wanted)):
                for number, tokens in pieces(batch, row):
                    found.setdefault(number, []).append(tokens)
            assert sorted(found) == list(range(len(expected)))
            rearranged = {}
            for number, stored in enumerate(expected):
                parts = found[number]
                whole = sum(map(len, parts))
                assert any(undo_fim(np.array(form), IDS).tolist() == stored for form in orders(parts))
                rearranged[number] = whole == len(stored) + ADDED
                assert whole in (len(stored), len(stored) + ADDED)
                assert len(parts) == (-(-whole // 128) if len(stored) > 128 else 1)
            chosen.append(rearranged)
            eligible = [n for n, stored in enumerate(expected) if len(stored) <= 125 or len(stored) > 128]
            share = sum(rearranged[number] for number in eligible) / len(eligible)
            assert abs(share - rate) <= 4 * math.sqrt(rate * (1 - rate) / len(eligible))
    assert chosen[0] != chosen[1]


def orders(parts: list[list[int]]) -> Iterator[list[int]]:
    """What a document's pieces may give together: BOS stands first, EOS last."""
    for order in permutations(parts):
        if order[0][0] == 0 and order[-1][-1] == 1:
            yield [token for part in order for token in part]


def test_refusals(tmp_path: Path) -> None:
    check_fim(0.0, (), "x")
    with pytest.raises(DataError, match="its tokenizer has no begin, hole and end"):
        check_fim(0.1, (), "x")
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match="FIM rate: found"):
            check_fim(rate, IDS, "x")
