"""Texts that are nearly plain: sayings, reStructuredText, wrapped text, dictionaries in the DICT format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from data.corpus.archive import Member
from data.corpus.extract.html import named
from data.corpus.prose import pages, paragraphs, unwrap
from data.errors import DataError

_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|.\x08")
_ROLE = re.compile(r":[\w:+-]+:`([^`<]+?)\s*(?:<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`]*>`_{1,2}")
_MARKS = re.compile(r"\*\*([^*]+)\*\*|``([^`]+)``|(?<!\w)\*([^*\n]+)\*(?!\w)|`([^`\n]+)`_?")
_RULED = re.compile(r"([-=~^\"'`#*+.:_<>])\1{2,}|[-=+| ]{3,}")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?(?:\d+|[a-z])[.)])\s+")
_FIELD = re.compile(r"\s*:[\w .-]+:(\s|$)")
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def sayings(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Fortune files, whose entries lines of "%" separate; line breaks are kept, as many are verse. Pages of entries."""
    for member in members:
        text = _TERMINAL.sub("", member.text()).replace("\r", "")
        entries = (entry.expandtabs() for entry in re.split(r"(?m)^%\n?", text))
        lines = ("\n".join(line.strip() for line in entry.strip().splitlines()) for entry in entries)
        yield from pages(PurePosixPath(member.name).name, filter(None, lines))


def wrapped_text(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Plain text wrapped into lines, as pages of paragraphs; braces mark links."""
    for member in members:
        yield from pages(PurePosixPath(member.name).stem, paragraphs(re.sub(r"[{}]", "", member.text())))


def rst_paragraphs(text: str) -> list[str]:
    """reStructuredText without directives, literal blocks, tables, field lists and inline marks."""
    found = []
    skipped_indent = -1
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        if indent > skipped_indent >= 0:
            continue
        skipped_indent = -1
        if lines[0].lstrip().startswith(".. "):
            skipped_indent = indent
            continue
        if lines[-1].rstrip().endswith("::"):
            skipped_indent = indent
        if any(_RULED.fullmatch(line.strip()) for line in lines) or lines[0].lstrip().startswith(("+-", "|")):
            continue
        kept = "\n".join(_BULLET.sub("\v", line) for line in lines if not _FIELD.match(line))
        kept = _MARKS.sub(lambda match: next(filter(None, match.groups())), _LINK.sub(r"\1", _ROLE.sub(r"\1", kept)))
        found += [unwrap(re.sub(r"::$", ":", item.strip())) for item in kept.split("\v")]
    return [line for line in found if line]


def rst_pages(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Each file a document; its id is its path below what all share."""
    for identity, member in named(members):
        yield identity.removesuffix(".rst"), rst_paragraphs(member.text())


def dictionary(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """A DICT database: NAME.dict(.dz) and NAME.index: headword, offset and length in base 64 (dictd(8)).

    Pages of entries in the order of the text; an entry is one string. Error: DataError when a file is missing or the
    index leads beyond the text.
    """
    files = {PurePosixPath(member.name).name.removesuffix(".dz"): member for member in members}
    index = next((member for name, member in files.items() if name.endswith(".index")), None)
    name = PurePosixPath(index.name).stem if index else ""
    if index is None or f"{name}.dict" not in files:
        raise DataError(f"found {', '.join(sorted(files)) or 'no file'}, need a .dict and its .index")
    content = files[f"{name}.dict"].content
    spans = set()
    for number, line in enumerate(index.text().splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 3 or not all(set(field) <= set(_BASE64) for field in fields[1:3]):
            raise DataError(f"{index.name} line {number}: found {line!r}, need headword, offset, length")
        if not fields[0].startswith("00"):
            offset, length = map(_base64_number, fields[1:3])
            if offset + length > len(content):
                raise DataError(f"{index.name} line {number}: leads to byte {offset + length} of {len(content)}")
            spans.add((offset, length))
    yield from pages(name, (_entry(content[first : first + length]) for first, length in sorted(spans)))


def _base64_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _BASE64.index(digit)
    return number


def _entry(content: bytes) -> str:
    """Headword, then the definition; braces mark links to other entries."""
    text = content.decode("utf-8", "replace").replace("{", "").replace("}", "")
    head, _, body = text.strip().partition("\n")
    return f"{head.strip()}: {' '.join(paragraphs(body))}"
