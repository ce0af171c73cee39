"""FP8 beside BF16 over a training: does the recipe cost loss, and could this study tell?

    python benchmarks/fp8_study.py --out DIR [--start 600] [--steps 1000] [--seeds 3] [--tokens 256] [--jobs 2]
    python benchmarks/fp8_study.py --out DIR --report          # starts nothing: judges the runs that are finished

Trains `conf/model/study.yaml` in four variants and several seeds. A seed chooses weights and data order, the same for
all variants. They go on from a common start in BF16: over the first steps of fresh weights the losses of two runs
part by chance by more than the variants do. bf16; fp8, the recipe; e4m1, a control: the recipe with operands of one
mantissa bit; per_tensor, E4M3 with one scale per tensor (benchmarks/fp8_variants.py). Losses are smoothed as in
DeepSeek-V3's figure 10 (moving average, decay 0.9); the figure of merit is (variant - BF16) / BF16 averaged over the
last fifth of the steps, by seed.

- The recipe's mean over seeds is to lie within 0.25 %.
- The control separates when its mean and the recipe's are further apart than twice the standard deviation over seeds,
  pooled over both. If it does not, the study is without power and says so.

Losses are written to DIR as they come. The same command again continues with the runs that are not finished. Exit
code 1: without power, or the target missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fp8_figures import BASE, CONTROL, RECIPE, TARGET, Losses, Verdict, draw, judge, last_mean, smooth
from benchmarks.fp8_run import START, VARIANTS, Finished, Run, load, save
from data.errors import DataError
from train.command import CommandParser
from train.errors import AgreedError, CannotWriteError, ConfigError, RunError

JUDGED = {BASE, RECIPE, CONTROL}


def work(run: Run, folder: Path, out: Connection) -> None:
    """One run on one thread: sends each loss, then None; or what is wrong and its exit code."""
    torch.set_num_threads(1)
    try:
        for loss in save(run, folder):
            out.send(loss)
        out.send(None)
    except (DataError, RunError) as error:
        out.send((str(error), error.exit_code))


class Workers:
    """At most `jobs` runs at a time, in order, each in a process of its own."""

    def __init__(self, runs: list[Run], folder: Path, jobs: int) -> None:
        self._waiting, self._folder, self._jobs = list(runs), folder, jobs
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Connection, tuple[Run, BaseProcess]] = {}

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._jobs:
            run = self._waiting.pop(0)
            receiving, sending = self._context.Pipe(duplex=False)
            process = self._context.Process(target=work, args=(run, self._folder, sending), daemon=True)
            process.start()
            sending.close()
            self._running[receiving] = run, process

    def losses(self) -> Iterator[tuple[Run, float | None]]:
        """(run, loss) as they come, None for its end. Raises AgreedError with the line of the first run that fails."""
        self._fill()
        while self._running:
            for connection in wait(list(self._running)):
                assert isinstance(connection, Connection)
                run, process = self._running[connection]
                try:
                    got = connection.recv()
                except EOFError:
                    raise RunError(f"{run.name}: the process ended without a word") from None
                if isinstance(got, tuple):
                    raise AgreedError(f"{run.name}: {got[0]}", got[1])
                if got is None:
                    process.join()
                    del self._running[connection]
                    self._fill()
                yield run, got

    def stop(self) -> None:
        for _, process in self._running.values():
            process.terminate()


def carry_out(runs: list[Run], folder: Path, jobs: int, console: Console) -> None:
    """Train what is to be trained. Off a terminal a run's loss is printed ten times instead of a moving bar."""
    workers, steps = Workers(runs, folder, jobs), dict.fromkeys(runs, 0)
    with bars(runs, console) as progress:
        tasks = {run: progress.add_task(run.name, total=run.steps, loss="-") for run in runs}
        try:
            for run, loss in workers.losses():
                if loss is None:
                    continue
                steps[run] += 1
                progress.update(tasks[run], advance=1, loss=f"{loss:.3f}")
                if not console.is_terminal and steps[run] % max(1, run.steps // 10) == 0:
                    console.print(f"{run.name}: step {steps[run]}, loss {loss:.4f}")
        finally:
            workers.stop()


@contextmanager
def bars(runs: list[Run], console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield progress


def by_variant(found: dict[Run, Finished]) -> Losses:
    """Losses of the seeds that BF16, the recipe and the control have finished."""
    seeds = sorted({run.seed for run in found})
    whole = [seed for seed in seeds if JUDGED <= {run.variant for run in found if run.seed == seed}]
    losses: dict[str, dict[int, list[float]]] = {variant: {} for variant in VARIANTS}
    for run, finished in found.items():
        if run.seed in whole:
            losses[run.variant][run.seed] = finished.losses
    return {variant: by_seed for variant, by_seed in losses.items() if by_seed}


def table(losses: Losses, verdict: Verdict) -> Table:
    out = Table("variant", "loss at the end", *(f"seed {seed} (%)" for seed in losses[BASE]), "mean (%)", "spread (%)")
    for variant, runs in losses.items():
        final = sum(last_mean(smooth(values)) for values in runs.values()) / len(runs)
        row = [variant, f"{final:.4f}"]
        if variant != BASE:
            found = verdict.differences[variant]
            row += [f"{100 * found[seed]:+.3f}" if seed in found else "" for seed in losses[BASE]]
            row += [f"{100 * verdict.mean[variant]:+.3f}", f"{100 * verdict.spread[variant]:.3f}"]
        out.add_row(*row)
    return out


def summary(found: dict[Run, Finished], losses: Losses, verdict: Verdict, given: argparse.Namespace) -> dict[str, Any]:
    runs = list(found.values())

    def mean_loss(variant: str) -> float:
        return sum(last_mean(smooth(values)) for values in losses[variant].values()) / len(losses[variant])

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "start_steps": given.start,
        "steps": given.steps,
        "tokens_per_step": given.tokens,
        "distinct_sequences": given.distinct,
        "seeds": list(losses[BASE]),
        "relative_difference": {k: {str(s): v for s, v in d.items()} for k, d in verdict.differences.items()},
        "mean": verdict.mean,
        "seed_spread": {variant: number(value) for variant, value in verdict.spread.items()},
        "control_minus_recipe": verdict.distance,
        "pooled_spread": number(verdict.pooled),
        "control_separates": verdict.separates,
        "target": TARGET,
        "within_target": verdict.within_target,
        "loss_last_fifth": {variant: mean_loss(variant) for variant in losses},
        "unigram_entropy": sum(run.unigram for run in runs) / len(runs),
        "seconds_per_step": {
            variant: sum(f.seconds for r, f in found.items() if r.variant == variant) / len(losses[variant])
            for variant in losses
        },
        "missed": verdict.missed(),
    }


def study(given: argparse.Namespace, console: Console) -> int:
    """Exit code. Raises RunError, DataError."""
    folder, settings, seeds = Path(given.out), tuple(given.overrides), range(1, given.seeds + 1)

    def run(variant: str, seed: int, steps: int, rate: float, start: int) -> Run:
        return Run(
            variant, seed, given.corpus, steps, given.tokens, given.length, rate, start, given.distinct, settings
        )

    starts = [run(START, seed, given.start, given.start_rate, 0) for seed in seeds if given.start]
    # What the verdict needs comes first.
    order = sorted(((seed, v) for seed in seeds for v in VARIANTS), key=lambda pair: pair[1] not in JUDGED)
    runs = [run(v, seed, given.steps, given.rate, given.start) for seed, v in order]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}") from None
    unfinished = [[run for run in group if load(run, folder) is None] for group in (starts, runs)]
    for group in unfinished if not given.report else []:
        carry_out(group, folder, given.jobs, console)
    found = {run: finished for run in runs if (finished := load(run, folder)) is not None}
    losses = by_variant(found)
    if BASE not in losses:
        raise ConfigError(f"{folder}: no seed has all of {', '.join(sorted(JUDGED))} finished; run it without --report")
    found = {run: finished for run, finished in found.items() if run.seed in losses[BASE]}
    verdict = judge(losses)
    draw(losses, given.tokens, Path(given.image))
    console.print(table(losses, verdict))
    for line in verdict.missed():
        console.print(line)
    print(json.dumps(summary(found, losses, verdict, given)))
    return 1 if verdict.missed() else 0


