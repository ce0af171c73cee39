"""Words of both scripts, and repeats against their definitions."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean.statistics import (
    Statistics,
    duplicate_characters_reference,
    repeated,
    top_characters_reference,
)

TEXTS = st.lists(st.sampled_from(["a", "bc", "d", "汉", "字", "，", " ", "\n", "...", "a b "]), max_size=60).map(
    "".join
)


def test_words() -> None:
    text = "Don't stop: state-of-the-art U.S. naïve x\u0301s, 3.5% 汉字ABC，日本のカナ（x）—"
    expected = ["Don't", "stop", ":", "state-of-the-art", "U", ".", "S", ".", "naïve", "x\u0301s", ",", "3", ".", "5"]
    assert Statistics(text).words == [*expected, *"%汉字", "ABC", *"，日本のカナ（x）—"]
    assert Statistics("a-b, c! 汉。9").lexical == ["a-b", "c", "汉", "9"]
    assert Statistics("a1 22 汉 ! é").alphabetic_words == 3


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_repeats_are_those_of_the_definitions(text: str) -> None:
    document = Statistics(text)
    sizes = (2, 3, 4, 5, 7, 10)
    repeats = document.ngram_repeats(sizes)
    for size in sizes:
        spaces = document._spaces
        assert document.top_characters(size, repeats[size]) == top_characters_reference(document.words, size, spaces)
        assert document.duplicate_characters(size, repeats[size]) == duplicate_characters_reference(
            document.words, size
        )
    lines = text.split("\n")
    again = [line for i, line in enumerate(lines) if line in lines[:i]]
    assert repeated(lines) == (len(lines), len(again), sum(map(len, again)))


def test_by_hand() -> None:
    words = "a b a b a b c d".split()
    assert top_characters_reference(words, 2, 1) == 3 * 3
    assert top_characters_reference(words, 2, 0) == 3 * 2
    # a b | b a | a b again: jump over it | a b again: jump | c d
    assert duplicate_characters_reference(words, 2) == 4
    assert Statistics("one\n\ntwo\n\none\n\nthree").repeated_paragraphs == (4, 1, 3)
    assert Statistics("one\n\n\ntwo\none").repeated_lines == (3, 1, 3)
