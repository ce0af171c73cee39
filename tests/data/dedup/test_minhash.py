"""The array path of signatures against its definition, over all of Unicode."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.dedup import minhash
from data.dedup.fold import TOKEN, classified, folded, tokens
from data.dedup.minhash import (
    MinHash,
    band_keys,
    shingle_sets,
    shingles,
    signature_reference,
    signatures,
    token_hash,
    token_hashes,
)

PARAMETERS = MinHash(shingle=3, bands=2, rows=3)
# Where folding is hard: marks that reorder or compose, Jamo, sigmas, ligatures, characters that fold to several.
HARD = st.sampled_from(
    "aé\u0301\u0323\u0344ΣσςAİıß ŀŉﬁ½²①…。，ｶﾞがか\u3099ᄒ하\u1161\u11abｱﷺΐ𝚺𝔸Ω\u0345中文、_\n-½\U0001d15e㍿"
)
TEXT = st.text(st.one_of(HARD, st.characters(exclude_categories=["Cs"])), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6))
@example(["ΑΣ", "Σ", "ΑΣ Β", "e\u0301", "\u0301", ""])
@example(["", "", "a"])
@example(["\u1112\u1161\u11ab \ud558\u11ab", "か\u3099 ｶﾞ", "q\u0323\u0307", "\u0f71\u0f72"])
def test_token_hashes_are_those_of_the_definition(texts: list[str]) -> None:
    hash_N, count_D, order_D = token_hashes(texts)
    parts = dict(zip(order_D.tolist(), np.split(hash_N, np.cumsum(count_D)[:-1])))
    for row, text in enumerate(texts):
        expected = [token_hash(token) for token in tokens(text)]
        assert parts[row].tolist() == expected


def test_every_character_alone_and_between_others_folds_as_python_folds_it() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for before, after in (("", ""), ("a", "b"), ("か", "\u0301"), ("\u1112", "\u11ab"), ("Σ", " ")):
        texts = [before + character + after for character in characters]
        code_N, class_N, length_D, order_D = classified(texts)
        edge_D = np.cumsum(length_D)
        # Only what matters is compared: tokens, so that a character may become any other separator.
        for row in np.flatnonzero(np.array([folded(text) != text for text in texts])[order_D])[::17].tolist():
            part = slice(edge_D[row] - length_D[row], edge_D[row] - 1)
            kept = "".join(chr(c) if k else " " for c, k in zip(code_N[part].tolist(), class_N[part].tolist()))
            assert TOKEN.findall(kept) == tokens(texts[order_D[row]])


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_signatures_are_their_definition(texts: list[str]) -> None:
    assert signatures(texts, PARAMETERS).tolist() == [signature_reference(text, PARAMETERS) for text in texts]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shingle_sets_are_the_sets_of_each_text(size: int) -> None:
    texts = ["", "one", "one two", "… —", "中文字", "a b c d e f", "a b c d e f a b c d e f", "x"]
    for text, found in zip(texts, shingle_sets(texts, size), strict=True):
        assert found.tolist() == shingles(text, size).tolist()
        words = tokens(text)
        assert len(found) == len(
            {tuple(words[i : i + size]) for i in range(max(min(1, len(words)), len(words) - size + 1))}
        )


def test_batches_and_passes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"w{i * j % 97}" for i in range(3 * j)) for j in range(40)] + ["", "中", "ﬁ" * 9]
    whole = signatures(texts, MinHash())
    monkeypatch.setattr(minhash, "_BATCH_CHARACTERS", 200)
    monkeypatch.setattr(minhash, "_PASS_SHINGLES", 7)
    assert (signatures(texts, MinHash()) == whole).all()
    assert signatures([], MinHash()).shape == (0, 112)


def test_values_stay_what_they_were() -> None:
    signature_DP = signatures(
        ["The quick brown fox jumps over the lazy dog.", "天地玄黃，宇宙洪荒。日月盈昃"], MinHash()
    )
    assert [hex(key) for key in band_keys(signature_DP, MinHash())[:, 0].tolist()] == GOLDEN


def test_unicode_is_pythons() -> None:
    assert folded("ＡΣ") == unicodedata.normalize("NFKC", "ＡΣ").lower() == "aς"


# Of `signature_reference`: values that change make every signature index worthless.
GOLDEN = ["0xafb10f3b66964c72", "0x7e9bc95de4fe9439"]
