"""A training step of this model beside transformers' own, on the CPU: tokens per second and peak memory.

    python benchmarks/model_step.py [--steps 20] [--threads 2]

Forward, backward and `torch.optim.AdamW(fused=True)` of `conf/model/proxy_step.yaml`, 2,048 tokens a step in sequences
of 512, float32, main cross-entropy only, router biases fixed. Both sides start from one exported folder and see the
same batches.

- Ours: the chunk programs that training runs (`train.local`: one rank, one micro-batch), gradients in `.grad`; once as
  a run has them by default (`recompute`: RMSNorm, MLA's up-projections and SwiGLU are computed again in the backward),
  once with `precision.recompute=false` (`keep`), which is how transformers trains. `keep` is compared.
- transformers: `DeepseekV3ForCausalLM` with eager, grouped and batched experts under sdpa, and the grouped ones under
  eager attention. The fastest of a trial is compared. Batched experts copy a matrix for every row and layer; where that
  does not fit memory their trial is on a sixteenth of the tokens.

Each side is a process of its own, with the same number of threads, and steps in turn with the others; nothing else of
the benchmark runs meanwhile. Figures are medians over the timed steps. Peak memory is a process's largest resident set
from after loading to the end, less what it held before its model was built: weights, gradients, optimizer states,
activations and the allocator's waste. The share of matrix products is their own time in one step by torch.profiler.

Products take most of a step, so the ratio depends on how fast they are: `gflops_before` and `gflops_after` are the rate
of one product alone, with the same threads.

The last line is one JSON object. `tokens_per_s_ratio`: ours over theirs, at least 1.3; `peak_memory_ratio`: at most 1;
`largest_loss_difference` over all steps: at most 1e-4. Exit code 1 when one of them is missed; 69 when a side fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.model_sides import Build, Ours, Side, SideFailed, Stepped, Transformers, Work
from model.config import ModelConfig
from model.huggingface import export_model
from model.initialize import initialize
from model.names import canonical_tensors, moe_layers
from model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, LENGTH = 4, 512
SPEED_BOUND, MEMORY_BOUND, LOSS_BOUND = 1.3, 1.0, 1e-4
WARM_UP, TRIAL = 2, 3
KEEP, RECOMPUTE = "keep", "recompute"
BATCHED = "batched_mm experts, sdpa"
THEIRS = {
    "eager experts, sdpa": Transformers("eager", "sdpa"),
    "grouped_mm experts, sdpa": Transformers("grouped_mm", "sdpa"),
    "grouped_mm experts, eager attention": Transformers("grouped_mm", "eager"),
    BATCHED: Transformers("batched_mm", "sdpa"),
}


def model_config(changes: list[str]) -> ModelConfig:
    """`conf/model/proxy_step.yaml` with KEY=VALUE changes."""
    loaded = OmegaConf.load(ROOT / "conf" / "model" / "proxy_step.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), loaded, OmegaConf.from_dotlist(changes))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def export(folder: Path, config: ModelConfig, length: int) -> None:
    """Fresh weights in transformers' form."""
    model = Transformer(config)
    initialize(model, config, 0)
    export_model(folder, config, canonical_tensors(model).__getitem__, length=length, dtype=torch.float32)


def batched_bytes(work: Work) -> int:
    """What batched experts hold for the backward at least: three matrices for every row of every MoE layer."""
    c = work.config
    rows = work.sequences * work.length * c.experts_per_token
    return len(moe_layers(c)) * rows * 3 * c.hidden_size * c.moe_intermediate_size * 4


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def product_rate() -> float:
    """Gflop/s of one product of [2048, 512] and [512, 512] alone, the median of many: what the machine gives now."""
    a, b, out = torch.randn(2048, 512), torch.randn(512, 512), torch.empty(2048, 512)
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        taken.append(time.perf_counter() - started)
    return 2e-9 * 2048 * 512 * 512 / statistics.median(taken)


