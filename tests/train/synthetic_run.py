"""A run directory as the trainer leaves it, healthy or broken in chosen ways; `python tests/train/synthetic_run.py DIR`
makes one to look at."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

from parallel.schedule.drawing import bars_of
from parallel.schedule.registry import build
from parallel.schedule.simulator import simulate
from train.history import JsonLinesSink
from train.metrics import write_status

STAGES = (("pretrain", 128, 300), ("extend_8x", 1024, 40), ("extend_32x", 4096, 20))
TOKENS_PER_STEP = 8192
EXPERTS, LAYERS = 8, (1, 2, 3)


def write_run(
    directory: Path,
    *,
    seed: int = 0,
    diverges: bool = False,
    dead: bool = False,
    skips: int = 0,
    evaluated: bool = True,
    state: str = "done",
) -> Path:
    draw = random.Random(seed)
    sink = JsonLinesSink(directory)
    sink.event("started", {"step": 0})
    sink.event("stage", {"name": "pretrain"})
    bias = [draw.gauss(0, 0.5) for _ in range(EXPERTS)]
    step, tokens = 0, 0
    total = sum(steps for *_, steps in STAGES)
    for index, (_, _, steps) in enumerate(STAGES):
        for _ in range(steps):
            step, tokens = step + 1, tokens + TOKENS_PER_STEP - draw.randrange(64)
            fall = 3.4 * math.exp(-step / 45) + 1.6 * math.exp(-step / 300)
            base = 3.6 + fall - 0.1 * index + draw.gauss(0, 0.05)
            if diverges and step > 200:
                base += 0.02 * (step - 200)
            late = min(1.0, step / 60)
            values = {
                "train/stage": index,
                "train/loss": base,
                "train/loss_mtp": base + 0.9 + draw.gauss(0, 0.05),
                "train/loss/en": base - 0.35 + draw.gauss(0, 0.06),
                "train/loss/zh": base + 0.45 + draw.gauss(0, 0.06),
                "optim/lr": 2e-3 * min(1, step / 40) * (0.55 + 0.45 * math.cos(math.pi * step / total)),
                "optim/grad_norm": (0.6 + 3 * math.exp(-step / 30)) * math.exp(draw.gauss(0, 0.15)),
                "optim/skipped": min(max(0, step - 150), skips),
                "moe/max_vio": 1.5 * math.exp(-step / 60) + 0.25 + abs(draw.gauss(0, 0.06)),
                "perf/tokens_per_s": (5200, 4600, 3900)[index] * (1 + draw.gauss(0, 0.03)),
            }
            sink.log(step, tokens, values)
            if step % 5 == 0:
                loads = {}
                for layer in LAYERS:
                    row = [
                        1024 * max(0.0, 1 + (1 - late) * bias[(e + layer) % EXPERTS] + draw.gauss(0, 0.08))
                        for e in range(EXPERTS)
                    ]
                    if dead and layer == 2:
                        row[5] *= max(0.0, 1 - step / 120)
                    loads[layer] = [round(value) for value in row]
                sink.expert_load(step, loads)
    sink.close(0)
    write_status(directory, state, step=step, tokens=tokens)
    counts = {"documents_read": 591, "exact_duplicates": 2, "near_duplicates": 7, "heldout_documents": 24,
              "documents": 558, "tokens": 429565, "bytes_per_token": 4.027}  # fmt: skip
    corpus = directory / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "report.json").write_text(json.dumps({"languages": {"en": counts, "zh": {**counts, "tokens": 446195}}}))
    (directory / "config.yaml").write_text(
        f"name: demo\nseed: 1234\ndata: {{directory: {corpus}}}\n"
        "model: {name: demo, num_layers: 4, hidden_size: 256, num_routed_experts: 8, "
        "experts_per_token: 2, vocab_size: 8192}\nparallel: {pipeline: 2, expert: 2, schedule: dualpipe}\n"
        "precision: {compute: bfloat16, fp8: true}\nstages: [{name: pretrain}, {name: extend_8x}, {name: extend_32x}]\n"
    )
    if evaluated:
        write_evaluation(directory, worse=1.5 if diverges else 1.0)
    write_timeline(directory, draw)
    return directory


def write_evaluation(directory: Path, worse: float) -> None:
    rows = []
    for language, level, one in (("en", 1.80, 1.98), ("zh", 2.52, 2.70)):
        rows.append(["step-0", "before", language, 128, 2.09 * level, 2.09 * level])
        rows.append(["step-300", "pretrain", language, 128, worse * level, worse * one])
        rows += [["step-340", "extend_8x", language, c, worse * level * k, worse * one]
                 for c, k in ((128, 0.985), (1024, 0.962))]  # fmt: skip
        rows += [["step-360", "extend_32x", language, c, worse * level * k, worse * one]
                 for c, k in ((128, 0.98), (1024, 0.955), (4096, 0.951))]  # fmt: skip
    names = ("checkpoint", "label", "language", "context", "bits_per_byte", "one_token_bits_per_byte")
    baselines = {
        "en": {"zlib": 2.42, "token_unigram": 2.15, "token_bigram": 1.62, "character_bigram": 2.61},
        "zh": {"zlib": 3.71, "token_unigram": 2.76, "token_bigram": 2.42, "character_bigram": 2.66},
    }
    (directory / "evaluation.json").write_text(
        json.dumps({"rows": [dict(zip(names, row, strict=True)) for row in rows], "baselines": baselines})
    )


def write_timeline(directory: Path, draw: random.Random) -> None:
    """A DualPipe table of two ranks, simulated, and the same with every action taking a little longer or shorter."""
    scheduled = [
        {"rank": b.rank, "op": str(b.op), "direction": b.direction, "chunk": b.chunk, "stage": 0,
         "start": b.start * 0.021, "end": b.end * 0.021}
        for b in bars_of(simulate(build("dualpipe", 2, 8)))
    ]  # fmt: skip
    measured, clock, seen = [], {}, {}
    for bar in scheduled:
        key = (bar["rank"], bar["start"], bar["end"])
        if key not in seen:
            length = (bar["end"] - bar["start"]) * draw.uniform(0.85, 1.25)
            start = max(clock.get(bar["rank"], 0.0), bar["start"] * 1.04)
            seen[key] = (start, start + length)
            clock[bar["rank"]] = start + length
        measured.append({**bar, "start": 100.0 + seen[key][0], "end": 100.0 + seen[key][1]})
    (directory / "timeline.json").write_text(json.dumps({"scheduled": scheduled, "measured": measured}))


if __name__ == "__main__":
    flags = dict.fromkeys(sys.argv[2:], True)
    write_run(Path(sys.argv[1]), **flags)  # type: ignore[arg-type]
