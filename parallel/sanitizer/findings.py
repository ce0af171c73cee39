"""What the sanitizer refuses, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """What a finding breaks (docs/sanitizer.md)."""

    RACE = "race"
    EARLY_FREE = "early free"
    HIDDEN_SYNC = "hidden synchronisation"
    HOST_TENSOR = "host tensor"
    COLLECTIVE = "unordered collective"
    TICKET = "ticket"


@dataclass(frozen=True)
class Finding:
    """One broken rule. line: operation, streams, tensor, and what is missing."""

    rule: Rule
    line: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.line}"


class StreamFault(RuntimeError):
    """What ran on the sanitizer's device would be wrong on CUDA streams."""


class Findings:
    """Findings in the order they were made, each line once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def add(self, rule: Rule, line: str) -> None:
        """Another one."""
        self._found[Finding(rule, line)] = None

    def extend(self, others: Iterable[Finding]) -> None:
        """Those of another rank, or of a comparison of ranks."""
        self._found.update(dict.fromkeys(others))

    def take(self) -> list[Finding]:
        """What was found since the last `take`."""
        found = list(self._found)
        self._found.clear()
        return found

    def check(self, most: int = 20) -> None:
        """Raises StreamFault with the first `most` lines, if there are any."""
        if self._found:
            lines = [str(finding) for finding in self._found]
            rest = [f"... and {len(lines) - most} more"] if len(lines) > most else []
            raise StreamFault("\n".join([*lines[:most], *rest]))
