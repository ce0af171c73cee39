"""The hashes that fix every order and choice: stable across machines, Python runs and library versions.

xxh3_64 names things; `mix` (the finaliser of splitmix64, Steele et al. 2014) spreads integers over arrays; sha256
guards files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

UINT64 = np.uint64


def key64(*parts: object) -> int:
    """64-bit key of a path of names and integers, such as ("documents", source, epoch, block)."""
    return xxhash.xxh3_64_intdigest("\x1f".join(str(part) for part in parts).encode())


def mix(x_N: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 of any shape: a bijection; every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x_N = (x_N ^ (x_N >> UINT64(30))) * UINT64(0xBF58476D1CE4E5B9)
        x_N = (x_N ^ (x_N >> UINT64(27))) * UINT64(0x94D049BB133111EB)
    return x_N ^ (x_N >> UINT64(31))


def permutation(n: int, key: int) -> np.ndarray:
    """Permutation of range(n), int64 [n], fixed by `key` alone (numpy's own shuffles may change between versions)."""
    with np.errstate(over="ignore"):
        sort_N = mix(np.arange(n, dtype=UINT64) * UINT64(0x9E3779B97F4A7C15) + UINT64(key))
    return np.argsort(sort_N, kind="stable")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def json_sha256(value: Any) -> str:
    """sha256 of `canonical_json(value)`, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
