"""`python -m train.generate FOLDER --prompt TEXT`: continue a prompt with an exported model. The last line is one
JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from data.tokenizer import BOS_ID, EOS_ID, decode, encode, load_tokenizer
from model.generate import generate
from model.huggingface import ReleasedFolder
from model.names import load_canonical
from model.rope import Rotary
from model.transformer import Transformer
from train.command import CommandParser, run_command
from train.errors import ConfigError


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Transformer, Rotary]:
    """Model and rotary embedding of an exported folder."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: not an exported model, it has no config.json")
    released = ReleasedFolder(folder)
    model = Transformer(released.config, dtype, device="meta").to_empty(device="cpu")
    load_canonical(model, released.read)
    return model.eval(), Rotary(released.config, released.length)


def continue_prompt(folder: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The continuation's text. temperature 0: the likeliest token each time."""
    model, rotary = load_folder(folder, torch.float32)
    tokenizer = load_tokenizer(folder)
    (content,) = encode(tokenizer, [prompt])
    generator = torch.Generator().manual_seed(seed)
    made = generate(
        model,
        [BOS_ID, *content.tolist()],
        rotary=rotary,
        max_new_tokens=tokens,
        temperature=temperature,
        stop_ids=(EOS_ID,),
        vocabulary=tokenizer.get_vocab_size(),
        generator=generator,
    )
    return decode(tokenizer, list(made))


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="python -m train.generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="an exported folder, such as runs/demo/export")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.tokens < 1 or given.temperature < 0:
        parser.error("--tokens must be at least 1 and --temperature at least 0")

    def action() -> None:
        text = continue_prompt(given.folder, given.prompt, given.tokens, given.temperature, given.seed)
        print(f"{given.prompt}|{text}")
        print(json.dumps({"command": "generate", "prompt": given.prompt, "continuation": text}, ensure_ascii=False))

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
