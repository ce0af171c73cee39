"""`python -m train.ckpt ls|verify RUN_DIR`: what checkpoints a run has, and whether every byte of them is as written.

RUN_DIR is a run directory (its `checkpoints/` and `stages/*/` are looked at) or a directory of checkpoints. `ls` reads
manifests only; `verify` hashes every file. The last line is one JSON object. Exit codes: 0 all good, 64 wrong usage,
66 something is damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from train.checkpoint import Checkpoint
from train.checkpoint_directory import list_steps
from train.checkpoint_format import CheckpointError
from train.command import USAGE, CommandParser


def find_all(directory: Path) -> list[Path]:
    """Every checkpoint of a run directory or a directory of checkpoints, newest first within each place."""
    places = [directory, directory / "checkpoints", *sorted(directory.glob("stages/*"))]
    return [path for place in places for path in list_steps(place)]


def examine(path: Path, whole: bool) -> dict[str, Any]:
    """Figures of one checkpoint; `damage` lists what is wrong. whole: hash every file."""
    try:
        checkpoint = Checkpoint(path)
        problems = checkpoint.damage() if whole else []
    except CheckpointError as error:
        return {"path": str(path), "damage": [str(error)]}
    manifest = checkpoint.manifest
    return {
        "path": str(path),
        "step": manifest.step,
        "tensors": len(manifest.tensors),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": len(manifest.files),
        "damage": problems,
    }


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(prog="python -m train.ckpt", description="List or verify the checkpoints of a run.")
    parser.add_argument("command", choices=("ls", "verify"))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        print(f"python -m train.ckpt: {options.directory} is not a directory", file=sys.stderr)
        return USAGE
    console = Console(stderr=True)
    whole = options.command == "verify"
    paths = find_all(options.directory)
    rows = [examine(path, whole) for path in track(paths, "reading", console=console, disable=not whole)]
    table = Table("checkpoint", "tensors", "files", "MiB", "state")
    for row in rows:
        size = f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else "-"
        state = Text("verified" if whole else "published")
        if row["damage"]:
            state = Text("damaged: " + "; ".join(row["damage"]), style="red")
        name = Text(str(Path(row["path"]).relative_to(options.directory)))
        table.add_row(name, str(row.get("tensors", "-")), str(row.get("files", "-")), size, state)
    console.print(table)
    damaged = [row["path"] for row in rows if row["damage"]]
    print(json.dumps({"command": options.command, "checkpoints": rows, "damaged": damaged}))
    return CheckpointError.exit_code if damaged else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
