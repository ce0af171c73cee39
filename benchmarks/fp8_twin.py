"""FP8 beside BF16: two runs of the demo model on the same data and seed, and how far their losses drift apart.

    python benchmarks/fp8_twin.py [--corpus data_cache/demo] [--steps 160] [--tokens 2048] [--image fp8_twin.png]

Both twins train at once, one process each; losses are smoothed as in DeepSeek-V3's figure 10 (moving average with
decay 0.9). The figure of merit is |FP8 - BF16| / BF16 of the smoothed losses, averaged over the last fifth of the
steps; V3 reports under 0.25 % at its size. A second seed in BF16 (--control) shows how far apart two runs are that
differ in their start only. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import DataError
from data.stream import open_stream
from parallel.config import ParallelConfig
from train.compose import compose_run
from train.engine import Engine, StepPlan
from train.errors import AgreedError, RunError

DECAY, LAST_SHARE, TARGET = 0.9, 0.2, 0.01


@dataclass(frozen=True)
class Job:
    """What one twin runs. seed: of the weights; the data are the same for all."""

    name: str
    fp8: bool
    seed: int
    corpus: str
    steps: int
    tokens: int
    length: int
    overrides: tuple[str, ...]


def train(job: Job, out: Connection) -> None:
    """One twin: sends each step's loss, then None; or what is wrong and its exit code."""
    torch.set_num_threads(1)
    try:
        for loss in losses(job):
            out.send(loss)
        out.send(None)
    except (DataError, RunError) as error:
        out.send((str(error), error.exit_code))


def losses(job: Job) -> Any:
    config = compose_run(["experiment=demo", f"data.directory={job.corpus}", *job.overrides])
    stream = open_stream(job.corpus, job.length, mtp_depth=config.model.mtp_depth, seed=config.seed, stage="twin")
    sources = len(stream.source_names)
    engine = Engine(config.model, ParallelConfig(), config.optimizer, torch.bfloat16, job.fp8, 0, sources)
    engine.initialize(job.seed)
    sequences, stage = job.tokens // job.length, config.stages[0]
    peak = max(max(piece.start, piece.end) for piece in stage.learning_rate)
    for step in range(job.steps):
        rate = peak * min(1.0, (step + 1) / 16) * (1.0 if step < 0.8 * job.steps else 0.3)
        samples = step * sequences
        order = engine.sample_order(samples, sequences, sequences // 2)
        batches = {key: stream.read(chosen) for key, chosen in order.items()}
        plan = StepPlan(stream.counts(samples, sequences), rate, 0.3, stage.balance, 0.001)
        yield engine.step(batches, 2, plan).main


def smooth(values: list[float]) -> np.ndarray:
    """Exponential moving average, its start corrected for the missing past."""
    average, out = 0.0, []
    for i, value in enumerate(values):
        average = DECAY * average + (1 - DECAY) * value
        out.append(average / (1 - DECAY ** (i + 1)))
    return np.array(out)


def run_together(jobs: list[Job], console: Console) -> dict[str, list[float]]:
    """Every job's losses. Raises RunError with the line of the first that fails."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {job.name: [] for job in jobs}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    processes, names = [], {}
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bars = {job.name: progress.add_task(job.name, total=job.steps, loss="-") for job in jobs}
        for job in jobs:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=train, args=(job, sending), daemon=True)
            process.start()
            sending.close()
            processes.append(process)
            names[receiving] = job.name
        try:
            while names:
                for connection in wait(list(names)):
                    assert isinstance(connection, Connection)
                    name = names[connection]
                    try:
                        loss = connection.recv()
                    except EOFError:
                        raise RunError(f"{name}: the process ended without a word") from None
                    if isinstance(loss, tuple):
                        raise AgreedError(f"{name}: {loss[0]}", loss[1])
                    if loss is None:
                        del names[connection]
                        continue
                    found[name].append(loss)
                    progress.update(bars[name], advance=1, loss=f"{loss:.3f}")
        finally:
            for process in processes:
                process.terminate() if names else process.join()
    return found


def relative_difference(a: list[float], b: list[float]) -> np.ndarray:
    """|a - b| / b of the smoothed losses, by step."""
    return np.abs(smooth(a) - smooth(b)) / smooth(b)


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Smoothed losses above, relative differences to BF16 below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, height_ratios=[2, 1])
    colors = {"BF16": "#1f2933", "FP8": "#d6604d", "BF16, other seed": "#7b8794"}
    for name, values in found.items():
        steps = np.arange(1, len(values) + 1)
        style = "--" if name == "FP8" else "-"
        upper.plot(steps, smooth(values), style, color=colors[name], label=name, linewidth=1.8)
        if name != "BF16":
            lower.plot(steps, 100 * relative_difference(values, found["BF16"]), color=colors[name], label=name)
    first = len(found["BF16"]) * (1 - LAST_SHARE)
    lower.axvspan(first, len(found["BF16"]), color="#f1f4f7")
    lower.axhline(100 * TARGET, color="#7b8794", linestyle=":", linewidth=1)
    upper.set_ylabel("loss (nats per token), smoothed")
    lower.set_ylabel("difference to BF16 (%)")
    lower.set_xlabel("step")
    lower.set_yscale("log")
    upper.legend(frameon=False)
    lower.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="FP8 beside BF16 on the same data and seed.")
    parser.add_argument("--corpus", default="data_cache/demo", help="directory of a built corpus")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="also a BF16 run from another seed")
    parser.add_argument("--image", default="fp8_twin.png")
    parser.add_argument("overrides", nargs="*", help="key=value of the demo's configuration")
    given = parser.parse_args()
    if given.steps < 5 or given.length < 1 or given.tokens < 2 * given.length or given.tokens % (2 * given.length):
        parser.exit(64, "fp8_twin: at least 5 steps, and --tokens a multiple of twice --length\n")
    rest = given.corpus, given.steps, given.tokens, given.length, tuple(given.overrides)
    jobs = [Job("BF16", False, given.seed, *rest), Job("FP8", True, given.seed, *rest)]
    if given.control:
        jobs.append(Job("BF16, other seed", False, given.seed + 1, *rest))
    console = Console()
    try:
        found = run_together(jobs, console)
    except RunError as error:
        parser.exit(error.exit_code, f"fp8_twin: {error}\n")
    last = max(1, round(given.steps * LAST_SHARE))
    difference = relative_difference(found["FP8"], found["BF16"])
    mean = float(difference[-last:].mean())
    draw(found, Path(given.image))
    figures: dict[str, Any] = {
        "steps": given.steps,
        "tokens_per_step": given.tokens,
        "mean_relative_difference_last_fifth": mean,
        "largest_relative_difference": float(difference.max()),
        "target": TARGET,
        "within_target": mean < TARGET,
        "final_loss": {name: float(smooth(values)[-1]) for name, values in found.items()},
        "image": given.image,
    }
    if given.control:
        control = relative_difference(found["BF16, other seed"], found["BF16"])
        figures["control_other_seed"] = float(control[-last:].mean())
    console.print(f"mean difference over the last {last} steps: {100 * mean:.3f} % (target under {100 * TARGET:g} %)")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
