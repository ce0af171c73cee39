"""What of a package's text is prose: paragraphs that are mostly words, each once.

A paragraph may hold line breaks (verse). Chinese: at least 30 % of its visible characters are Han; English: at least
75 % are letters, and it has at least eight words. Menus, tables, code and untranslated strings fall through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

MIN_HAN_SHARE = 0.30
MIN_LETTER_SHARE = 0.75
MIN_WORDS = 8
PAGE_CHARACTERS = 4000
_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
# A line break beside Han or full-width punctuation stands for nothing; elsewhere it stands for a space.
_WIDE = "[⺀-鿿豈-﫿　-〿＀-￯]"
_WIDE_BREAK = re.compile(rf"(?<={_WIDE})[ \t]*\n\s*|[ \t]*\n\s*(?={_WIDE})")


def is_prose(paragraph: str, language: str) -> bool:
    """language: zh or en."""
    visible = sum(not character.isspace() for character in paragraph)
    if not visible:
        return False
    if language == "zh":
        return len(_HAN.findall(paragraph)) >= MIN_HAN_SHARE * visible
    letters = sum(character.isalpha() for character in paragraph)
    return letters >= MIN_LETTER_SHARE * visible and len(paragraph.split()) >= MIN_WORDS


def prose(documents: Iterable[tuple[str, Sequence[str]]], language: str) -> Iterator[tuple[str, list[str]]]:
    """Of each (id, paragraphs) the paragraphs that are prose and did not come before; documents left empty go."""
    seen: set[str] = set()
    for identity, paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            if paragraph not in seen and is_prose(paragraph, language):
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            yield identity, kept


def unwrap(lines: str) -> str:
    """A paragraph broken into lines as one line."""
    return " ".join(_WIDE_BREAK.sub("", lines.strip()).split())


def paragraphs(text: str) -> list[str]:
    """The paragraphs of wrapped plain text, which empty lines separate, each as one line."""
    return [line for block in re.split(r"\n\s*\n", text) if (line := unwrap(block))]


def pages(name: str, entries: Iterable[str], characters: int = PAGE_CHARACTERS) -> Iterator[tuple[str, list[str]]]:
    """Short pieces in order as documents of about `characters`, numbered from 1: `name`/0001 and so on."""
    page: list[str] = []
    number = size = 0
    for entry in entries:
        page.append(entry)
        size += len(entry)
        if size >= characters:
            number += 1
            yield f"{name}/{number:04d}", page
            page, size = [], 0
    if page:
        yield f"{name}/{number + 1:04d}", page
