"""`manifest.json`: reading, writing and trusting it. Its digest is the sha256 of everything else in it, the digests of
the block tables included, so it names the data to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data.contract import WEIGHT, WEIGHT_NEEDED, Manifest, Source
from data.errors import DataError
from data.hashing import json_sha256
from data.publish import make_directory, write_file
from data.store.files import block_files, check_digest, check_size
from data.store.location import Location, open_location
from data.store.names import checked_source_name, table_file
from data.store.table import BLOCK_DTYPE, HEADER_BYTES, block_table, open_table, table_bytes, table_sha256

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 3
MANIFEST_BYTES = 1 << 24
MAX_VOCABULARY = 1 << 31
FIM_IDS = 3
SOURCE_TYPES = {"name": str, "language": str, "documents": int, "tokens": int, "text_bytes": int, "weight": str}
MANIFEST_TYPES = {
    "tokenizer_sha256": str, "vocab_size": int, "bos_id": int, "eos_id": int, "pad_id": int, "digest": str
}  # fmt: skip


def with_digest(manifest: Manifest) -> Manifest:
    """The manifest with its digest filled in."""
    content = _content(manifest)
    del content["digest"]
    return replace(manifest, digest=json_sha256(content))


def manifest_json(manifest: Manifest) -> bytes:
    """Content of manifest.json."""
    return (json.dumps(_content(manifest), ensure_ascii=False, indent=1) + "\n").encode()


def manifest_files(manifest: Manifest) -> dict[str, bytes]:
    """Content of the block tables and of manifest.json by name, in the order in which they are to be written."""
    tables = {table_file(s.name): table_bytes(block_table(s.name, s.blocks)) for s in manifest.sources}
    return {**tables, MANIFEST_FILE: manifest_json(manifest)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the block tables and then manifest.json. Error: CannotWriteError."""
    for name, content in manifest_files(manifest).items():
        make_directory((directory / name).parent)
        write_file(directory / name, content)


def load_manifest(corpus: str | Path | Location) -> Manifest:
    """The manifest of a built corpus, its block tables mapped.

    Errors (DataError): none there, damaged, of another format, a digest that differs from the content, counts that do
    not add up, unsafe names.
    """
    location = corpus if isinstance(corpus, Location) else open_location(corpus)
    where = location.shown(MANIFEST_FILE)
    if not location.exists(MANIFEST_FILE):
        raise DataError(f"{where}: cannot read the manifest: no such file")
    try:
        content = json.loads(location.read(MANIFEST_FILE, MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != FORMAT_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where}: format version {found}, this program reads {FORMAT_VERSION}; build it again")
    try:
        said = {key: _typed(content, key, kind) for key, kind in MANIFEST_TYPES.items()}
        digest = json_sha256({key: value for key, value in content.items() if key != "digest"})
        if digest != said["digest"]:
            raise DataError(f"{where}: content has digest {digest}, but it says {said['digest']}")
        if unknown := sorted(set(content) - {"version", "sources", "fim_ids", *MANIFEST_TYPES}):
            raise KeyError(f"unknown key {unknown[0]}")
        fim_ids = tuple(_typed({"fim_ids": each}, "fim_ids", int) for each in content["fim_ids"])
        _check_vocabulary(where, said, fim_ids)
        names = [checked_source_name(_typed(source, "name", str), where) for source in content["sources"]]
        if len(set(names)) != len(names):
            raise DataError(f"{where}: a source name is given twice: {', '.join(names)}")
        if len({name.casefold() for name in names}) != len(names):
            raise DataError(f"{where}: source names that differ only in case: {', '.join(names)}")
        if not names:
            raise DataError(f"{where}: no sources")
        sources = tuple(_source(location, where, source) for source in content["sources"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged: {error}") from None
    return Manifest(version=FORMAT_VERSION, sources=sources, fim_ids=fim_ids, **said)


def verify_files(corpus: str | Path | Location, manifest: Manifest, digests: bool) -> None:
    """Check every block file of a local corpus against the manifest: existence and size, and with `digests` the
    content. Files at a URL are checked when they arrive. Error: DataError naming the file.
    """
    location = corpus if isinstance(corpus, Location) else open_location(corpus)
    if location.checks_digests:
        return
    for source in manifest.sources:
        for block in source.blocks:
            for name, sha256, limit in block_files(block):
                with location.open(name, sha256, limit) as file:
                    if name == block.file:
                        check_size(file, location.shown(name), limit)
                    if digests:
                        check_digest(file, location.shown(name), sha256)


def _check_vocabulary(where: str, said: Mapping[str, Any], fim_ids: tuple[int, ...]) -> None:
    vocab_size = said["vocab_size"]
    if not 1 <= vocab_size <= MAX_VOCABULARY:
        raise DataError(f"{where}: vocab_size {vocab_size}, allowed 1 to {MAX_VOCABULARY}")
    if len(fim_ids) not in (0, FIM_IDS):
        raise DataError(f"{where}: {len(fim_ids)} fim_ids, allowed none or {FIM_IDS}")
    ids = {key: said[key] for key in ("bos_id", "eos_id", "pad_id")}
    ids |= {f"fim_ids[{place}]": token for place, token in enumerate(fim_ids)}
    for key, token in ids.items():
        if token >= vocab_size:
            raise DataError(f"{where}: {key} is {token}, but the vocabulary has {vocab_size}")


def _content(manifest: Manifest) -> dict[str, Any]:
    """Everything in manifest.json: of each source's blocks, their number and the digest of their table."""
    sources = []
    for source in manifest.sources:
        table = block_table(source.name, source.blocks)
        values = {key: getattr(source, key) for key in SOURCE_TYPES}
        sources.append({**values, "blocks": len(table), "table_sha256": table_sha256(table)})
    values = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    return {**values, "sources": sources}


def _source(location: Location, where: str, content: dict[str, Any]) -> Source:
    values = {key: _typed(content, key, kind) for key, kind in SOURCE_TYPES.items()}
    blocks, sha256 = _typed(content, "blocks", int), _typed(content, "table_sha256", str)
    if unknown := sorted(set(content) - {"blocks", "table_sha256", *SOURCE_TYPES}):
        raise KeyError(f"unknown key {unknown[0]}")
    if not WEIGHT.fullmatch(values["weight"]):
        raise DataError(f"{where}: source '{values['name']}': weight {values['weight'][:40]!r}, need {WEIGHT_NEEDED}")
    name = table_file(values["name"])
    limit = HEADER_BYTES + blocks * BLOCK_DTYPE.itemsize
    with location.open(name, sha256, limit) as file:
        table = open_table(file, location.shown(name), values["name"], blocks, sha256)
    last = table.record_B[-1] if blocks else None
    for count in ("documents", "tokens"):
        found = 0 if last is None else int(last[f"first_{count[:-1]}"]) + int(last[count])
        if found != values[count]:
            raise DataError(f"{where}: source '{values['name']}': {values[count]} {count}, its blocks have {found}")
    return Source(blocks=table, **values)


def _typed(content: Any, key: str, kind: type) -> Any:
    value = content[key]
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise TypeError(f"'{key}' is {value!r}")
    return value
