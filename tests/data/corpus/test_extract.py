"""Extractors on small files made here: which words stay, and in which order."""

from __future__ import annotations

import gzip
import struct
import zlib

import pytest

from data.corpus.archive import Member
from data.corpus.extract.html import html_pages, html_paragraphs
from data.corpus.extract.plain import dictionary, rst_pages, rst_paragraphs, sayings, wrapped_text
from data.corpus.extract.rdata import character_vectors, novels
from data.corpus.extract.roff import manual_pages, roff_paragraphs
from data.corpus.prose import is_prose, pages, prose, unwrap
from data.errors import DataError


def test_what_prose_is() -> None:
    assert is_prose("内核文档 kernel documentation", "zh") is False
    assert is_prose("内核文档说明 kernel", "zh") is True
    assert is_prose("one two three four five six seven eight", "en") is True
    assert is_prose("one two three four five six seven", "en") is False
    assert is_prose("a1 b2 c3 d4 e5 f6 g7 h8 i9", "en") is False
    assert is_prose(" ", "en") is is_prose("", "zh") is False
    documents = [("1", ["甲乙", "menu", "丙丁"]), ("2", ["甲乙"]), ("3", ["戊"])]
    assert list(prose(documents, "zh")) == [("1", ["甲乙", "丙丁"]), ("3", ["戊"])]


def test_lines_are_joined_as_the_script_wants() -> None:
    assert unwrap("one\n  two") == "one two"
    assert unwrap("内核，\n 文档") == "内核，文档"
    assert unwrap("使用 Git\n管理") == "使用 Git管理"
    assert list(pages("p", ["aaa", "bb", "cccc", "d"], 4)) == [
        ("p/0001", ["aaa", "bb"]),
        ("p/0002", ["cccc"]),
        ("p/0003", ["d"]),
    ]


def test_html_keeps_blocks_and_drops_navigation_and_code() -> None:
    page = """<html><head><title>t</title></head><body><nav><p>menu<nav>inner</nav>still</nav>
      <h1>Head</h1><p>One <b>two</b> &amp;
      three<br/>four<script>x<y</script></p><pre>code</pre><div hidden>secret</div>tail"""
    assert html_paragraphs(page) == ["Head", "One two & three", "four", "tail"]
    members = [Member(f"usr/doc/html/{name}.html", b"<p>x") for name in ("a", "b/c")]
    assert [identity for identity, _ in html_pages(members)] == ["a", "b/c"]


def test_manual_pages_lose_requests_and_escapes() -> None:
    page = """.\\" comment
.TH TAR 1 "Mar 2010"
.SH "名字"
tar \\- 档案\\fI文件\\fP
管理程序 \\(co\\|1
.PP
.BR -C ", " --directory
.nf
verbatim
.fi
.TP
\\fB-x\\fR
展开
.IP \\(bu
a\\e b \\\\
"""
    assert roff_paragraphs(page) == ["名字", "tar - 档案文件管理程序 ©1", "-C, --directory", "-x:展开", "a\\ b \\"]
    members = [Member(f"usr/share/man/zh_CN/man{i}/x.{i}", b".SH A\n") for i in (1, 8)]
    assert [identity for identity, _ in manual_pages(members)] == ["man1/x.1", "man8/x.8"]


def test_manual_page_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(DataError, match=r"man1/x\.1 is not UTF-8 at byte 1"):
        list(manual_pages([Member("man1/x.1", b"a\xff")]))


def test_rst_loses_directives_code_tables_and_marks() -> None:
    text = """.. include:: x

:Original: y

Title
=====

See :ref:`the guide <guide>` and ``code`` or **bold**
text::

    code

    more code

- one
- two

.. note::

   inside

+---+
| x |
+---+

last `link <http://x>`_ here
"""
    assert rst_paragraphs(text) == ["See the guide and code or bold text:", "one", "two", "last link here"]


def test_sayings_keep_their_lines() -> None:
    content = "\x1b[32m题目\x1b[m\n  甲，\n乙。\n%\nA\n%\n".encode()
    assert list(sayings([Member("games/tang", content)])) == [("tang/0001", ["题目\n甲，\n乙。", "A"])]
    assert list(wrapped_text([Member("d/j.txt", b"one\n  {two}\n\nthree\n")])) == [("j/0001", ["one two", "three"])]


