"""How a source is read: fields, what happens to a faulty document, and the bounds that keep a crafted file from filling
the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import UsageError

MIB = 1 << 20
STOP, SKIP = "stop", "skip"
NO_ID = "none"


@dataclass
class ReadConfig:
    """text, id: names of the fields (columns) with the text and the identity; id "none": the file's name and the place
    in it. faults: a faulty document is to "stop" the build or to be "skip"ped and counted; a faulty file always stops.

    max_ratio: bytes that one compressed byte may give, beyond `slack_bytes` (text gives 3 to 20, a bomb 32,759).
    max_document_bytes: of a line or a document's text. max_window_bytes: memory a zstd frame may ask for.
    """

    text: str = "text"
    id: str = "id"
    faults: str = STOP
    max_ratio: float = 200.0
    slack_bytes: int = 16 * MIB
    max_document_bytes: int = 64 * MIB
    max_window_bytes: int = 128 * MIB


def validate_read(settings: ReadConfig, where: str = "read") -> None:
    """Refuse values that cannot work, in one line (UsageError)."""
    problems = [f"{where}.{name}: none given" for name in ("text", "id") if not getattr(settings, name)]
    if settings.faults not in (STOP, SKIP):
        problems.append(f"{where}.faults: found '{settings.faults}', allowed: {STOP}, {SKIP}")
    checks: list[tuple[str, float, float, float]] = [
        ("max_ratio", settings.max_ratio, 1, 1e9),
        ("slack_bytes", settings.slack_bytes, 0, 2**40),
        ("max_document_bytes", settings.max_document_bytes, 1, 2**31 - 1),
        ("max_window_bytes", settings.max_window_bytes, 1024, 2**31),
    ]
    problems += [
        f"{where}.{key}: found {found}, allowed {low} to {high}"
        for key, found, low, high in checks
        if not low <= found <= high
    ]
    if problems:
        raise UsageError("; ".join(problems))
