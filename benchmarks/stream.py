"""The token stream beside Megatron-Core's GPTDataset, what packing costs, and a corpus of 14.8T tokens.

    python benchmarks/stream.py [--tokens 64000000] [--samples 8000] [--corpus DIRECTORY] [--megatron DIRECTORY]

- Speed: both sides read the same made-up tokens (random tokens, log-normal lengths of mean 1,200), ours from its blocks
  with packing and fill-in-the-middle of a tenth of the documents, Megatron's from the exported `.bin` and `.idx`. One
  process each, alternately; sequences of 4,096 tokens in shuffled order; tokens, labels, loss mask and positions as
  torch tensors; after one pass to warm up. Micro-batches of 1 and of 8 (Megatron's stacked by torch's
  `default_collate`). A figure is the median of the repeats; `over_megatron` is the lower of the two ratios of samples
  per second, `processor_ratio` the lower of the same by processor time.
- Megatron-Core is installed from the package index into a directory of its own, or taken from `--megatron`. Its reader
  and writer also make the exported files anew, which must be the same to the byte.
- Packing: padding without the emptiest sequence of each block, documents cut although they fit, and the share of
  documents that concatenating would cut; for the made-up corpus and for `--corpus`.
- Large: the manifest and plan of 14.8T tokens, opened in a fresh process at a random sample; `open_and_seek` is up to
  knowing block and sequence, the first read then fetches and checks a whole block. Planning time is that of 100 blocks,
  multiplied.

The last line is one JSON object. Exit code 1 when a bound is missed; 69 when Megatron-Core cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stream_corpus import large, make_corpus, packing
from data.errors import DataError
from data.store.exchange import ExportConfig, export_megatron
from data.stream.plan import build_plans

MEGATRON = "megatron-core==0.16.1"
LENGTH, FIM_RATE, SEED, PAD = 4096, 0.1, 7, 2
SIZES = (1, 8)
SIDES = Path(__file__).resolve().parent / "stream_sides.py"


class Side:
    """A process of `stream_sides.py`."""

    def __init__(self, name: str, *arguments: object, path: str = "") -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(SIDES), name, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.found = self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next JSON line; other lines are the library's."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise DataError(f"{SIDES.name} {self.name}: ended with {self.process.wait()}")

    def run(self, size: int) -> dict[str, Any]:
        """Read all samples in micro-batches of `size`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{size}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.communicate("")


def speed(directory: Path, megatron: str, samples: int, repeats: int) -> dict[str, Any]:
    """Samples per second of both sides, by size of the micro-batch."""
    corpus, prefix = directory / "corpus", directory / "exported" / "made"
    export_megatron(ExportConfig(str(corpus), str(prefix.parent)))
    build_plans(corpus, [LENGTH], seeds=[SEED], fim_rates=[FIM_RATE])
    sides = {
        "megatron": Side("megatron", prefix, LENGTH, samples, PAD, path=megatron),
        "ours": Side("ours", corpus, LENGTH, samples, FIM_RATE),
    }
    rows = []
    for size in SIZES:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                runs[name].append(side.run(size))
        row: dict[str, Any] = {"micro_batch": size}
        for name, found in runs.items():
            for clock in ("wall", "processor"):
                row[f"{name}_{clock}"] = samples // size * size / statistics.median(run[clock] for run in found)
        row["over_megatron"] = row["ours_wall"] / row["megatron_wall"]
        row["processor_ratio"] = row["ours_processor"] / row["megatron_processor"]
        rows.append(row)
    for side in sides.values():
        side.close()
    return {
        "over_megatron": min(row["over_megatron"] for row in rows),
        "processor_ratio": min(row["processor_ratio"] for row in rows),
        "same_files": sides["megatron"].found["same_files"],
        "open_seconds": {name: side.found["open_seconds"] for name, side in sides.items()},
        "speed": rows,
    }


