"""A run read back from its directory: what the report and its verdict are made from.

Needs `metrics.jsonl`. Everything else may be missing (a run under way, or one that was never evaluated):
`load.jsonl`, `events.jsonl`, `status.json`, `config.yaml`, and
`evaluation.json` {"rows": [{"checkpoint", "label", "language", "context", "bits_per_byte", "one_token_bits_per_byte"}],
"baselines": {language: {"zlib", "token_unigram", "token_bigram", "character_bigram"}}}, rows in the order of training;
`timeline.json` {"scheduled": [bar], "measured": [bar]}, a bar being {"rank", "op", "direction", "chunk", "stage",
"start", "end"} in seconds from any origin;
Outside it, `report.json` of the data build in the configuration's `data.directory`: {"languages": {language: counts}}.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from parallel.schedule.actions import Op
from parallel.schedule.drawing import Bar
from train.history import EVENTS, LOAD, METRICS, read_lines

LANGUAGES = {"en": "English", "zh": "Chinese"}
LABELS = {"before": "before training", "pretrain": "after pretraining"}


class RecordError(Exception):
    """A file of the run directory is missing (exit 64) or not what it should be (exit 65)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class EvaluationRow:
    """Held-out bits per byte of one checkpoint, language and context length in tokens. `one_token`: the same model
    seeing only the one token before each."""

    label: str
    language: str
    context: int
    bits_per_byte: float
    one_token: float | None


@dataclass
class RunRecord:
    """`series[name]` is aligned with `step` and `tokens`; `present[name]` says at which steps it was logged.
    `load[layer]` is (steps, [records, experts] tokens)."""

    directory: Path
    step: np.ndarray
    tokens: np.ndarray
    series: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    load: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[EvaluationRow] = field(default_factory=list)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    timeline: dict[str, list[Bar]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether the configuration says that the model has no experts."""
        model = self.config.get("model")
        return isinstance(model, dict) and model.get("num_routed_experts") == 0

    def has(self, name: str) -> bool:
        return name in self.series and bool(np.isfinite(self.series[name]).any())

    def logged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of the steps that logged `name`; what was not finite is NaN."""
        if name not in self.series:
            return np.zeros(0, int), np.zeros(0)
        return self.tokens[self.present[name]], self.series[name][self.present[name]]

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """[(name, first tokens, last tokens)] in order, from `train/stage`; one unnamed stage where none was logged."""
        tokens, index = self.logged("train/stage")
        if len(index) == 0:
            return [("", int(self.tokens[0]), int(self.tokens[-1]))] if len(self.tokens) else []
        named = [str(stage.get("name", "")) for stage in self.config.get("stages") or []]
        spans, first = [], 0
        for number in np.unique(index[np.isfinite(index)]).astype(int):
            last = int(tokens[index == number][-1])
            spans.append((named[number] if number < len(named) else f"stage {number + 1}", first, last))
            first = last
        return spans

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(row.label for row in self.rows))

    def skips(self) -> np.ndarray:
        """Token counts of the skipped steps, from the running total `optim/skipped`."""
        tokens, total = self.logged("optim/skipped")
        return tokens[np.diff(total, prepend=0.0) > 0]

    def sources(self) -> list[str]:
        """Sources (languages) whose loss was logged."""
        prefix = "train/loss/"
        return sorted(name.removeprefix(prefix) for name in self.series if name.startswith(prefix))


def language_name(code: str) -> str:
    return LANGUAGES.get(code, code)


def label_name(label: str) -> str:
    if label.startswith("extend_"):
        return f"after extension {label.removeprefix('extend_').replace('x', '×')}"
    return LABELS.get(label, label)


def read_run(directory: Path) -> RunRecord:
    """Raises RecordError."""
    if not directory.is_dir():
        raise RecordError(f"run directory {directory}: there is no such directory", 64)
    lines = _lines(directory / METRICS)
    if not lines:
        raise RecordError(f"{directory / METRICS}: no metrics; a run directory holds at least one line of them", 65)
    record = _read_series(directory, lines)
    record.load = _read_load(directory / LOAD)
    record.events = _lines(directory / EVENTS)
    record.status = _json(directory / "status.json")
    record.config = _yaml(directory / "config.yaml")
    evaluation = _json(directory / "evaluation.json")
    try:
        record.rows = [
            EvaluationRow(
                row["label"],
                row["language"],
                int(row["context"]),
                float(row["bits_per_byte"]),
                None if row.get("one_token_bits_per_byte") is None else float(row["one_token_bits_per_byte"]),
            )
            for row in evaluation.get("rows", [])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{directory / 'evaluation.json'}: a row lacks or garbles {error}", 65) from None
    record.baselines = evaluation.get("baselines", {})
    record.timeline = _read_timeline(directory / "timeline.json")
    record.data = _read_data(record.config)
    return record


def _read_series(directory: Path, lines: list[dict[str, Any]]) -> RunRecord:
    """Lines of one step (training figures, then an evaluation) become one row."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        if not isinstance(line.get("step"), int) or not isinstance(line.get("tokens"), int):
            raise RecordError(f"{directory / METRICS}: a line without step and tokens: {line}", 65)
        rows.setdefault(line["step"], {}).update(line)
    ordered = [rows[step] for step in sorted(rows)]
    names = sorted({name for row in ordered for name in row} - {"step", "tokens", "time"})
    names = [name for name in names if not name.endswith("_hex")]
    series = {
        name: np.array([float("nan") if row.get(name) is None else row[name] for row in ordered], float)
        for name in names
    }
    return RunRecord(
        directory,
        np.array([row["step"] for row in ordered]),
        np.array([row["tokens"] for row in ordered]),
        series,
        present={name: np.array([name in row for row in ordered]) for name in names},
    )


def _read_load(path: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    layers: dict[int, dict[int, list[float]]] = {}
    try:
        for line in _lines(path):
            layers.setdefault(int(line["layer"]), {})[int(line["step"])] = line["load"]
        return {
            layer: (np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)], float))
            for layer, by_step in sorted(layers.items())
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: a line lacks or garbles {error}", 65) from None


def _read_timeline(path: Path) -> dict[str, list[Bar]]:
    try:
        return {key: _bars(entries) for key, entries in _json(path).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: a bar lacks or garbles {error}", 65) from None


def _bars(entries: list[dict[str, Any]]) -> list[Bar]:
    stages: dict[tuple[int, int], set[int]] = defaultdict(set)
    for entry in entries:
        stages[entry["rank"], entry["direction"]].add(entry["stage"])
    bars = []
    for entry in entries:
        rank, direction, start, end = entry["rank"], entry["direction"], float(entry["start"]), float(entry["end"])
        place = sorted(stages[rank, direction]).index(entry["stage"])
        bars.append(Bar(rank, Op(entry["op"]), direction, entry["chunk"], start, end, place))
    return bars


def _read_data(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the data build counted, by language; empty where the corpus is not on this machine."""
    place = config.get("data")
    if not isinstance(place, dict) or not place.get("directory"):
        return {}
    languages = _json(Path(str(place["directory"])) / "report.json").get("languages", {})
    return languages if isinstance(languages, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_lines(path))
    except ValueError as error:
        raise RecordError(str(error), 65) from None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error})", 65) from None
    if not isinstance(found, dict):
        raise RecordError(f"{path}: expected one JSON object, found {type(found).__name__}", 65)
    return found


def _yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # the YAML parser's and OmegaConf's errors have no common base
        raise RecordError(f"{path}: not YAML ({(str(error).splitlines() or [type(error).__name__])[0]})", 65) from None
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
