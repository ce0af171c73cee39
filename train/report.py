"""`python -m train.report RUN_DIR`: was this run healthy? One HTML page and its pictures in RUN_DIR/report/.

The last line printed is one JSON object with the figures.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from data.look.html import Picture
from parallel.schedule.drawing import Panel, draw_timelines
from train.figures import evaluation_figure, expert_figure, loss_figure, throughput_figure
from train.metrics import write_text_atomically
from train.model_flops import stage_flops
from train.page import MARK, page
from train.record import RecordError, RunRecord, read_run
from train.verdict import Grade, Verdict, judge

FIGURES = (
    (
        "loss",
        "Loss by stage and language",
        "Thin: every step. Bold: smoothed. It should fall, flatten and not jump; each new stage has longer sequences.",
        loss_figure,
        "loss: no step logged train/loss",
    ),
    (
        "evaluation",
        "Held-out text: before, after, and at each context length",
        "Whole documents that were never trained on. Below a dashed line is better than that baseline; a curve that "
        "falls to the right makes use of longer context.",
        evaluation_figure,
        "held-out bits per byte: there is no evaluation.json",
    ),
    (
        "expert_load",
        "Expert load over time",
        "White is an even share of the tokens, red a busy expert, blue an idle one; a row that stays blue is dead.",
        expert_figure,
        "expert load: there is no load.jsonl",
    ),
    (
        "throughput",
        "Throughput",
        "Tokens per second of each step and smoothed; a fall that does not come with a new stage wants an explanation.",
        throughput_figure,
        "throughput: no step logged perf/tokens_per_s",
    ),
)
TIMELINE_TEXT = (
    "One step of the pipeline as its schedule predicts it from mean durations, above the same step as it ran. Equal "
    "order and similar gaps: the pipeline does what it was designed to do."
)


def write_report(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Write RUN_DIR/report/report.html and its PNGs; returns the page's path and the summary printed as JSON.

    Raises RecordError for a run directory that cannot be read, OSError where the report cannot be written.
    """
    run = read_run(run_dir)
    verdict = judge(run)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    pictures, missing = [], []
    for name, heading, text, draw, reason in FIGURES:
        figure = draw(run)
        if figure is None:
            if not (run.dense and draw is expert_figure):
                missing.append(reason)
            continue
        pictures.append(Picture(heading, text, name, _save(figure, folder / f"{name}.png")))
    panels = timeline_panels(run)
    if panels:
        png, _ = draw_timelines(panels, folder / "timeline.png")
        place = min(2, len(pictures))
        pictures.insert(
            place, Picture("The pipeline, as scheduled and as measured", TIMELINE_TEXT, "timeline", png.read_bytes())
        )
    else:
        missing.append("pipeline timeline: there is no timeline.json")
    path = folder / "report.html"
    write_text_atomically(path, page(run, verdict, pictures, missing))
    return path, summary(run, verdict, path)


def timeline_panels(run: RunRecord) -> list[Panel]:
    """As scheduled (simulated with the measured mean durations) above as measured, in milliseconds."""
    panels = []
    for key, title in (("scheduled", "As scheduled"), ("measured", "As measured")):
        bars = [replace(bar, start=bar.start * 1e3, end=bar.end * 1e3) for bar in run.timeline.get(key, [])]
        if bars:
            panels.append(Panel(title, bars, "ms"))
    return panels


def summary(run: RunRecord, verdict: Verdict, path: Path) -> dict[str, Any]:
    """The figures of the page, for scripts."""
    evaluation: dict[str, Any] = {}
    for row in run.rows:
        evaluation.setdefault(row.language, {}).setdefault(row.label, {})[str(row.context)] = round(
            row.bits_per_byte, 4
        )
    return {
        "run": str(run.directory),
        "verdict": verdict.grade.name.lower(),
        "headline": verdict.headline,
        "aside": verdict.aside,
        "steps": int(run.step[-1]),
        "tokens": int(run.tokens[-1]),
        "loss": _last(run, "train/loss"),
        "tokens_per_s": _median(run, "perf/tokens_per_s"),
        "model_flops": {
            stage.name: {"length": stage.length, "per_token": stage.per_token, "per_s": stage.per_second}
            for stage in stage_flops(run)
        },
        "bits_per_byte": evaluation,
        "baselines": run.baselines,
        **({"data": run.data} if run.data else {}),
        "report": str(path),
    }


def _last(run: RunRecord, name: str) -> float | None:
    values = run.logged(name)[1]
    return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def _median(run: RunRecord, name: str) -> float | None:
    values = run.logged(name)[1]
    return round(float(np.nanmedian(values)), 1) if np.isfinite(values).any() else None


def _save(figure: Figure, path: Path) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return buffer.getvalue()


def print_verdict(verdict: Verdict, console: Console) -> None:
    styles = {Grade.GOOD: "green", Grade.UNKNOWN: "dim", Grade.WARN: "yellow", Grade.BAD: "bold red"}
    width = max(len(check.title) for check in verdict.checks)
    for check in verdict.checks:
        line = f"{MARK[check.grade]} {check.title:<{width}}  {check.figure:<20} {check.text}"
        console.print(line, style=styles[check.grade], markup=False, soft_wrap=True)
    headline = verdict.headline + (f" ({verdict.aside})" if verdict.aside else "")
    console.print(headline, style=styles[verdict.grade], markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Write the report page of a run.")
    parser.add_argument("run_dir", type=Path, help="a run directory, holding metrics.jsonl")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else 0
    try:
        path, figures = write_report(options.run_dir)
    except RecordError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"report: cannot write {error.filename or options.run_dir}: {error.strerror}", file=sys.stderr)
        return 73
    print_verdict(judge(read_run(options.run_dir)), Console(highlight=False))
    print(f"page: {path}")
    print(json.dumps(figures, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
