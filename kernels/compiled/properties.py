"""What the machine code of one kernel variant says: the input of the gates and of the cost model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# What was read of the committed kernels, so that nothing is compiled to choose among them.
COMMITTED = Path(__file__).parent / "properties.json"
# The kernels, and what compiles and reads them.
SOURCES = (
    Path(__file__).parent.parent / "hopper",
    *(Path(__file__).parent / name for name in ("build.py", "loops.py", "machine_code.py")),
)


@dataclass(frozen=True)
class Properties:
    """Read from the compiled kernel, never from its source.

    warps: of a block, the producer's included. shared_bytes: shared memory of a block. registers: per thread as the
    assembler reports them. spill_bytes: spill stores and loads. hot_loop: instructions of the innermost loop that
    holds tensor-core instructions, by opcode without suffix (of one warp group; the loop of the consumers where work is
    specialised), per K block of 128. accumulators: FP32 accumulators of a thread. consumers: warp groups that issue
    tensor-core instructions. tensor_core: full opcode of those instructions, None without. global_accesses: loads and
    stores of global memory by width in bits. total: all instructions by opcode. setmaxnreg: registers are handed from
    the producer to the consumers. hot_loops: `hot_loop` of every consumer and of every branch that has one of its own;
    `hot_loop` is the longest of them. stream_instructions, stream_bytes: instructions of a warp where it moves most,
    its inner loop or all of the kernel, and the bytes they move by 128-bit accesses. atomics: instructions that add to,
    or otherwise compute on, global or shared memory; the exchange that publishes a descriptor is none.
    """

    name: str
    triton: str
    tile: tuple[int, int, int] | None
    warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    tensor_core: str | None
    consumers: int
    accumulators: int
    setmaxnreg: bool
    hot_loop: dict[str, int] = field(default_factory=dict)
    global_accesses: dict[int, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    hot_loops: list[dict[str, int]] = field(default_factory=list)
    stream_instructions: int = 0
    stream_bytes: int = 0
    atomics: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Properties:
        """ValueError: missing or unknown fields."""
        known = {each.name for each in fields(cls)}
        if set(found) != known:
            raise ValueError(f"fields {sorted(set(found) ^ known)} are missing or unknown")
        widths = {int(width): count for width, count in found["global_accesses"].items()}
        tile = None if found["tile"] is None else tuple(found["tile"])
        return cls(**{**found, "tile": tile, "global_accesses": widths})


@dataclass(frozen=True)
class Stored:
    """Properties of all variants by name, the Triton that compiled them and the digest of the sources it read."""

    triton: str
    digest: str
    variants: dict[str, Properties]


def source_digest(sources: Sequence[Path] = SOURCES) -> str:
    """SHA-256 over Python files and those of folders, names included."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(f"{path.relative_to(source.parent).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_properties(path: Path, variants: Sequence[Properties], triton: str, digest: str) -> None:
    """Whole or not at all. OSError: it cannot be written."""
    stored = {
        "triton": triton,
        "digest": digest,
        "variants": [each.to_json() for each in sorted(variants, key=lambda each: each.name)],
    }
    write_text(path, json.dumps(stored, indent=1) + "\n")


def load_properties(path: Path = COMMITTED) -> Stored:
    """OSError: it cannot be read. ValueError: it is not what `write_properties` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        variants = [Properties.from_json(each) for each in found["variants"]]
        return Stored(found["triton"], found["digest"], {each.name: each for each in variants})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no properties of kernels: {type(error).__name__}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Under a temporary name beside it, fsynced and renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
