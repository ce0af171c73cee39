"""Reads Chrome traces (Trace Event Format, JSON) event by event, so that a file of any size needs little memory.

Accepted: an object with `traceEvents`, or the bare list of events; plain or gzip, told by content. Complete events
(`X`) and begin/end pairs (`B`, `E`) come out as spans; a list may end without its `]`, as the format allows.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20
LARGEST_VALUE = 1 << 28  # characters of one event; a broken file shall not be read into memory whole
SPACE = re.compile(r"[ \t\n\r]*")


class TraceError(ValueError):
    """A file that is no trace, or a broken one; the message names the file."""


@dataclass(slots=True)
class Span:
    """One span of a Chrome trace. start, end: microseconds. args: {} where there are none."""

    name: str
    category: str
    pid: Any
    tid: Any
    start: float
    end: float
    args: dict[str, Any]


class TraceFile:
    """One trace file. `events()` may be called once; `about` (every key but `traceEvents`) is complete after it.

    skipped: events without what their phase needs, and begins without an end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.skipped = 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event, as written. Raises TraceError for a file that cannot be read, is broken or is no trace."""
        try:
            with self._open() as file:
                yield from self._parse(_Scanner(file))
        except OSError as error:
            raise TraceError(f"{self.path}: cannot read: {error.strerror or error}") from error
        except (EOFError, zlib.error) as error:
            raise TraceError(f"{self.path}: broken gzip file: {error}") from error
        except UnicodeDecodeError as error:
            raise TraceError(f"{self.path}: not text: {error.reason} at byte {error.start}") from error
        except _BrokenError as error:
            raise TraceError(f"{self.path}: {error}") from error

    def spans(self) -> Iterator[Span]:
        """`X` events and `B`/`E` pairs; other phases are no spans and are passed over."""
        begun: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for event in self.events():
            phase = event.get("ph")
            if phase not in ("X", "B", "E"):
                continue
            start = _number(event.get("ts"))
            if start is None:
                self.skipped += 1
            elif phase == "X":
                length = _number(event.get("dur", 0))
                if length is None or length < 0:
                    self.skipped += 1
                else:
                    yield _span(event, start, start + length)
            else:
                stack = begun[str(event.get("pid")), str(event.get("tid"))]
                if phase == "B":
                    stack.append(event)
                elif stack:
                    opened = stack.pop()
                    at = float(opened["ts"])
                    yield _span(opened, at, max(at, start), event.get("args"))
                else:
                    self.skipped += 1
        self.skipped += sum(len(stack) for stack in begun.values())

    def _open(self) -> TextIO:
        with self.path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        # utf-8-sig: a byte order mark is no part of the text
        if packed:
            return gzip.open(self.path, "rt", encoding="utf-8-sig")
        return self.path.open(encoding="utf-8-sig")

    def _parse(self, scanner: _Scanner) -> Iterator[dict[str, Any]]:
        opening = scanner.peek()
        if opening == "[":
            yield from self._list(scanner, may_stop=True)
        elif opening == "{":
            found = False
            for key in scanner.keys():
                if key == "traceEvents":
                    if scanner.peek() != "[":
                        raise _BrokenError("traceEvents is not a list")
                    found = True
                    yield from self._list(scanner, may_stop=False)
                else:
                    self.about[key] = scanner.value()
            if not found:
                raise _BrokenError("no Chrome trace: the object has no traceEvents")
        else:
            raise _BrokenError("no Chrome trace: neither a JSON object nor a list" if opening else "the file is empty")

    def _list(self, scanner: _Scanner, may_stop: bool) -> Iterator[dict[str, Any]]:
        for event in scanner.items(may_stop):
            if not isinstance(event, dict):
                raise _BrokenError(f"no Chrome trace: an event is {json.dumps(event)[:60]}, not an object")
            yield event


class _BrokenError(ValueError):
    pass


class _Scanner:
    """A cursor over JSON text that is read piece by piece."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        piece = "" if self._ended else self._file.read(max(CHUNK, len(self._text) - self._at))
        if not piece:
            self._ended = True
            return False
        self._text, self._at = self._text[self._at :] + piece, 0
        return True

    def peek(self) -> str:
        """The next character that is not space; "" at the end of the file."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            expected = " or ".join(repr(one) for one in allowed)
            raise _BrokenError(f"broken JSON: expected {expected}, found {repr(found) if found else 'the end of file'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The JSON value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on where the text read so far ends, be it after "12", "12." or "12e".
                if (end < len(self._text) and self._text[end] not in ".eE") or not self._more():
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LARGEST_VALUE or not self._more():
                    raise _BrokenError(f"broken JSON: {error.msg} near {self._text[error.pos :][:40]!r}") from None
            except RecursionError:
                raise _BrokenError("broken JSON: nested too deeply") from None

    def items(self, may_stop: bool) -> Iterator[Any]:
        """The values of a list. may_stop: the end of the file may stand for what is left of it after an item."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            if may_stop and not self.peek():
                return
            yield self.value()
            if may_stop and not self.peek():
                return
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of an object; the caller takes each value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                self.take('"')
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return


def _number(value: Any) -> float | None:
    if isinstance(value, str):  # some writers quote their numbers
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _span(event: dict[str, Any], start: float, end: float, more: Any = None) -> Span:
    args = event.get("args")
    args = args if isinstance(args, dict) else {}
    if isinstance(more, dict):
        args = args | more
    name, category = event.get("name"), event.get("cat")
    return Span(
        "" if name is None else str(name),
        "" if category is None else str(category),
        event.get("pid"),
        event.get("tid"),
        start,
        end,
        args,
    )
