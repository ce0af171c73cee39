"""Documents that share ten tokens with a benchmark, against a search through all of them."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean.decontaminate import Match, benchmark_index, contaminated, matches, ngram_index
from data.dedup.fold import tokens
from data.documents import DOCUMENTS
from data.errors import DataError

WORDS = st.lists(st.sampled_from(["a", "b", "汉", "字，", "C。", "d-e"]), max_size=14).map(" ".join)


def table(texts: list[str]) -> pa.Table:
    rows = [{"source": "s", "id": str(i), "language": "en", "text": text} for i, text in enumerate(texts)]
    return pa.Table.from_pylist(rows, DOCUMENTS)


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = tokens(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_against_every_pair(texts: list[str], benchmarks: list[str], n: int) -> None:
    documents = table(texts)
    wanted = [
        Match("s", str(d), f"b{b}", len(grams(text, n) & grams(benchmark, n)))
        for d, text in enumerate(texts)
        for b, benchmark in enumerate(benchmarks)
        if grams(text, n) & grams(benchmark, n)
    ]
    marked = contaminated(documents, ngram_index(benchmarks, n), n)
    assert marked.dtype == bool and len(marked) == len(texts)
    assert set(np.flatnonzero(marked).tolist()) == {int(match.id) for match in wanted}
    names = {f"b{i}": text for i, text in enumerate(benchmarks)}
    if any(grams(text, n) for text in benchmarks):
        index = benchmark_index(names, n)
        assert matches(documents, index) == wanted
        assert np.array_equal(index.ngram_G, ngram_index(benchmarks, n))
        assert index.short == tuple(name for name, text in names.items() if not grams(text, n))
    else:
        with pytest.raises(DataError, match=f"none of {len(benchmarks)} has {n} tokens"):
            benchmark_index(names, n)


def test_width_case_spacing_and_punctuation_hide_nothing() -> None:
    question = "Natalia sold clips to 48 of her friends in April, and then she sold half as many."
    chinese = "小明有十二个苹果，他给了小红五个苹果，还剩几个？"
    index = ngram_index([question, chinese])
    hidden = "x " + question.upper().replace(",", " --").replace(" ", "\n") + " y"
    spaced = "答案：" + " ".join(chinese).replace("，", " ")
    near = "Natalia sold clips to 48 of her friends in May, and then she bought half as many."
    assert contaminated(table([hidden, spaced, near, "", "unrelated"]), index).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert contaminated(table([hidden]), index, 13).tolist() == [False]
    nine = " ".join(question.split()[:9])
    assert contaminated(table([nine]), index).tolist() == [False]


def test_a_planted_tenth_is_found_among_many() -> None:
    rng = random.Random(5)
    words = [f"w{i}" for i in range(2000)]
    benchmark = {f"q{i}": " ".join(rng.choices(words, k=30)) for i in range(50)}
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(600)]
    planted = {}
    for row in range(0, 600, 10):
        name = rng.choice(list(benchmark))
        first = rng.randrange(21)
        texts[row] += " " + " ".join(benchmark[name].split()[first : first + 10])
        planted[str(row)] = name
    found = matches(table(texts), benchmark_index(benchmark))
    assert {match.id: match.benchmark for match in found} == planted
    assert {match.ngrams for match in found} == {1}
