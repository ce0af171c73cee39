"""Documents as read -> documents worth training on, a batch at a time: normalised, of the right language, of quality.

Nothing goes without a count: bytes read = bytes kept + dropped + edited away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from data.clean.language import UNKNOWN, language
from data.clean.normalise import normalise
from data.clean.quality import quality
from data.clean.thresholds import QualityConfig, chinese, english, validate_quality
from data.documents import DOCUMENTS
from data.errors import UsageError

AUTO = "auto"
EMPTY, LANGUAGE = "empty", "language"
NORMALISED, C4_LINES = "normalised", "c4.lines"
Counts = dict[str, dict[str, list[int]]]


@dataclass
class CleanConfig:
    """quality: by language, the thresholds and the families that are on, none at first; documents of a language that is
    not named are not filtered. languages: those kept of sources whose language is "auto"; none named: all.
    """

    quality: dict[str, QualityConfig] = field(default_factory=lambda: {"en": english(), "zh": chinese()})
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cleaned:
    """kept: DOCUMENTS, in order, `language` as found where it was "auto". dropped: reason -> language -> [documents,
    UTF-8 bytes as read]. edited: "normalised" or "c4.lines" -> language -> [documents, bytes taken away], of those
    kept; composed characters can take more bytes, so normalising can take away fewer than none.
    """

    kept: pa.Table
    dropped: Counts
    edited: Counts


def clean_batch(documents: pa.Table, settings: CleanConfig) -> Cleaned:
    """Clean a DOCUMENTS table. Reasons: "empty" (nothing left after normalisation), "language" (found another than
    declared, or not among `languages`), `family.rule` of a quality filter. A pure function of each document.
    """
    cleaned = Cleaned(documents, {}, {})
    rows, texts, languages = [], [], []
    columns = (documents.column(name).to_pylist() for name in ("language", "text"))
    for row, (declared, raw) in enumerate(zip(*columns, strict=True)):
        normal = normalise(raw)
        found = declared if declared != AUTO else language(normal) if normal else UNKNOWN
        text, reason = _judged(normal, declared, found, settings)
        size = len(raw.encode())
        if reason is not None:
            _count(cleaned.dropped, reason, found, size)
            continue
        for what, before, after in ((NORMALISED, raw, normal), (C4_LINES, normal, text)):
            if before != after:
                _count(cleaned.edited, what, found, len(before.encode()) - len(after.encode()))
        rows.append(row)
        texts.append(text)
        languages.append(found)
    kept = documents.take(pa.array(rows, pa.int64()))
    for name, values in (("language", languages), ("text", texts)):
        column = DOCUMENTS.field(name)
        kept = kept.set_column(DOCUMENTS.get_field_index(name), column, pa.array(values, column.type))
    return Cleaned(kept, cleaned.dropped, cleaned.edited)


def _judged(text: str, declared: str, found: str, settings: CleanConfig) -> tuple[str, str | None]:
    if not text:
        return text, EMPTY
    if declared == AUTO:
        if settings.languages and found not in settings.languages:
            return text, LANGUAGE
    elif language(text) != declared:
        return text, LANGUAGE
    rules = settings.quality.get(found)
    return quality(text, rules) if rules is not None else (text, None)


def _count(counts: Counts, what: str, language_: str, size: int) -> None:
    cell = counts.setdefault(what, {}).setdefault(language_, [0, 0])
    cell[0] += 1
    cell[1] += size


def validate_clean(settings: CleanConfig, where: str = "clean") -> None:
    """Refuse thresholds that cannot work and languages that are no codes (UsageError)."""
    for code in (*settings.languages, *settings.quality):
        if not code.isalnum() or code == AUTO:
            raise UsageError(f"{where}: found language '{code}', need a code such as en")
    for code, rules in settings.quality.items():
        validate_quality(rules, f"{where}.quality.{code}")
