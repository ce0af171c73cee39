"""`python -m train.evaluate RUN_DIR`: held-out bits per byte of every stage's end, by language and context length.

A language's held-out documents stand one after another; windows of the context length cover them, so that every token
is predicted once from within its window. Costs count the documents' own tokens, not BOS and EOS. Beside it the
control in which each token sees only the one before it, and the simple models of `data.baselines`. Weights are the
FP32 masters. The last line is one JSON object.

Shape letters: W windows, T context length, N tokens.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.baselines import baselines, heldout_languages, heldout_tokens
from model.rope import Rotary
from model.transformer import IGNORE, Transformer
from train.command import CommandParser, run_command
from train.metrics import write_text_atomically
from train.reading import load_model, read_config, stage_ends

# A few MB of logits: larger temporaries cost more in page faults than they save in calls.
TOKENS_AT_ONCE = 1024


def windows(tokens_N: np.ndarray, content_N: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [W, T]: position i of a window predicts the token after it; padding and non-content are
    IGNORE."""
    inputs, labels = tokens_N[:-1], np.where(content_N[1:], tokens_N[1:], IGNORE)
    rest = -len(inputs) % context
    padded = np.pad(inputs, (0, rest)), np.pad(labels, (0, rest), constant_values=IGNORE)
    first, second = (torch.from_numpy(part.reshape(-1, context)) for part in padded)
    return first, second


@torch.no_grad()
def total_bits(model: Transformer, rotary: Rotary, tokens_N: np.ndarray, content_N: np.ndarray, context: int) -> float:
    """Sum of -log2 P over the content tokens, each seeing at most `context` tokens of its window."""
    inputs_WT, labels_WT = windows(tokens_N, content_N, context)
    rows, total = max(1, TOKENS_AT_ONCE // context), 0.0
    for first in range(0, len(inputs_WT), rows):
        logits = model(inputs_WT[first : first + rows], rotary=rotary).logits_BTV.flatten(0, 1)
        labels = labels_WT[first : first + rows].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        total += loss.double().item()
    return total / math.log(2)


def evaluate(run: Path, console: Console) -> dict[str, Any]:
    """Rows and baselines as in `evaluation.json`."""
    config = read_config(run)
    directory = Path(config.data.directory)
    heldout = {language: heldout_tokens(directory, language) for language in heldout_languages(directory)}
    ends = stage_ends(run, config)
    lengths = [stage.length for stage in config.stages]
    jobs = []
    for end in ends:
        last = end is ends[-1]
        for context in lengths if last else [end.length]:
            jobs += [(end, language, context) for language in heldout]
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("evaluating", total=len(jobs))
        loaded: tuple[str, Transformer, Rotary] | None = None
        blind: dict[tuple[str, str], float] = {}
        for end, language, context in jobs:
            if loaded is None or loaded[0] != end.name:
                loaded = (end.name, *load_model(end, config))
            tokens_N, content_N, size = heldout[language]
            bits = total_bits(loaded[1], loaded[2], tokens_N, content_N, context)
            if (end.name, language) not in blind:
                blind[end.name, language] = total_bits(loaded[1], loaded[2], tokens_N, content_N, 1)
            rows.append(
                {
                    "checkpoint": end.path.name,
                    "label": "before" if end.name == "initial" else end.name,
                    "language": language,
                    "context": context,
                    "bits_per_byte": bits / size,
                    "one_token_bits_per_byte": blind[end.name, language] / size,
                }
            )
            progress.advance(task)
    return {"rows": rows, "baselines": baselines(directory)}


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="held-out bits per byte")
    for column in ("model", "language", "context", "bits per byte", "with one token of context"):
        table.add_column(column, justify="left" if column in ("model", "language") else "right")
    for row in result["rows"]:
        figures = f"{row['bits_per_byte']:.3f}", f"{row['one_token_bits_per_byte']:.3f}"
        table.add_row(row["label"], row["language"], str(row["context"]), *figures)
    table.add_section()
    for language, figures_of in result["baselines"].items():
        for name in ("zlib", "token_unigram", "token_bigram", "character_bigram"):
            table.add_row(name.replace("_", " "), language, "", f"{figures_of[name]:.3f}", "")
    return table


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="python -m train.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, such as runs/demo")
    given = parser.parse_args(arguments)
    console = Console()

    def action() -> None:
        result = evaluate(given.run, console)
        write_text_atomically(given.run / "evaluation.json", json.dumps(result, indent=1) + "\n")
        console.print(_table(result))
        print(json.dumps({"command": "evaluate", **result}))

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
