"""What every document must hold, whatever file it comes from."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from data.sources.config import ReadConfig

# As JSON, where quotes and backslashes take two bytes, an identity must fit what a block's identities may take
# (`data.store.files.IDENTITY_BYTES`).
MAX_ID_BYTES = 2000
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Fault(Exception):
    """A faulty document. reason: under which it is counted if skipped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Record(NamedTuple):
    """A document as found, not yet checked. place: where in the file."""

    place: str
    identity: Any
    text: Any


def checked(record: Record | Fault, settings: ReadConfig) -> tuple[str, str, int]:
    """Identity, text and its UTF-8 bytes. Raises the Fault that the record is or has."""
    if isinstance(record, Fault):
        raise record
    identity, text = record.identity, record.text
    if type(identity) is int:
        identity = str(identity)
    if not isinstance(identity, str) or not identity:
        raise Fault(
            "no id", f"{record.place}: field '{settings.id}' must be text or an integer, found {_found(identity)}"
        )
    if not isinstance(text, str):
        raise Fault("no text", f"{record.place}: field '{settings.text}' must be text, found {_found(text)}")
    size = _bytes(text, record.place, "text")
    if (id_bytes := _bytes(identity, record.place, "id")) > MAX_ID_BYTES:
        raise Fault("id too long", f"{record.place}: id of {id_bytes} bytes, allowed {MAX_ID_BYTES}")
    if control := CONTROL.search(identity):
        place, found = control.start(), ord(control[0])
        raise Fault(
            "control character", f"{record.place}: id holds control character {found:#04x} at character {place}"
        )
    if size > settings.max_document_bytes:
        allowed = settings.max_document_bytes
        raise Fault("too long", f"{record.place}: text of {size} bytes, allowed {allowed}")
    return identity, text, size


def decoded(content: bytes, offset: int) -> str:
    """Text of bytes that begin at `offset` of the uncompressed stream. Raises Fault with the offset of the first bad
    byte.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise Fault("not UTF-8", f"is not UTF-8: byte 0x{content[error.start]:02x} at offset {place}") from None


def _bytes(text: str, place: str, what: str) -> int:
    nul = text.find("\0")
    if nul >= 0:
        raise Fault("NUL", f"{place}: {what} holds NUL at character {nul}")
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise Fault("lone surrogate", f"{place}: {what} holds a lone surrogate at character {error.start}") from None


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    return "empty text" if value == "" else type(value).__name__
