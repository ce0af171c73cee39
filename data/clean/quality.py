"""The published filters: each a pure function of a document's statistics and its thresholds that gives the reason to
drop it, or None. A reason is `family.rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data.clean import thresholds
from data.clean.c4 import c4
from data.clean.statistics import Statistics, repeated
from data.clean.thresholds import FineWebRules, GopherQuality, GopherRepetition, QualityConfig

BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
# Ends of sentences (Unicode's Sentence_Terminal of Latin and CJK) and closing quotes or brackets after them: a
# full-width mark counts as its narrow form.
TERMINAL = ".!?。！？．｡…‼⁇⁈⁉‽"
CLOSING = "\"'”’»)]』」）】》〉"


def quality(text: str, settings: QualityConfig) -> tuple[str, str | None]:
    """(text, reason or None): the text changes only by `c4`, which removes lines."""
    statistics = Statistics(text)
    for family in settings.families:
        if family == thresholds.C4:
            text, reason = c4(statistics.text, settings.c4)
            if text != statistics.text:
                statistics = Statistics(text)
        else:
            reason = FILTERS[family](statistics, getattr(settings, family))
        if reason is not None:
            return statistics.text, f"{family}.{reason}"
    return statistics.text, None


def gopher_repetition(document: Statistics, t: GopherRepetition) -> str | None:
    """Rae et al. 2021, A.1.1 and table A1."""
    length = len(document.text)
    if not length:
        return "empty"
    for name, (parts, count, characters) in (
        ("paragraph", document.repeated_paragraphs),
        ("line", document.repeated_lines),
    ):
        if _above(count / parts, getattr(t, f"duplicate_{name}s")):
            return f"duplicate_{name}s"
        if _above(characters / length, getattr(t, f"duplicate_{name}_characters")):
            return f"duplicate_{name}_characters"
    repeats = document.ngram_repeats([*t.top_ngrams, *t.duplicate_ngrams])
    for n in sorted(t.top_ngrams):
        if document.top_characters(n, repeats[n]) / length > t.top_ngrams[n]:
            return f"top_{n}_grams"
    for n in sorted(t.duplicate_ngrams):
        if document.duplicate_characters(n, repeats[n]) / length > t.duplicate_ngrams[n]:
            return f"duplicate_{n}_grams"
    return None


def gopher_quality(document: Statistics, t: GopherQuality) -> str | None:
    """Rae et al. 2021, A.1.1, "Quality Filtering"."""
    words, lexical = len(document.words), document.lexical
    if not lexical or _below(len(lexical), t.min_words):
        return "few_words"
    if _above(len(lexical), t.max_words):
        return "many_words"
    mean = sum(map(len, lexical)) / len(lexical)
    if _below(mean, t.min_mean_word_length):
        return "short_words"
    if _above(mean, t.max_mean_word_length):
        return "long_words"
    text = document.text
    if _above(text.count("#") / words, t.max_symbols_per_word):
        return "hashes"
    if _above(sum(map(text.count, ELLIPSES)) / words, t.max_symbols_per_word):
        return "ellipses"
    lines = text.splitlines()
    if _above(sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines), t.max_bullet_lines):
        return "bullet_lines"
    if _above(sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines), t.max_ellipsis_lines):
        return "ellipsis_lines"
    if _below(document.alphabetic_words / words, t.min_alphabetic_words):
        return "alphabetic_words"
    if t.min_stop_words and len(set(t.stop_words).intersection(document.words)) < t.min_stop_words:
        return "stop_words"
    return None


def fineweb(document: Statistics, t: FineWebRules) -> str | None:
    """Penedo et al. 2024, section 3.5."""
    lines = document.lines
    if not lines:
        return "empty"
    punctuated = sum(line.rstrip().rstrip(CLOSING).endswith(tuple(TERMINAL)) for line in lines)
    if _below(punctuated / len(lines), t.min_punctuated_lines):
        return "punctuated_lines"
    short = sum(len(line) <= t.short_line_length for line in lines)
    if _above(short / len(lines), t.max_short_lines):
        return "short_lines"
    breaks = document.text.count("\n")
    _, _, duplicate = repeated(lines)
    if _above(duplicate / (len(document.text) - breaks), t.max_duplicate_line_characters):
        return "duplicate_line_characters"
    if _above(breaks / len(document.words), t.max_line_breaks_per_word):
        return "line_breaks"
    return None


FILTERS: dict[str, Callable[[Statistics, Any], str | None]] = {
    thresholds.GOPHER_REPETITION: gopher_repetition,
    thresholds.GOPHER_QUALITY: gopher_quality,
    thresholds.FINEWEB: fineweb,
}


def _above(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold


def _below(value: float, threshold: float | None) -> bool:
    return threshold is not None and value < threshold
