"""A batch: what is kept, why the rest went, and that no byte is lost without a count."""

from __future__ import annotations

import pyarrow as pa
import pytest

from data.clean.clean import CleanConfig, Cleaned, clean_batch, validate_clean
from data.clean.thresholds import C4Rules, QualityConfig, english
from data.compose import compose_dataclass
from data.documents import DOCUMENTS
from data.errors import UsageError

ENGLISH = "In the beginning God created the heavens and the earth. "
CHINESE = "话说天下大势，分久必合，合久必分。"
GERMAN = "Am Anfang schuf Gott Himmel und Erde, und die Erde war wüst und leer."


def table(*rows: tuple[str, str]) -> pa.Table:
    records = [
        {"source": "s", "id": str(i), "language": language, "text": text} for i, (language, text) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, DOCUMENTS)


def total_bytes(documents: pa.Table) -> int:
    return sum(len(text.encode()) for text in documents.column("text").to_pylist())


def assert_balanced(documents: pa.Table, cleaned: Cleaned) -> None:
    counts = [cell for row in cleaned.dropped.values() for cell in row.values()]
    assert len(documents) == len(cleaned.kept) + sum(count for count, _ in counts)
    edited = sum(size for row in cleaned.edited.values() for _, size in row.values())
    assert total_bytes(documents) == total_bytes(cleaned.kept) + sum(size for _, size in counts) + edited
    assert cleaned.kept.schema == DOCUMENTS


def test_declared_languages() -> None:
    documents = table(
        ("en", ENGLISH),
        ("zh", CHINESE + "\u3000\r\n"),
        ("en", GERMAN),
        ("zh", ENGLISH),
        ("zh", " \u200b\n"),
        ("en", CHINESE),
    )
    cleaned = clean_batch(documents, CleanConfig())
    assert cleaned.kept.column("id").to_pylist() == ["0", "1"]
    assert cleaned.kept.column("text").to_pylist() == [ENGLISH.rstrip(), CHINESE]
    assert cleaned.dropped == {
        "language": {"en": [2, len(GERMAN.encode()) + len(CHINESE.encode())], "zh": [1, len(ENGLISH)]},
        "empty": {"zh": [1, 5]},
    }
    assert cleaned.edited == {"normalised": {"en": [1, 1], "zh": [1, 5]}}
    assert_balanced(documents, cleaned)


def test_language_auto_takes_what_is_found() -> None:
    documents = table(("auto", ENGLISH), ("auto", CHINESE), ("auto", GERMAN), ("auto", ""), ("de", GERMAN))
    everything = clean_batch(documents, CleanConfig())
    assert everything.kept.column("language").to_pylist() == ["en", "zh", "de", "de"]
    assert everything.dropped == {"empty": {"und": [1, 0]}}
    some = clean_batch(documents, CleanConfig(languages=("en", "zh")))
    assert some.kept.column("language").to_pylist() == ["en", "zh", "de"]
    assert some.dropped["language"] == {"de": [1, len(GERMAN.encode())]}
    assert_balanced(documents, some)


def test_quality_per_language_and_lines_taken_away() -> None:
    rules = QualityConfig(("c4",), c4=C4Rules(min_sentences=1))
    documents = table(("en", ENGLISH + "\nMenu\n" + ENGLISH), ("zh", "{" + CHINESE), ("en", ENGLISH + "{}"))
    cleaned = clean_batch(documents, CleanConfig(quality={"en": rules}))
    assert cleaned.kept.column("text").to_pylist() == [f"{ENGLISH.rstrip()}\n{ENGLISH.rstrip()}", "{" + CHINESE]
    assert cleaned.dropped == {"c4.curly_bracket": {"en": [1, len(ENGLISH) + 2]}}
    assert cleaned.edited["c4.lines"] == {"en": [1, 5]}
    assert_balanced(documents, cleaned)


def test_nothing_kept_and_nothing_given() -> None:
    for documents in (table(), table(("en", CHINESE))):
        cleaned = clean_batch(documents, CleanConfig())
        assert len(cleaned.kept) == 0
        assert_balanced(documents, cleaned)


def test_every_threshold_can_be_given_on_the_command_line() -> None:
    given = [
        "quality.zh.families=[gopher_quality,fineweb]",
        "quality.zh.fineweb.min_punctuated_lines=0.2",
        "quality.en.gopher_repetition.top_ngrams={2: 0.3}",
        "quality.en.gopher_quality.min_words=null",
        "languages=[en]",
    ]
    settings = compose_dataclass(CleanConfig, None, given)
    validate_clean(settings)
    assert list(settings.quality["zh"].families) == ["gopher_quality", "fineweb"]
    assert settings.quality["zh"].fineweb.min_punctuated_lines == 0.2
    assert settings.quality["zh"].fineweb.max_line_breaks_per_word == pytest.approx(0.178 / 1.5)
    assert settings.quality["en"].gopher_repetition.top_ngrams[2] == 0.3
    assert settings.quality["en"].gopher_quality.min_words is None
    documents = table(("zh", CHINESE), ("en", ENGLISH))
    assert clean_batch(documents, settings).dropped == {"gopher_quality.few_words": {"zh": [1, len(CHINESE.encode())]}}
    with pytest.raises(UsageError, match="found language 'auto'"):
        validate_clean(CleanConfig(languages=("auto",)))
    with pytest.raises(UsageError, match=r"clean.quality.en.families: found 'c5'"):
        validate_clean(CleanConfig(quality={"en": english("c5")}))