def install(directory: Path) -> str:
    """Megatron-Core in a directory of its own; torch and numpy are those of this environment. Error: DataError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), MEGATRON]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"{MEGATRON} cannot be installed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    return str(directory)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The token stream beside Megatron-Core's GPTDataset.")
    parser.add_argument("--tokens", type=int, default=64_000_000, help="of the made-up corpus")
    parser.add_argument("--samples", type=int, default=8000, help="read in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--corpus", type=Path, help="a built corpus whose packing is also printed")
    parser.add_argument("--megatron", default="", help="directory with megatron-core, instead of installing it")
    parser.add_argument("--directory", help="where the made-up corpora go (default: the temporary directory)")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or arguments.samples < max(SIZES) or arguments.tokens < arguments.samples * LENGTH:
        parser.exit(64, f"stream: --repeats at least 1, --samples at least {max(SIZES)}, --tokens {LENGTH} a sample\n")
    console = Console()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        directory = Path(place)
        try:
            console.print(f"making {arguments.tokens} tokens")
            make_corpus(directory / "corpus", arguments.tokens, seed=1)
            figures: dict[str, Any] = {"packing": {"made": packing(directory / "corpus", LENGTH)}}
            if arguments.corpus:
                figures["packing"]["corpus"] = packing(arguments.corpus, LENGTH)
            console.print("reading")
            figures = speed(directory, arguments.megatron or install(directory / "megatron"), arguments.samples,
                            arguments.repeats) | figures  # fmt: skip
            console.print("14.8T tokens")
            figures["large"] = large(directory, LENGTH, seed=2)
        except DataError as error:
            print(f"stream: {error}", file=sys.stderr)
            return 69
    show(console, figures)
    made, opened = figures["packing"]["made"], figures["large"]
    bounds = [
        ("over_megatron", figures["over_megatron"], figures["over_megatron"] >= 1.0, "at least 1.0"),
        ("same_files", figures["same_files"], figures["same_files"], "true"),
        ("padding", made["padding"], made["padding"] < 0.001, "below 0.001"),
        ("cut_shorter", made["cut_shorter"], made["cut_shorter"] == 0, "0"),
        ("open_and_seek_seconds", opened["open_and_seek_seconds"], opened["open_and_seek_seconds"] < 1, "below 1"),
        ("open_and_seek_bytes", opened["open_and_seek_bytes"], opened["open_and_seek_bytes"] < 3e8, "below 300 MB"),
    ]
    missed = [f"missed: {name}={found}: {allowed}" for name, found, held, allowed in bounds if not held]
    for line in missed:
        console.print(line)
    loads = {"load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps({**figures, "length": LENGTH, "fim_rate": FIM_RATE, **loads}))
    return 1 if missed else 0


def show(console: Console, figures: dict[str, Any]) -> None:
    """The figures as tables."""
    grid = Table(title=f"Samples per second per process, {LENGTH} tokens (by processor time in brackets)")
    for column in ("micro-batch", "ours, packed, FIM", "Megatron-Core", "ratio"):
        grid.add_column(column, justify="right")
    for row in figures["speed"]:
        sides = (f"{row[f'{side}_wall']:.0f} ({row[f'{side}_processor']:.0f})" for side in ("ours", "megatron"))
        ratio = f"{row['over_megatron']:.2f} ({row['processor_ratio']:.2f})"
        grid.add_row(str(row["micro_batch"]), *sides, ratio)
    console.print(grid)
    grid = Table(title="Packing")
    for column in ("corpus", "tokens", "padding", "with last", "cut: longer", "cut: others", "concatenated: cut"):
        grid.add_column(column, justify="right")
    for name, row in figures["packing"].items():
        shares = (row["padding"], row["padding_with_last"], row["cut_longer"])
        texts = ["-" if share is None else f"{share:.3%}" for share in shares]
        grid.add_row(name, str(row["tokens"]), *texts, str(row["cut_shorter"]), f"{row['concat_cut']:.1%}")
    console.print(grid)
    grid = Table(title="14.8T tokens")
    grid.add_column("figure")
    grid.add_column("value", justify="right")
    for name, value in figures["large"].items():
        grid.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(grid)


if __name__ == "__main__":
    sys.exit(main())