def test_dictionary_follows_its_index() -> None:
    text = b"Alpha\n\n   first {thing}.\nBeta\n   second."
    index = b"00-database-info\tA\tB\nBeta\tZ\tP\nalpha\tA\tZ\nalpha twice\tA\tZ\n"
    files = [Member("x/f.dict.dz", text), Member("x/f.index", index)]
    assert list(dictionary(files)) == [("f/0001", ["Alpha: first thing.", "Beta: second."])]
    for bad, message in (
        ([files[0]], r"found f\.dict, need a \.dict and its \.index"),
        ([files[0], Member("x/f.index", b"a\tA\t!\n")], "line 1: found"),
        ([files[0], Member("x/f.index", b"a\tA\t//\n")], "leads to byte 4095 of 40"),
    ):
        with pytest.raises(DataError, match=message):
            list(dictionary(bad))


def r_strings(strings: list[str]) -> bytes:
    cells = [struct.pack(">ii", 0x40009, len(text.encode())) + text.encode() for text in strings]
    return struct.pack(">ii", 16, len(strings)) + b"".join(cells)


def r_list(values: dict[str, bytes]) -> bytes:
    """A named list: kind 19 with attributes, values, then the pair list (names: ...)."""
    names = struct.pack(">ii", 0x402, 1) + struct.pack(">ii", 0x40009, 5) + b"names" + r_strings(list(values))
    return struct.pack(">ii", 0x213, len(values)) + b"".join(values.values()) + names + struct.pack(">i", 254)


def r_object(value: bytes) -> bytes:
    return b"X\n" + struct.pack(">iii", 2, 0x30000, 0x20300) + value


def r_database(objects: dict[str, bytes]) -> list[Member]:
    content, spans = b"", {}
    for name, value in objects.items():
        packed = struct.pack(">I", len(r_object(value))) + zlib.compress(r_object(value))
        spans[name] = struct.pack(">iiii", 13, 2, len(content), len(packed))
        content += packed
    index = r_object(r_list({"variables": r_list(spans), "compressed": struct.pack(">iii", 13, 1, 1)}))
    return [Member("R/p.rdb", content), Member("R/p.rdx", gzip.compress(index))]


def test_novels_come_out_of_r_data_by_chapter() -> None:
    lines = ["TITLE", "", "Chapter 1", "", "It is", "a truth.", "", "So.", "CHAPTER II", "", "Fin — é."]
    database = r_database({"novel": r_strings(lines), "number": struct.pack(">iii", 13, 1, 7)})
    assert dict(character_vectors(database)) == {"novel": lines}
    assert list(novels(database)) == [
        ("novel/001", ["Chapter 1", "It is a truth.", "So."]),
        ("novel/002", ["CHAPTER II", "Fin — é."]),
    ]


def test_bad_r_data_are_refused() -> None:
    rdb, rdx = r_database({"novel": r_strings(["text"])})
    index = gzip.decompress(rdx.content)
    for members, message in (
        ([rdb], r"need an \.rdx and its \.rdb"),
        ([rdb, Member("R/p.rdx", gzip.compress(b"A\n1"))], "not R's XDR"),
        ([rdb, Member("R/p.rdx", gzip.compress(index[:-20]))], "inside an object"),
        ([Member("R/p.rdb", rdb.content[:4] + b"xx" + rdb.content[6:]), rdx], "damaged object"),
        ([Member("R/p.rdb", b"\x7f" + rdb.content[1:]), rdx], "allowed"),
        ([Member("R/p.rdb", rdb.content[:2]), rdx], "inside an object|damaged|truncated"),
    ):
        with pytest.raises(DataError, match=message):
            list(character_vectors(members))


def test_ids_of_pages_stay_apart() -> None:
    members = [Member(f"D/{name}", b"x") for name in ("a/b.rst", "a/b.txt", "c.rst")]
    assert [identity for identity, _ in rst_pages(members)] == ["a/b", "a/b.txt", "c"]
