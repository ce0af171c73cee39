"""Archives: every compression, links left alone, and each kind of bad archive one line."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from data.corpus.archive import Bounds, gunzip, read_members
from data.errors import DataError
from tests.data.corpus.archives import PACK, ar, tar, write_deb, write_wheel

FILES = {"./usr/b.txt": b"two", "./usr/a.txt.gz": gzip.compress(b"one"), "./usr/c.bin": b"no"}


@pytest.mark.parametrize("compression", PACK)
def test_selected_files_come_sorted_and_gunzipped(tmp_path: Path, compression: str) -> None:
    path = write_deb(tmp_path / "p_1_all.deb", FILES, compression, links={"./usr/l.txt": "/etc/passwd"})
    members = read_members(path, r"usr/.*\.txt")
    assert [(member.name, member.content) for member in members] == [("usr/a.txt", b"one"), ("usr/b.txt", b"two")]


def test_dpkg_reads_the_packages_of_these_tests(tmp_path: Path) -> None:
    """The oracle: what dpkg-deb unpacks is what we read."""
    path = write_deb(tmp_path / "p_1_all.deb", FILES)
    try:
        listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no dpkg-deb here")
    assert listed == tar(FILES)


def test_a_wheel_is_read_as_a_zip_archive(tmp_path: Path) -> None:
    path = write_wheel(tmp_path / "p.whl", {"p/a.json": b"{}", "p/b.py": b"raise"})
    assert [(member.name, member.content) for member in read_members(path, r"p/.*\.json")] == [("p/a.json", b"{}")]


@pytest.mark.parametrize("compression", PACK)
def test_a_truncated_package_is_refused_wherever_it_ends(tmp_path: Path, compression: str) -> None:
    whole = write_deb(tmp_path / "whole.deb", FILES, compression).read_bytes()
    path = tmp_path / "cut.deb"
    for size in [0, 5, 8, 40, 68, 140, 190, len(whole) // 2, len(whole) - 90, len(whole) - 9]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"^\S+/cut\.deb: .*(truncated|damaged|not a Debian package)") as caught:
            read_members(path, ".*")
        assert "\n" not in str(caught.value)


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.deb"
    for content, message in (
        (b"PK", "not a Debian package"),
        (ar({"debian-binary": b"2.0\n"}), "truncated: it holds no data.tar"),
        (ar({"data.tar.xz": b"not xz at all"}), "damaged"),
        (ar({"data.tar.lzma": b""}), "found compression 'lzma', can read xz, zst, gz"),
        (ar({"data.tar": b"x" * 2048}), "damaged"),
        (b"!<arch>\n" + b"?" * 60, "damaged ar header at byte 8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_members(path, ".*")
    path = tmp_path / "p.whl"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="damaged or truncated"):
        read_members(path, ".*")
    with pytest.raises(DataError, match="cannot read: No such file"):
        read_members(tmp_path / "none.deb", ".*")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "./usr/../../evil", "usr\\evil"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    for path in (write_deb(tmp_path / "p.deb", {name: b"x"}), write_wheel(tmp_path / "p.whl", {name: b"x"})):
        with pytest.raises(DataError, match="leads out of the archive"):
            read_members(path, ".*")


@pytest.mark.parametrize("compression", PACK)
def test_bombs_are_bounded(tmp_path: Path, compression: str) -> None:
    zeros = bytes(2 << 20)
    small = Bounds(member=1 << 18, archive=1 << 20)
    bomb = write_deb(tmp_path / "p.deb", {"./a": zeros}, compression)
    for select in ("a", "other"):
        with pytest.raises(DataError, match="unpacks to more than the"):
            read_members(bomb, select, small)
    many = write_deb(tmp_path / "q.deb", {f"./{i}": zeros[: 1 << 18] for i in range(5)}, compression)
    with pytest.raises(DataError, match=r"data\.tar unpacks to more than the 1048576 bytes"):
        read_members(many, ".", small)
    with pytest.raises(DataError, match="a gzip file unpacks to more than the 262144 bytes"):
        read_members(write_deb(tmp_path / "r.deb", {"./a.gz": gzip.compress(zeros)}, compression), ".*", small)


def test_zip_bombs_are_bounded(tmp_path: Path) -> None:
    small = Bounds(member=1 << 18, archive=1 << 20)
    for files in ({"a": bytes(1 << 20)}, {str(i): bytes(1 << 18) for i in range(5)}):
        with pytest.raises(DataError, match="unpacks to more than the"):
            read_members(write_wheel(tmp_path / "p.whl", files), ".*", small)


def test_gzip_members_follow_each_other() -> None:
    both = gzip.compress(b"ab") + gzip.compress(b"cd")
    assert gunzip(both, 4) == b"abcd"
    for content, message in ((both[:-3], "truncated"), (both + b"xyz", "damaged")):
        with pytest.raises(DataError, match=message):
            gunzip(content, 10)
    with pytest.raises(DataError, match="more than the 3 bytes"):
        gunzip(both, 3)