def refused(given: argparse.Namespace) -> str | None:
    """The first number that cannot be meant."""
    for key in ("steps", "length", "tokens", "seeds", "jobs"):
        if getattr(given, key) < 1:
            return f"--{key}: found {getattr(given, key)}, allowed 1 or more"
    if given.start < 0:
        return f"--start: found {given.start}, allowed 0 or more"
    if given.distinct < 0 or given.distinct % max(1, given.tokens // given.length):
        sequences = max(1, given.tokens // given.length)
        return f"--distinct: found {given.distinct}, allowed 0 and multiples of a step's {sequences} sequences"
    if given.tokens % given.length:
        return f"--tokens: found {given.tokens}, allowed multiples of --length {given.length}"
    for key in ("rate", "start_rate"):
        if not 0 <= getattr(given, key) < math.inf:
            return f"--{key.replace('_', '-')}: found {getattr(given, key)}, allowed 0 or more"
    return None


def main() -> None:
    parser = CommandParser(description="Loss of FP8 training beside BF16, with a positive control.")
    parser.add_argument("--out", required=True, help="directory of the losses; finished runs in it are kept")
    parser.add_argument("--corpus", default="data_cache/demo", help="directory of a built corpus")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--start", type=int, default=600, help="steps in BF16 that all variants of a seed go on from")
    parser.add_argument("--start-rate", type=float, default=1e-3, help="learning rate of these")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--distinct", type=int, default=0, help="sequences read before they come again; 0: no limit")
    parser.add_argument("--rate", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing; judge the finished runs")
    parser.add_argument("--image", default="fp8_study.png")
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    given = parser.parse_args()
    if problem := refused(given):
        parser.exit(64, f"fp8_study: {problem}\n")
    try:
        code = study(given, Console())
    except (DataError, RunError) as error:
        parser.exit(error.exit_code, f"fp8_study: {error}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
