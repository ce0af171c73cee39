"""The mixture table: exact shares, within one sample at every step, O(1) lookups that agree with counting."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UsageError
from data.stream.mixture import Mixture, table_reference

TRICKY = [1, 100, 20, 100, 5, 1]


def mixture(weights: list[int]) -> Mixture:
    return Mixture({f"s{i}": Fraction(weight) for i, weight in enumerate(weights)})


def deviations(source_K: np.ndarray, share_S: np.ndarray) -> np.ndarray:
    """Largest |n_i(k) - w_i k / W| over a period, times W, in integers."""
    period, step_K = int(share_S.sum()), np.arange(1, len(source_K) + 1)
    gaps = (np.cumsum(source_K == source) * period - share * step_K for source, share in enumerate(share_S.tolist()))
    return np.array([np.abs(gap_K).max() for gap_K in gaps])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=40))
def test_within_one_sample_at_every_step(weights: list[int]) -> None:
    found = mixture(weights)
    assert (deviations(found.source_K, found.share) < found.period).all()
    assert np.bincount(found.source_K).tolist() == found.share.tolist()


def test_tricky_weights_and_the_rule_that_fails_them() -> None:
    found = mixture(TRICKY)
    assert (deviations(found.source_K, found.share) < found.period).all()
    share = np.array(TRICKY)
    taken, sources = np.zeros(len(TRICKY)), []
    for k in range(1, share.sum() + 1):
        sources.append(int(np.argmax(share * k / share.sum() - taken)))
        taken[sources[-1]] += 1
    assert (deviations(np.array(sources), share) >= share.sum()).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12))
def test_table_against_its_definition(weights: list[int]) -> None:
    found = mixture(weights)
    assert found.source_K.tolist() == table_reference(found.share).tolist()


def test_the_longest_table_is_made_in_a_moment() -> None:
    began = time.process_time()
    found = mixture([*range(1, 40), 100_000 - 780])
    assert found.period == 100_000
    assert (deviations(found.source_K, found.share) < found.period).all()
    assert time.process_time() - began < 3


def test_locate_agrees_with_counting() -> None:
    found = Mixture({"a": Fraction("0.25"), "b": Fraction(1, 3), "c": Fraction(2)})
    assert found.share.tolist() == [3, 4, 24]
    samples = 5 * found.period + 7
    source_N, count_N = found.locate(np.arange(samples))
    taken = np.zeros(3, dtype=np.int64)
    for k in range(samples):
        assert found.taken(k).tolist() == taken.tolist()
        assert count_N[k] == taken[source_N[k]]
        taken[source_N[k]] += 1
    far_source, far_count = found.locate(np.array([10**15 * found.period + 3]))
    assert far_source[0] == source_N[3]
    assert far_count[0] == 10**15 * found.share[source_N[3]] + count_N[3]


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UsageError, match="more than 0"):
        Mixture({"a": Fraction(0)})
    with pytest.raises(UsageError, match="repeat only after"):
        Mixture({"a": Fraction(1, 999_983), "b": Fraction(1)})
