"""Manual pages to paragraphs: requests and escapes of roff go, the words stay (groff_man(7), groff(7))."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from data.corpus.archive import Member
from data.corpus.extract.html import named
from data.corpus.prose import unwrap

_CHARACTERS = {"aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "em": "—", "en": "–", "bu": "•"}
_CHARACTERS |= {"co": "©", "rs": "\\", "ha": "^", "ti": "~", "mu": "×", "->": "→", "<-": "←", "hy": "-", "ga": "`"}
_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s(?:\[[^\]]*\]|[-+]?\(?\d{1,2})|\\[kmMn](?:\[[^\]]*\]|\(..|.)")
_NAMED = re.compile(r"\\\[([^\]]*)\]|\\\((..)|\\\*(?:\[([^\]]*)\]|\((..)|(.))")
_QUOTED = re.compile(r"\\[hvwlLDbo]'[^']*'")
_COMMENT = re.compile(r"\\[\"#].*")
_FONT_MACROS = frozenset("B I R BR RB BI IB IR RI SB SM".split())
_BREAKS = frozenset("PP P LP TP TQ IP HP RS RE SH SS sp br bp in ti TH UR UE EX EE".split())


def _plain(line: str) -> str:
    """A line without escapes."""
    line = _FONT.sub("", _QUOTED.sub("", _COMMENT.sub("", line)))
    line = _NAMED.sub(lambda match: _CHARACTERS.get(next(filter(None, match.groups()), ""), ""), line)
    for escape, plain in (("\\-", "-"), ("\\e", "\0"), ("\\\\", "\0"), ("\\ ", " "), ("\\~", " "), ("\\'", "'")):
        line = line.replace(escape, plain)
    return re.sub(r"\\[&:%|^,/)cptdu{}]?", "", line).replace("\0", "\\")


def _arguments(rest: str) -> list[str]:
    try:
        return shlex.split(rest.replace("\\", "\\\\"), posix=True)
    except ValueError:
        return rest.replace('"', "").split()


def roff_paragraphs(page: str) -> list[str]:
    """The paragraphs of a manual page as single lines; headings are paragraphs, verbatim parts are left out. A tag
    (.TP) ends in a colon.
    """
    found: list[str] = []
    lines: list[str] = []
    verbatim = tagged = False

    def end() -> None:
        if line := unwrap("\n".join(lines)):
            found.append(line)
        lines.clear()

    for raw in page.splitlines():
        request = re.match(r"[.']\s*([A-Za-z]*)\s*(.*)", raw)
        if request is None:
            if not raw.strip():
                end()
            elif not verbatim:
                lines.append(_plain(raw) + (":" if tagged else ""))
                tagged = False
            continue
        name, rest = request[1], _COMMENT.sub("", request[2])
        if name in ("nf", "EX", "TS"):
            verbatim = True
        elif name in ("fi", "EE", "TE"):
            verbatim = False
        if name in _FONT_MACROS and not verbatim:
            joint = "" if len(name) == 2 and name not in ("SM", "SB") else " "
            lines.append(joint.join(map(_plain, _arguments(rest))) + (":" if tagged else ""))
            tagged = False
        elif name in _BREAKS or name in ("nf", "fi"):
            end()
            tagged = name == "TP"
            if name in ("SH", "SS"):
                found.append(unwrap(" ".join(map(_plain, _arguments(rest)))))
    end()
    return found


def manual_pages(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Each manual page a document, named by its section and title: man1/tar.1."""
    for identity, member in named(members):
        yield identity, roff_paragraphs(member.text())
