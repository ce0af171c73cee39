"""C4's rules (Raffel et al. 2020, section 2.2, and its reference code): some remove lines, some the page."""

from __future__ import annotations

import re

from data.clean.thresholds import C4Rules

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
LINE_ENDS = (".", "?", "!", '"', "'", "。", "？", "！", "”", "’", "」", "』")
ELLIPSES = ("...", "…")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
# A full stop after these, or after a single letter (initials, "e.g.", "U.S."), ends no sentence.
_TITLES = "Mr Mrs Ms Messrs Dr Prof Rev Gen Gov Sen Rep St Jr Inc Ltd Corp".split()
_WITHOUT_END = "".join(rf"(?<!\b{word}\.)" for word in (r"[^\W\d_]", *_TITLES, "vs"))
_END = re.compile(
    rf"""(?<![.!?])(?:\.(?!\.){_WITHOUT_END}|[!?]|\.(?=\.))[.!?]*(?:\s+[.!?]+(?=[\s.!?]|$))*["'”’)\]]*(?=\s|$)"""
    """|[。！？]+["'”’」』）]*"""
)


def c4(text: str, t: C4Rules) -> tuple[str, str | None]:
    """(the lines that stay, reason to drop the page or None)."""
    kept = []
    found = 0
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()
        if t.max_word_length is not None and any(len(word) > t.max_word_length for word in words):
            continue
        if t.remove_citations:
            line = CITATION.sub("", line)
        if t.terminal_punctuation and (not line.endswith(LINE_ENDS) or line.endswith(ELLIPSES)):
            continue
        if t.min_words_per_line is not None and len(words) < t.min_words_per_line:
            continue
        lower = line.lower()
        if t.lorem_ipsum and "lorem ipsum" in lower:
            return text, "lorem_ipsum"
        if t.javascript_lines and "javascript" in lower:
            continue
        if t.curly_bracket and "{" in line:
            return text, "curly_bracket"
        if t.policy_lines and any(phrase in lower for phrase in POLICIES):
            continue
        found += sentences(line)
        kept.append(line)
    if t.min_sentences is not None and found < t.min_sentences:
        return text, "few_sentences"
    left = "\n".join(kept).strip()
    return (left, None) if left else (text, "empty")


def sentences(line: str) -> int:
    """Sentences of a line: ends of sentences, and what follows the last one. Spaced dots are one end."""
    ends = [match.end() for match in _END.finditer(line)]
    rest = line[ends[-1] :] if ends else line
    return len(ends) + bool(rest.strip())
