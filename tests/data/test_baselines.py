"""Simple models against dictionaries and loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from data.baselines import _character_bits, bigram_probabilities, unigram_bits

SIZE = 12


def documents(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[0, *rng.integers(6, SIZE - (seed == 1), size=rng.integers(1, 9)).tolist(), 1] for _ in range(count)]


def test_unigram_and_bigram_by_hand() -> None:
    train, text = documents(1, 9), documents(2, 5)
    train_N, text_N = (np.array([t for d in part for t in d]) for part in (train, text))
    single = Counter(t for d in train for t in d if t > 1)
    total = sum(single.values()) + 0.5 * SIZE
    bits_V = unigram_bits(train_N, SIZE)
    for token in range(SIZE):
        assert bits_V[token] == pytest.approx(-math.log2((single[token] + 0.5) / total))
    assert (2.0**-bits_V).sum() == pytest.approx(1)

    pairs = Counter(zip(train_N.tolist(), train_N[1:].tolist()))
    found = bigram_probabilities(train_N, text_N, 2.0**-bits_V)
    for i, (before, token) in enumerate(zip(text_N.tolist(), text_N[1:].tolist())):
        seen = sum(n for (a, _), n in pairs.items() if a == before)
        types = sum(a == before for a, _ in pairs)
        expected = 2.0 ** -bits_V[token]
        if seen:
            expected = (pairs[before, token] + types * expected) / (seen + types)
        assert found[i] == pytest.approx(expected)


def test_bigram_is_a_distribution() -> None:
    train_N = np.array([t for d in documents(1, 9) for t in d])
    unigram_V = 2.0 ** -unigram_bits(train_N, SIZE)
    for before in range(SIZE):
        text_N = np.array([x for token in range(SIZE) for x in (before, token)])
        assert bigram_probabilities(train_N, text_N, unigram_V)[::2].sum() == pytest.approx(1)


def test_character_bigram_pays_for_unseen_characters() -> None:
    train = ["abab", "abba"]
    assert _character_bits(train, ["abab"]) < _character_bits(train, ["aabb"]) < _character_bits(train, ["ab龍b"])
    assert _character_bits(train, ["ab龍b"]) > 20
