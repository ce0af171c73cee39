"""One form for text that looks the same: NFC, \\n line ends, no control characters, no trailing blanks, at most one
empty line in a row.
"""

from __future__ import annotations

import re
import unicodedata

_LINE_END = re.compile("\r\n?|\u2028|\u2029|\x85|\x0b|\x0c")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
_TRAILING = re.compile(r"[^\S\n]+$", re.MULTILINE)
_GAPS = re.compile(r"\n{3,}")


def normalise(text: str) -> str:
    """Normalised text; empty if nothing but blanks and control characters was there.

    Compatibility forms (full-width letters, ligatures) are left alone: they are content. Zero-width joiners stay,
    since emoji are built with them.
    """
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    # Composed last: a control character may have stood between a letter and its accent.
    text = unicodedata.normalize("NFC", text)
    return _GAPS.sub("\n\n", _TRAILING.sub("", text)).strip("\n")
