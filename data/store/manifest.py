"""`manifest.json`: reading, writing and trusting it. Its digest is the sha256 of everything else in it, so it names
the data to the byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.contract import Block, Manifest, Source
from data.errors import DataError
from data.hashing import file_sha256, json_sha256

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
TOKEN_BYTES = 4
TOKEN_DTYPE = np.dtype("<u4")


def with_digest(manifest: Manifest) -> Manifest:
    """The manifest with its digest filled in."""
    content = asdict(manifest)
    del content["digest"]
    return replace(manifest, digest=json_sha256(content))


def manifest_json(manifest: Manifest) -> bytes:
    """Content of manifest.json."""
    return (json.dumps(asdict(manifest), ensure_ascii=False, indent=1) + "\n").encode()


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a built corpus. Errors (DataError): none there, damaged, of another format, or its digest
    differs from its content.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the manifest: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != FORMAT_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: format version {found}, this program reads {FORMAT_VERSION}")
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged: {error}") from None
    if (found := with_digest(manifest).digest) != manifest.digest:
        raise DataError(f"{path}: content has digest {found}, but it says {manifest.digest}")
    names = [source.name for source in manifest.sources]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a source name is given twice: {', '.join(names)}")
    for source in manifest.sources:
        for block in source.blocks:
            for name in (block.file, block.index_file):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise DataError(f"{path}: block file '{name}' lies outside the directory")
    return manifest


def verify_files(directory: Path, manifest: Manifest, digests: bool) -> None:
    """Check every block file against the manifest: existence and size, and with `digests` the content. Error:
    DataError naming the file.
    """
    for source in manifest.sources:
        for block in source.blocks:
            for name, sha256 in ((block.file, block.sha256), (block.index_file, block.index_sha256)):
                path = directory / name
                if not path.is_file():
                    raise DataError(f"{path}: missing, but the manifest lists it")
                if digests and (found := file_sha256(path)) != sha256:
                    raise DataError(f"{path}: sha256 is {found}, the manifest has {sha256}")
            size = (directory / block.file).stat().st_size
            if size != block.tokens * TOKEN_BYTES:
                raise DataError(
                    f"{directory / block.file}: {size} bytes, the manifest has {block.tokens} tokens of 4 bytes"
                )


def _parse(content: dict[str, Any]) -> Manifest:
    sources = tuple(
        Source(**{**source, "blocks": tuple(Block(**block) for block in source["blocks"])})
        for source in content["sources"]
    )
    return Manifest(**{**content, "sources": sources})
