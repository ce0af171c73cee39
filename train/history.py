"""The run's own record: JSON lines, flushed one by one, readable as one history whatever restarts happened.

`metrics.jsonl`: {"step", "tokens", "time", name: value, ...}. JSON has no NaN or infinity: such a value is null. Every
`train/loss*` and every value that is not finite also has `<name>_hex`, its exact bits (`float.fromhex`).
`events.jsonl`: {"event", "time", ...}, never rewound: it tells of restarts. `load.jsonl`: {"step", "layer", "load"}.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

METRICS, EVENTS, LOAD = "metrics.jsonl", "events.jsonl", "load.jsonl"


class JsonLinesSink:
    """Appends to the three files."""

    name = "jsonl"

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {
            name: open(run_dir / name, "a", encoding="utf-8") for name in (METRICS, EVENTS, LOAD)
        }

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        line: dict[str, Any] = {"step": step, "tokens": tokens, "time": time.time()}
        for name, value in values.items():
            finite = math.isfinite(value)
            line[name] = value if finite else None
            if not finite or (name.startswith("train/loss") and isinstance(value, float)):
                line[f"{name}_hex"] = float(value).hex()
        self._append(METRICS, line)

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        self._append(EVENTS, {"event": kind, "time": time.time(), **fields})

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None:
        for layer, load in loads.items():
            self._append(LOAD, {"step": step, "layer": layer, "load": list(load)})

    def close(self, exit_code: int) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        self._files[name].flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file (none if there is no file). A last line cut short by a kill is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield json.loads(raw)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def rewind(run_dir: Path, step: int) -> None:
    """Make metrics.jsonl and load.jsonl end at `step`; later lines go to `<name>.replaced-N.jsonl`, in full.

    Nothing is lost if this is interrupted: the lines set aside are on disk before the shorter file takes its place.
    """
    for name in (METRICS, LOAD):
        path = run_dir / name
        if not path.exists():
            continue
        lines = list(read_lines(path))
        later = [line for line in lines if line["step"] > step]
        torn = not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        if not later and not torn:
            continue
        if later:
            number = 1
            while (replaced := path.with_name(f"{path.stem}.replaced-{number}.jsonl")).exists():
                number += 1
            _write_lines(replaced, later)
        _write_lines(path, [line for line in lines if line["step"] <= step])


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def exact(line: Mapping[str, Any], name: str) -> float:
    """The value of `name` to the last bit, NaN and infinity included."""
    text = line.get(f"{name}_hex")
    return float.fromhex(text) if text is not None else float(line[name])