def trial(name: str, work: Work) -> dict[str, Any]:
    """Tokens per second of one of transformers' configurations, and of how many tokens a step."""
    if name == BATCHED and 2 * batched_bytes(work) > available_bytes():
        work = replace(work, sequences=1, length=max(1, work.sequences * work.length // 16))
    side = Side(THEIRS[name], work)
    try:
        side.step(0)
        wall = min(side.step(number).wall for number in range(1, TRIAL + 1))
    finally:
        side.close()
    tokens = work.sequences * work.length
    return {"name": name, "tokens": tokens, "tokens_per_s": round(tokens / wall, 1)}


def row(name: str, steps: list[Stepped], peak: int, share: float, tokens: int) -> dict[str, Any]:
    wall = statistics.median(step.wall for step in steps)
    return {
        "side": name,
        "seconds": round(wall, 4),
        "tokens_per_s": round(tokens / wall, 1),
        "processor_seconds": round(statistics.median(step.processor for step in steps), 4),
        "peak_bytes": peak,
        "product_share": round(share, 3),
    }


def measure(work: Work, steps: int, progress: Progress) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """(trials of transformers' configurations, a row for each side, largest difference of losses)."""
    bar = progress.add_task("trials", total=len(THEIRS))
    trials = []
    for name in THEIRS:
        progress.update(bar, description=f"trial: {name}")
        trials.append(trial(name, work))
        progress.advance(bar)
    fastest = max(trials, key=lambda found: found["tokens_per_s"])["name"]
    builds: dict[str, Build] = {KEEP: Ours(recompute=False), RECOMPUTE: Ours(recompute=True), fastest: THEIRS[fastest]}
    sides: dict[str, Side] = {}
    taken: dict[str, list[Stepped]] = {name: [] for name in builds}
    difference = 0.0
    progress.reset(bar, total=WARM_UP + steps, description="steps in turn")
    try:
        for name, build in builds.items():
            sides[name] = Side(build, work)
        for number in range(WARM_UP + steps):
            # Whoever goes first finds another cache: each in turn.
            order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
            found = {name: sides[name].step(number) for name in order}
            difference = max([difference, *(abs(found[name].loss - found[fastest].loss) for name in found)])
            if number >= WARM_UP:
                for name, stepped in found.items():
                    taken[name].append(stepped)
            progress.advance(bar)
        peaks = {name: side.peak_bytes() for name, side in sides.items()}
        shares = {name: side.product_share(WARM_UP + steps) for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    tokens = work.sequences * work.length
    return trials, [row(name, taken[name], peaks[name], shares[name], tokens) for name in builds], difference


def verdict(rows: list[dict[str, Any]], difference: float) -> tuple[dict[str, float], list[str]]:
    """The ratios of ours (kept and recomputed) to theirs, and what misses its bound."""
    kept, recomputed, theirs = rows

    def ratios(ours: dict[str, Any], suffix: str) -> dict[str, float]:
        return {
            f"tokens_per_s_ratio{suffix}": round(theirs["seconds"] / ours["seconds"], 4),
            f"processor_ratio{suffix}": round(theirs["processor_seconds"] / ours["processor_seconds"], 4),
            f"peak_memory_ratio{suffix}": round(ours["peak_bytes"] / theirs["peak_bytes"], 4),
        }

    merits = ratios(kept, "") | ratios(recomputed, "_recompute") | {"largest_loss_difference": difference}
    missed = []
    if merits["tokens_per_s_ratio"] < SPEED_BOUND:
        missed.append(f"tokens_per_s_ratio={merits['tokens_per_s_ratio']:.3f}: at least {SPEED_BOUND}")
    if merits["peak_memory_ratio"] >= MEMORY_BOUND:
        missed.append(f"peak_memory_ratio={merits['peak_memory_ratio']:.3f}: below {MEMORY_BOUND}")
    if not difference <= LOSS_BOUND:
        missed.append(f"largest_loss_difference={difference:.1e}: at most {LOSS_BOUND}")
    return merits, missed


def print_table(console: Console, trials: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    for found in trials:
        console.print(f"trial: transformers, {found['name']}: {found['tokens_per_s']:.0f} tokens/s", end="")
        console.print(f" ({found['tokens']} tokens a step)")
    grid = Table("side")
    for column in ("s / step", "tokens/s", "processor s", "peak MiB", "in products"):
        grid.add_column(column, justify="right")
    for each in rows:
        name = f"ours, {each['side']}" if each["side"] in (KEEP, RECOMPUTE) else f"transformers, {each['side']}"
        numbers = (f"{each['seconds']:.3f}", f"{each['tokens_per_s']:.0f}", f"{each['processor_seconds']:.3f}")
        grid.add_row(name, *numbers, f"{each['peak_bytes'] / 2**20:.0f}", f"{each['product_share']:.1%}")
    console.print(grid)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A training step of this model beside transformers' own.")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each side")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="changes to conf/model/proxy_step")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.threads, arguments.sequences) < 1 or arguments.length < 2:
        parser.exit(
            64, "model_step: --steps, --threads and --sequences must be at least 1, --length at least 2 (labels)\n"
        )
    console = Console()
    load = os.getloadavg()[0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="bireme_model_step_") as folder,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        torch.set_num_threads(arguments.threads)
        rate = product_rate()
        config = model_config(arguments.model)
        work = Work(Path(folder) / "model", config, arguments.sequences, arguments.length, arguments.threads)
        export(work.folder, config, arguments.length)
        try:
            trials, rows, difference = measure(work, arguments.steps, progress)
        except SideFailed as error:
            progress.stop()
            print(f"model_step: {error}", file=sys.stderr)
            return 69
    print_table(console, trials, rows)
    merits, missed = verdict(rows, difference)
    for line in missed:
        console.print(f"missed: {line}")
    conditions = {
        "steps": arguments.steps,
        "threads": arguments.threads,
        "tokens_per_step": arguments.sequences * arguments.length,
        "gflops_before": round(rate, 1),
        "gflops_after": round(product_rate(), 1),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({**merits, **conditions, "rows": rows, "trials": trials}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
