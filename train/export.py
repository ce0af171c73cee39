"""`python -m train.export RUN_DIR [--out FOLDER] [--stage NAME] [--dtype bfloat16]`: a Hugging Face folder that
`transformers` opens.

The newest stage's end is exported, with YaRN in its config only if that stage trained with it. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from data.errors import DataError
from model.huggingface import export_model
from parallel.optimizer.config import DTYPES, dtype_of
from train.checkpoint import CheckpointError
from train.errors import ConfigError, RunError
from train.reading import CheckpointReader, read_config, stage_ends

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(run: Path, out: Path, stage: str | None, dtype: torch.dtype, replace: bool) -> dict[str, object]:
    """Write the folder; what was exported, for people and scripts."""
    config = read_config(run)
    ends = stage_ends(run, config)
    names = [end.name for end in ends]
    if replace and (out / "config.json").is_file():
        shutil.rmtree(out)
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage: found '{stage}', this run holds {', '.join(names)}")
    end = ends[names.index(stage)] if stage else ends[-1]
    reader = CheckpointReader(end.path, config)
    directory = Path(config.data.directory)
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    export_model(out, config.model, reader, length=end.length, dtype=dtype, tokenizer_files=files)
    return {"stage": end.name, "checkpoint": str(end.path), "length": end.length, "folder": str(out)}


@torch.no_grad()
def logit_difference(folder: Path, tokens: int = 256) -> float:
    """Largest absolute difference between Bireme's logits and those of `transformers` for the folder, in float32."""
    from transformers import AutoModelForCausalLM, logging

    from train.generate import load_folder

    # It would report the MTP layer's tensors as unexpected: it keeps them aside, as it does with the released weights.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, rotary, _ = load_folder(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    text = torch.randint(0, model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    ours = model(text, rotary=rotary).logits_BTV
    return float((ours - theirs(text).logits).abs().max())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, such as runs/demo")
    parser.add_argument("--out", type=Path, help="folder to make (default: RUN_DIR/export)")
    parser.add_argument("--stage", help="whose end to export (default: the last one)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--replace", action="store_true", help="remove an earlier export of that name first")
    parser.add_argument("--check", action="store_true", help="open it with transformers and compare logits in float32")
    given = parser.parse_args(arguments)
    try:
        done = export(given.run, given.out or given.run / "export", given.stage, dtype_of(given.dtype), given.replace)
    except (RunError, DataError, CheckpointError) as error:
        print(f"bireme: {error}", file=sys.stderr)
        return error.exit_code
    if given.check:
        done["logit_difference"] = logit_difference(Path(str(done["folder"])))
        print(f"largest logit difference to transformers: {done['logit_difference']:.1e}")
    print(f"exported the end of stage {done['stage']} to {done['folder']}")
    print(json.dumps({"command": "export", **done}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
