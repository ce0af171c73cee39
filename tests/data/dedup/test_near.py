"""Near-dedup against brute force: Jaccard of plain Python sets, in both languages."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from data.dedup.fold import tokens
from data.dedup.memory import exact_duplicates, near_duplicates
from data.dedup.minhash import MinHash, jaccard, shingles, signature_reference, signatures
from data.documents import Document
from tests.data.synthetic import planted

THRESHOLD = 0.7


def brute_tokens(text: str) -> list[str]:
    found: list[str] = []
    word = ""
    for character in unicodedata.normalize("NFKC", text).lower() + " ":
        if "CJK" in unicodedata.name(character, "") and character.isalpha():
            found += [word, character]
            word = ""
        elif character.isalnum():
            word += character
        else:
            found.append(word)
            word = ""
    return [token for token in found if token]


def brute_jaccard(left: str, right: str) -> float:
    sets = []
    for text in (left, right):
        words = brute_tokens(text)
        sets.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return planted(seed=3, bases=24, shares=(0.01, 0.02, 0.05, 0.3))


def test_tokens_are_characters_in_chinese_and_words_elsewhere() -> None:
    assert tokens("Ｈello, 世界! Ça va 123") == ["hello", "世", "界", "ça", "va", "123"]
    text = "混合 text，with 数字42和（括号）"
    assert tokens(text) == brute_tokens(text)


def test_planted_copies_against_brute_force(corpus: list[Document]) -> None:
    found = near_duplicates(corpus, MinHash(), THRESHOLD)
    reported = {(left, right): value for left, right, value in found.pairs}
    for (left, right), value in reported.items():
        exact = brute_jaccard(corpus[left].text, corpus[right].text)
        assert exact >= THRESHOLD
        assert value == pytest.approx(exact, abs=1e-12)
    missed = dict.fromkeys(("en", "zh"), 0)
    expected = dict.fromkeys(("en", "zh"), 0.0)
    for base in range(0, len(corpus), 5):
        for copy in range(base + 1, base + 5):
            exact = brute_jaccard(corpus[base].text, corpus[copy].text)
            if exact < THRESHOLD:
                continue
            expected[corpus[base].language] += (1 - exact**8) ** 14
            together = found.survivor[base] == found.survivor[copy]
            assert together or exact < 0.9
            missed[corpus[base].language] += not together
    for language, count in missed.items():
        assert count <= expected[language] + 3 * np.sqrt(expected[language]) + 1, (language, count, expected)
    lightly = [i for i, document in enumerate(corpus) if document.id.endswith("/0.01")]
    assert sum(found.survivor[i] == found.survivor[i - 1] for i in lightly) == len(lightly)
    heavily = [i for i, document in enumerate(corpus) if document.id.endswith("/0.3")]
    assert found.keep[heavily].all()


def test_signature_is_its_definition_and_estimates_jaccard(corpus: list[Document]) -> None:
    parameters = MinHash()
    texts = [document.text for document in corpus[:60]] + ["一", "two words", ""]
    signature_DP = signatures(texts, parameters)
    for row in (0, 7, 33, 60, 61, 62):
        assert signature_DP[row].tolist() == signature_reference(texts[row], parameters)
    errors = []
    for base in range(0, 60, 5):
        for copy in range(base + 1, base + 5):
            exact = jaccard(shingles(texts[base], 5), shingles(texts[copy], 5))
            errors.append(float((signature_DP[base] == signature_DP[copy]).mean()) - exact)
    assert abs(np.mean(errors)) < 0.02
    assert np.sqrt(np.mean(np.square(errors))) < 0.06


def test_survivors_do_not_depend_on_order(corpus: list[Document]) -> None:
    def kept(documents: list[Document], batch: int) -> set[tuple[str, str]]:
        found = near_duplicates(documents, MinHash(), THRESHOLD, batch=batch)
        return {(d.source, d.id) for d, keep in zip(documents, found.keep, strict=True) if keep}

    shuffled = list(corpus)
    random.Random(5).shuffle(shuffled)
    assert kept(corpus, 256) == kept(shuffled, 7)


def test_longest_copy_stays_and_empty_texts_are_no_copies() -> None:
    words = [f"word{i}" for i in range(200)]
    documents = [
        Document("a", " ".join(words[:190]), "s", "en"),
        Document("b", " ".join(words), "s", "en"),
        Document("c", "…", "s", "en"),
        Document("d", "——", "s", "en"),
    ]
    assert near_duplicates(documents, MinHash(), THRESHOLD).survivor.tolist() == [1, 1, 2, 3]
    assert near_duplicates(documents[2:], MinHash(), 0.0).keep.all()
    assert near_duplicates([], MinHash(), THRESHOLD).survivor.tolist() == []


def test_exact_duplicates_keep_the_smallest_id() -> None:
    documents = [Document(identity, text, "s", "en") for identity, text in (("b", "x y"), ("a", "x y"), ("c", "x  y"))]
    assert exact_duplicates(documents).survivor.tolist() == [1, 1, 2]


def test_chains_of_copies_are_one_group() -> None:
    words = [f"w{i}" for i in range(400)]
    documents = [Document(str(i), " ".join(words[20 * i : 20 * i + 300]), "s", "en") for i in range(4)]
    found = near_duplicates(documents, MinHash(bands=56, rows=2), THRESHOLD)
    assert brute_jaccard(documents[0].text, documents[3].text) < THRESHOLD
    assert len(set(found.survivor.tolist())) == 1


def test_only_documents_unlike_every_leader_become_leaders() -> None:
    words = [f"w{i}" for i in range(500)]
    documents = [Document(str(i), " ".join(words[40 * i : 40 * i + 300]), "s", "en") for i in range(4)]
    texts = [document.text for document in documents]
    one_bucket = next(
        parameters
        for parameters in (MinHash(bands=1, rows=1, seed=seed) for seed in range(1000))
        if len(set(signatures(texts, parameters)[:, 0].tolist())) == 1
    )
    found = near_duplicates(documents, one_bucket, THRESHOLD)
    assert [pair[:2] for pair in found.pairs] == [(0, 1), (2, 3)]
