"""What each step of a build kept and dropped, by language; kept and dropped always add up to what the step before
kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Ledger:
    """steps: step name -> language -> {documents, bytes, dropped_documents, dropped_bytes}, in order."""

    steps: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    def record(self, step: str, left: Mapping[str, Sequence[int]]) -> None:
        """Note what is left after `step`. left: language -> (documents, UTF-8 bytes of their texts)."""
        row = {}
        for language in sorted(set(left) | set(self._last)):
            count, size = left.get(language, (0, 0))
            before = self._last.get(language, (count, size))
            row[language] = {
                "documents": count,
                "bytes": size,
                "dropped_documents": before[0] - count,
                "dropped_bytes": before[1] - size,
            }
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
            cells.append(f"{found['dropped_documents']} ({found['dropped_bytes'] / 1e6:.3f})" if dropped else "–")
        table.add_row(step, *cells)
    return table
