"""Small Debian packages and wheels, made for the tests."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import zstandard

PACK = {"xz": lzma.compress, "zst": zstandard.compress, "gz": gzip.compress, "": bytes}


def tar(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def ar(files: Mapping[str, bytes]) -> bytes:
    parts = [b"!<arch>\n"]
    for name, content in files.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        parts += [header.encode(), content, b"\n" * (len(content) % 2)]
    return b"".join(parts)


def write_deb(path: Path, files: Mapping[str, bytes], compression: str = "xz", **more: Mapping[str, str]) -> Path:
    data = PACK[compression](tar(files, **more))
    suffix = f".{compression}" if compression else ""
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{suffix}": data}))
    return path


def write_wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
