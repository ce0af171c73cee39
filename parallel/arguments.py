"""KEY=VALUE arguments of the small commands that need no Hydra."""

from __future__ import annotations

from collections.abc import Sequence


def pairs(arguments: Sequence[str], allowed: Sequence[str], needed: Sequence[str], usage: str) -> dict[str, str]:
    """The values by key. ValueError, one line: not KEY=VALUE, a key that is unknown, given twice or missing."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in allowed or not equals or not value:
            raise ValueError(f"{argument!r}: must be KEY=VALUE with KEY one of {', '.join(allowed)}; {usage}")
        if key in given:
            raise ValueError(f"{key} is given twice: {given[key]} and {value}")
        given[key] = value
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; {usage}")
    return given


def whole_number(key: str, text: str, least: int = 1) -> int:
    """The value of `key` as an integer; `1e9` is one. ValueError, one line: not a whole number of at least `least`."""
    try:
        found = float(text)
        if not found.is_integer() or found < least:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{key}={text}: must be a whole number of at least {least}") from None
    return int(found)
