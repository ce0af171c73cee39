"""`python -m train.generate PLACE --prompt TEXT [--speculative]`: continue a prompt with an exported model or with a
run's newest stage.

Speculative decoding gives the same text (at temperature 0) in fewer forwards of the main model, and says how many of
the MTP depths' drafts were accepted. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from data.tokenizer import BOS_ID, EOS_ID, decode, encode, load_tokenizer
from model.generate import FORMS, generate
from model.huggingface import ReleasedFolder
from model.names import load_canonical
from model.rope import Rotary
from model.speculate import DraftCounts, speculate
from model.transformer import Transformer
from train.command import CommandParser, run_command
from train.errors import ConfigError
from train.reading import is_file, load_model, read_config, stage_ends


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Transformer, Rotary]:
    """Model and rotary embedding of an exported folder."""
    if not is_file(folder / "config.json"):
        raise ConfigError(f"{folder}: not an exported model, it has no config.json")
    released = ReleasedFolder(folder)
    model = Transformer(released.config, dtype, device="meta").to_empty(device="cpu")
    load_canonical(model, released.read)
    return model.eval(), Rotary(released.config, released.length)


def load_place(place: Path) -> tuple[Transformer, Rotary, Tokenizer]:
    """Model (float32), rotary embedding and tokenizer of an exported folder, or of a run directory's newest stage."""
    if is_file(place / "config.json"):
        return *load_folder(place, torch.float32), load_tokenizer(place)
    if not is_file(place / "config.yaml"):
        raise ConfigError(f"{place}: neither an exported model (config.json) nor a run directory (config.yaml)")
    config = read_config(place)
    return *load_model(stage_ends(place, config)[-1], config), load_tokenizer(Path(config.data.directory))


def continue_prompt(
    place: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    form: str | None = None,
    speculative: bool = False,
    depths: int | None = None,
) -> dict[str, Any]:
    """The continuation and what it cost. temperature 0: the likeliest token each time. form, depths: as in
    `model.generate` and `model.speculate`.
    """
    model, rotary, tokenizer = load_place(place)
    (content,) = encode(tokenizer, [prompt])
    text = [BOS_ID, *content.tolist()]
    shared: dict[str, Any] = {
        "rotary": rotary,
        "max_new_tokens": tokens,
        "temperature": temperature,
        "stop_ids": (EOS_ID,),
        "vocabulary": tokenizer.get_vocab_size(),
        "generator": torch.Generator().manual_seed(seed),
        "form": form,
    }
    counts = DraftCounts()
    start = time.perf_counter()
    if speculative:
        made = list(speculate(model, text, depths=depths, counts=counts, **shared))
    else:
        made = list(generate(model, text, **shared))
        counts.forwards = counts.tokens = len(made)
    seconds = time.perf_counter() - start
    result = {
        "continuation": decode(tokenizer, made),
        "tokens": len(made),
        "main_forwards": counts.forwards,
        "forwards_per_token": counts.forwards_per_token,
        "tokens_per_s": len(made) / seconds,
    }
    if speculative:
        result |= {
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "acceptance_rate": counts.acceptance_rate,
        }
    return result


def describe(result: dict[str, Any]) -> str:
    """What a continuation cost, in one line."""
    line = (
        f"{result['tokens']} tokens in {result['main_forwards']} forwards "
        f"({result['forwards_per_token']:.2f} per token), {result['tokens_per_s']:.1f} tokens/s"
    )
    if "drafted" not in result:
        return line
    by_depth = ", ".join(
        f"depth {depth}: {accepted} of {drafted}"
        for depth, (accepted, drafted) in enumerate(zip(result["accepted"], result["drafted"]), 1)
    )
    return f"{line}; {result['acceptance_rate']:.1%} of drafts accepted ({by_depth})"


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="python -m train.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("place", type=Path, help="an exported folder or a run directory, such as runs/demo")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=FORMS, help="how MLA reads its cache (default: the cheaper)")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP depths")
    parser.add_argument("--depths", type=int, help="with --speculative: how many MTP depths draft (default: all)")
    given = parser.parse_args(arguments)
    if given.tokens < 1 or given.temperature < 0:
        parser.error("--tokens must be at least 1 and --temperature at least 0")
    if not 0 <= given.seed < 2**63:
        parser.error(f"--seed: found {given.seed}, must be at least 0 and below 2^63")
    if given.depths is not None and not given.speculative:
        parser.error("--depths goes with --speculative")

    def action() -> None:
        g = given
        result = continue_prompt(g.place, g.prompt, g.tokens, g.temperature, g.seed, g.form, g.speculative, g.depths)
        print(f"{g.prompt}|{result['continuation']}")
        print(describe(result))
        print(json.dumps({"command": "generate", "prompt": g.prompt, **result}, ensure_ascii=False))

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
