"""Pages of HTML documentation to paragraphs: block elements break, navigation, code and scripts are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html.parser import HTMLParser

from data.corpus.archive import Member
from data.corpus.prose import unwrap

_SKIPPED = frozenset(
    "head script style pre nav header footer aside button select noscript svg math textarea template".split()
)
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code del dfn em font i ins kbd label mark q s samp small span strike strong sub "
    "sup time tt u var wbr img".split()
)
_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._current: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        hidden = any(name == "hidden" for name, _ in attributes)
        if (tag in _SKIPPED or hidden or self._skipping) and tag not in _VOID:
            # Only elements of the name that began the skipping count: others may lack their end.
            if not self._skipping or tag == self._skipping[0]:
                self._skipping.append(tag)
        elif tag not in _INLINE:
            self.end_paragraph()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE and not self._skipping:
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping.pop()
        elif tag not in _INLINE:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._current.append(data)

    def end_paragraph(self) -> None:
        if line := unwrap("".join(self._current)):
            self.found.append(line)
        self._current = []


def html_paragraphs(page: str) -> list[str]:
    """The text of an HTML page, one string per block element."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    parser.end_paragraph()
    return parser.found


def html_pages(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Each page a document; its id is its path below what all pages share."""
    for identity, member in named(members):
        yield identity.removesuffix(".html"), html_paragraphs(member.text())


def named(members: Sequence[Member]) -> Iterator[tuple[str, Member]]:
    """Members with their names below the folder that all of them share."""
    folders = [member.name.split("/")[:-1] for member in members]
    shared = 0
    while folders and all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    for member in members:
        yield "/".join(member.name.split("/")[shared:]), member
