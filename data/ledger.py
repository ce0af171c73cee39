"""What each step of a build kept and dropped, by language; kept and dropped always add up to what the step before
kept, and to what the step added where it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Ledger:
    """steps: step name -> language -> {documents, bytes, dropped_documents, dropped_bytes}, in order. A step that adds
    has {added_documents, added_bytes} too.
    """

    steps: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    def record(
        self, step: str, left: Mapping[str, Sequence[int]], added: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Note what is left after `step`. left: language -> (documents, UTF-8 bytes of their texts). added: the same of
        what the step added, for one that does.
        """
        row = {}
        for language in sorted(set(left) | set(self._last)):
            count, size = left.get(language, (0, 0))
            before = self._last.get(language, (count, size))
            more = (added or {}).get(language, (0, 0))
            row[language] = {
                "documents": count,
                "bytes": size,
                "dropped_documents": before[0] + more[0] - count,
                "dropped_bytes": before[1] + more[1] - size,
            }
            if added is not None:
                row[language] |= {"added_documents": more[0], "added_bytes": more[1]}
            self._last[language] = (count, size)
        self.steps[step] = row


def ledger_table(steps: dict[str, dict[str, dict[str, int]]]) -> Table:
    """The ledger as a table: one row per step, documents and megabytes kept and dropped per language."""
    languages = sorted({language for row in steps.values() for language in row})
    table = Table(title="documents (MB) by step")
    table.add_column("step")
    for language in languages:
        table.add_column(f"{language} kept", justify="right")
        table.add_column("dropped", justify="right")
    for step, row in steps.items():
        cells = []
        for language in languages:
            found = row.get(language)
            if found is None:
                cells += ["", ""]
                continue
            cells.append(f"{found['documents']} ({found['bytes'] / 1e6:.3f})")
            dropped = found["dropped_documents"] or found["dropped_bytes"]
            change = f"{found['dropped_documents']} ({found['dropped_bytes'] / 1e6:.3f})" if dropped else "–"
            if "added_documents" in found:
                change = f"+{found['added_documents']} ({found['added_bytes'] / 1e6:.3f})"
            cells.append(change)
        table.add_row(step, *cells)
    return table
