"""Speed and memory of dedup beside datatrove's, on the documents of `benchmarks.planted`.

    python -m benchmarks.dedup [--raw data_cache/corpus] [--environment DIR] [--no-datatrove] [--synthetic 2000000]

Every side is a process of its own; figures are its CPU-seconds after imports and its peak memory. datatrove runs in an
environment that is made on the first run (`--environment`, by default a temporary one); where that cannot be installed
its figures are null and a line says why. --synthetic 0 leaves out the large run. The last line is one JSON object; exit
1 if a measured bound does not hold or datatrove ends with an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.planted_corpus import DOCUMENT_COUNT, planted, write_shards
from data.errors import DataError

ROOT = Path(__file__).parents[1]
# datatrove 0.10.1 asks for none of orjson, spaCy, regex and tokenizers, which it imports here, and passes text where
# xxhash 4 wants bytes.
DATATROVE = ("datatrove==0.10.1", "xxhash<4", "orjson", "spacy", "regex", "tokenizers")
SHIPPED_DOCUMENTS = 4000
LEAST = {"over_datatrove": 5.0, "over_datatrove_as_shipped": 20.0}
MOST_BYTES = 2 << 30


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dedup")
    parser.add_argument("--raw", type=Path, default=Path("data_cache/corpus"), help="directory of jsonl texts")
    parser.add_argument("--documents", type=int, default=DOCUMENT_COUNT)
    parser.add_argument("--shipped-documents", type=int, default=SHIPPED_DOCUMENTS)
    parser.add_argument("--environment", type=Path, help="where datatrove is, or is to be installed")
    parser.add_argument("--no-datatrove", action="store_true")
    parser.add_argument("--synthetic", type=int, default=2_000_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bireme_dedup_") as folder:
        try:
            result = measure(options, Path(folder))
        except DataError as error:
            print(f"dedup: {error}", file=sys.stderr)
            return error.exit_code
    show(result)
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    documents = planted(options.raw, options.documents, seed=11).documents
    shards = write_shards(folder / "in", documents, 4)
    sides: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for side in ("signatures", "unverified", "verified"):
        sides[side] = ours(side, folder / side, shards)
    if options.no_datatrove:
        print("datatrove: left out")
    elif (python := environment(options.environment or folder / "environment")) is not None:
        for tokens, count in (("ours", len(documents)), ("shipped", options.shipped_documents)):
            source = folder / f"{tokens}.jsonl"
            lines = [json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) for d in documents[:count]]
            source.write_text("\n".join(lines) + "\n", encoding="utf-8")
            command = [
                str(python),
                str(ROOT / "benchmarks/dedup_datatrove.py"),
                str(source),
                str(folder / tokens),
                tokens,
            ]
            if (row := child(command)) is not None:
                sides[f"datatrove {tokens}"] = row
            else:
                failed.append(f"datatrove {tokens}: ended with an error, see above")
    if options.synthetic:
        sides["synthetic"] = ours(f"synthetic-{options.synthetic}", folder / "synthetic", [])
    for row in sides.values():
        row["documents_per_cpu_s"] = row["documents"] / row["cpu_s"]
    result: dict[str, Any] = {"benchmark": "dedup", "bytes": sum(d.bytes for d in documents), "sides": sides}
    speed = sides["unverified"]["documents_per_cpu_s"]
    for name, side in (("over_datatrove", "datatrove ours"), ("over_datatrove_as_shipped", "datatrove shipped")):
        result[name] = speed / sides[side]["documents_per_cpu_s"] if side in sides else None
    result["failed"] = failed + [
        f"{name}: {result[name]:.2f}, at least {least}"
        for name, least in LEAST.items()
        if result[name] is not None and result[name] < least
    ]
    if options.synthetic and sides["synthetic"]["peak_bytes"] >= MOST_BYTES:
        result["failed"].append(f"synthetic: peak {sides['synthetic']['peak_bytes']} bytes, below {MOST_BYTES}")
    return result


def ours(side: str, work: Path, shards: Sequence[str]) -> dict[str, Any]:
    row = child([sys.executable, "-m", "benchmarks.dedup_sides", side, str(work), *shards])
    if row is None:
        raise DataError(f"{side} ended with an error, see above")
    return row


def child(command: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object on the last line of a command, run with one thread; None, and what it said, if it failed."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"), "1")
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(Path.home())}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**path, **one}, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        print(f"{' '.join(command[1:4])}: ended with {done.returncode}: {said[0]}")
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def environment(place: Path) -> Path | None:
    """The Python of an environment with datatrove, made if it is not there; None, and a line, if it cannot be."""
    python = place / "bin" / "python"
    if not python.is_file():
        venv.create(place, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", *DATATROVE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"datatrove: cannot be installed: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
            return None
    return python


def show(result: dict[str, Any]) -> None:
    table = Table(title="dedup, one process each")
    for column in ("side", "documents", "CPU-seconds", "documents per CPU-second", "peak MiB"):
        table.add_column(column, justify="right")
    for name, row in result["sides"].items():
        figures = (f"{row['cpu_s']:.1f}", f"{row['documents_per_cpu_s']:.0f}", f"{row['peak_bytes'] / 2**20:.0f}")
        table.add_row(name, str(row["documents"]), *figures)
    Console().print(table)
    for name, side in result["sides"].items():
        if "stages" in side:
            print(f"{name}: CPU-seconds by stage {side['stages']}; {side['counts']}")
    for name in LEAST:
        if result[name] is not None:
            print(f"{name}: {result[name]:.1f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
