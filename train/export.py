"""`python -m train.export RUN_DIR [--out FOLDER] [--stage NAME] [--dtype bfloat16|fp8|...]`: a Hugging Face folder that
`transformers` opens.

The newest stage's end is exported, with YaRN in its config only if that stage trained with it. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from model.huggingface import DTYPES, export_model, tokenizer_files_of
from model.released_family import FAMILIES, MOE
from train.command import CommandParser, run_command
from train.errors import ConfigError, NumericError
from train.reading import CheckpointReader, read_config, stage_ends

LARGEST_DIFFERENCE = 1e-4  # of float32 logits


def export(run: Path, out: Path, stage: str | None, dtype: torch.dtype, replace: bool) -> dict[str, object]:
    """Write the folder; what was exported, for people and scripts. `replace`: an earlier export there makes way, once
    the new one is complete."""
    config = read_config(run)
    ends = stage_ends(run, config)
    names = [end.name for end in ends]
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage: found '{stage}', this run holds {', '.join(names)}")
    end = ends[names.index(stage)] if stage else ends[-1]
    reader = CheckpointReader(end.path, config)
    files = tokenizer_files_of(Path(config.data.directory))
    earlier = replace and out.exists()
    if earlier and not _is_export(out):
        raise ConfigError(f"--replace: {out} is not an exported model; it stays as it is")
    target = out.with_name(f"{out.name}.new") if earlier else out
    export_model(target, config.model, reader, length=end.length, dtype=dtype, tokenizer_files=files)
    if earlier:
        shutil.rmtree(out)
        target.rename(out)
    return {"stage": end.name, "checkpoint": str(end.path), "length": end.length, "folder": str(out)}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what `export` writes."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return values.get("model_type") in FAMILIES and any(folder.glob("model*.safetensors*"))


@torch.no_grad()
def logit_difference(folder: Path, tokens: int = 256) -> float:
    """Largest absolute difference between Bireme's logits and those of `transformers` for the folder, in float32.
    ConfigError: transformers has no class for DeepSeekMoE's."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind == MOE.model_type:
        raise ConfigError(f"--check: transformers has no class for model_type '{kind}'; {folder} is complete")
    from transformers import AutoModelForCausalLM, logging

    from train.generate import load_folder

    # It would report the MTP layer's tensors as unexpected: it keeps them aside, as it does with the released weights.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, rotary = load_folder(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    text = torch.randint(0, model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    ours = model(text, rotary=rotary).logits_BTV
    return float((ours - theirs(text).logits).abs().max())


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="python -m train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, such as runs/demo")
    parser.add_argument("--out", type=Path, help="folder to make (default: RUN_DIR/export)")
    parser.add_argument("--stage", help="whose end to export (default: the last one)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--replace", action="store_true", help="remove an earlier export of that name first")
    parser.add_argument("--check", action="store_true", help="open it with transformers and compare logits in float32")
    given = parser.parse_args(arguments)
    if given.check and given.dtype == "fp8":
        # It takes a block's side for rows / blocks of the rows: wrong for a width that 128 does not divide.
        parser.error("--check: transformers cannot read every fp8 folder on a CPU; check another --dtype")

    def action() -> None:
        done = export(given.run, given.out or given.run / "export", given.stage, DTYPES[given.dtype], given.replace)
        print(f"exported the end of stage {done['stage']} to {done['folder']}")
        if given.check:
            difference = logit_difference(Path(str(done["folder"])))
            print(f"largest logit difference to transformers: {difference:.1e}")
            if not difference < LARGEST_DIFFERENCE:
                raise NumericError(f"--check: logits differ by {difference:.1e}, allowed {LARGEST_DIFFERENCE:.0e}")
            done["logit_difference"] = difference
        print(json.dumps({"command": "export", **done}))

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
