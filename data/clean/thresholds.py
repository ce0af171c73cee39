"""What a document must satisfy, by language, as published; docs/cleaning.md has the table with every source.

None switches a rule off. The values of the classes are those for English: Gopher (Rae et al. 2021, appendix A.1), C4
(Raffel et al. 2020, section 2.2), FineWeb (Penedo et al. 2024, section 3.5 and appendix). `chinese()` has FineWeb-2's
(Penedo et al. 2025) for Mandarin, which count jieba's words, turned into characters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data.errors import UsageError

GOPHER_REPETITION, GOPHER_QUALITY, C4, FINEWEB = "gopher_repetition", "gopher_quality", "c4", "fineweb"
FAMILIES = (GOPHER_REPETITION, GOPHER_QUALITY, C4, FINEWEB)
# Characters of a token in modern Chinese text: jieba's dictionary has 1.66 per word, weighted by frequency; with about
# a fifth of the tokens punctuation, 1.5.
CHARACTERS_PER_WORD = 1.5
# FineWeb-2's list for Mandarin holds both scripts; a word of one character is one of ours.
CHINESE_STOP_WORDS = tuple("的年在月是和日了於·為有被人中为他與後也而由")
ENGLISH_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass
class GopherRepetition:
    """Largest shares of repeated text, table A1. `*_lines`, `*_paragraphs`: of their number; `*_characters`: of the
    document's characters. top_ngrams: n -> share of the commonest n-gram; duplicate_ngrams: n -> share of n-grams that
    stood before.
    """

    duplicate_lines: float | None = 0.30
    duplicate_paragraphs: float | None = 0.30
    duplicate_line_characters: float | None = 0.20
    duplicate_paragraph_characters: float | None = 0.20
    top_ngrams: dict[int, float] = field(default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16})
    duplicate_ngrams: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )


@dataclass
class GopherQuality:
    """Words that hold a letter or digit: their number and mean length; `#` and ellipses per word; shares of lines that
    begin with a bullet or end with an ellipsis; share of words with a letter; stop words that must occur.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_symbols_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = ENGLISH_STOP_WORDS


@dataclass
class C4Rules:
    """Rules for pages, then for lines; lines that fail are removed from the text, not the document.

    FineWeb's variant is the default: the rule of terminal punctuation, which removes 30 % of the tokens, is off.
    """

    lorem_ipsum: bool = True
    curly_bracket: bool = True
    min_sentences: int | None = 5
    remove_citations: bool = True
    terminal_punctuation: bool = False
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000
    javascript_lines: bool = True
    policy_lines: bool = True


@dataclass
class FineWebRules:
    """Share of lines that end in punctuation, at least; of lines of at most `short_line_length` characters, of
    characters in duplicate lines, and of line breaks per word, at most.
    """

    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    short_line_length: int = 30
    max_duplicate_line_characters: float | None = 0.1
    max_line_breaks_per_word: float | None = 0.3


@dataclass
class QualityConfig:
    """families: those that are applied, in order; the first rule that a document breaks is the reason it is dropped.
    The published pipelines apply gopher_repetition, gopher_quality, c4 (not FineWeb-2) and fineweb.
    """

    families: tuple[str, ...] = ()
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4Rules = field(default_factory=C4Rules)
    fineweb: FineWebRules = field(default_factory=FineWebRules)


def english(*families: str) -> QualityConfig:
    """FineWeb's thresholds. duplicate line characters: 0.1 as in its report (its code has 0.01)."""
    return QualityConfig(families)


def chinese(*families: str) -> QualityConfig:
    """FineWeb-2's thresholds for Mandarin (configs/cmn_Hani.yml and its pipeline), from words to characters."""
    c = CHARACTERS_PER_WORD
    top = {2: 0.256, 3: 0.201, 4: 0.171}
    duplicate = {5: 0.198, 6: 0.182, 7: 0.167, 8: 0.154, 9: 0.14, 10: 0.127}
    return QualityConfig(
        families,
        gopher_repetition=GopherRepetition(
            duplicate_lines=0.287,
            duplicate_paragraphs=None,
            duplicate_line_characters=None,
            duplicate_paragraph_characters=None,
            top_ngrams={_characters(n): share for n, share in top.items()},
            duplicate_ngrams={_characters(n): share for n, share in duplicate.items()},
        ),
        gopher_quality=GopherQuality(
            min_words=int(50 * c),
            max_words=int(100_000 * c),
            min_mean_word_length=None,
            max_mean_word_length=None,
            max_symbols_per_word=0.1 / c,
            # .735 of the words with a letter, at 1.66 characters each, the others at one.
            min_alphabetic_words=0.82,
            stop_words=CHINESE_STOP_WORDS,
        ),
        fineweb=FineWebRules(
            min_punctuated_lines=0.106,
            max_short_lines=None,
            max_duplicate_line_characters=0.1,
            max_line_breaks_per_word=0.178 / c,
        ),
    )


def _characters(words: int) -> int:
    return int(words * CHARACTERS_PER_WORD + 0.5)


def validate_quality(settings: QualityConfig, where: str) -> None:
    """Refuse unknown families, shares outside 0 to 1 and n-grams of no words (UsageError)."""
    problems = [
        f"{where}.families: found '{family}', allowed: {', '.join(FAMILIES)}"
        for family in settings.families
        if family not in FAMILIES
    ]
    repetition = settings.gopher_repetition
    for name in ("top_ngrams", "duplicate_ngrams"):
        for n, share in getattr(repetition, name).items():
            if not 1 <= n <= 100 or not 0 <= share <= 1:
                problems.append(f"{where}.gopher_repetition.{name}: found {n}: {share}, need n 1 to 100, share 0 to 1")
    shares = {
        "gopher_repetition": ("duplicate_lines", "duplicate_paragraphs"),
        "gopher_quality": ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words"),
        "fineweb": ("min_punctuated_lines", "max_short_lines", "max_duplicate_line_characters"),
    }
    for family, names in shares.items():
        for name in names:
            share = getattr(getattr(settings, family), name)
            if share is not None and not 0 <= share <= 1:
                problems.append(f"{where}.{family}.{name}: found {share}, allowed 0 to 1")
    quality = settings.gopher_quality
    if quality.min_stop_words and quality.min_stop_words > len(set(quality.stop_words)):
        problems.append(
            f"{where}.gopher_quality: {quality.min_stop_words} of {len(quality.stop_words)} stop words asked"
        )
    if problems:
        raise UsageError("; ".join(problems))
