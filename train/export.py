"""`python -m train.export RUN_DIR [--out FOLDER] [--stage NAME] [--dtype bfloat16]`: a Hugging Face folder that
`transformers` opens.

The newest stage's end is exported, with YaRN in its config only if that stage trained with it. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
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


def export(run: Path, out: Path, stage: str | None, dtype: torch.dtype) -> dict[str, object]:
    """Write the folder; what was exported, for people and scripts."""
    config = read_config(run)
    ends = stage_ends(run, config)
    names = [end.name for end in ends]
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage: found '{stage}', this run holds {', '.join(names)}")
    end = ends[names.index(stage)] if stage else ends[-1]
    reader = CheckpointReader(end.path, config)
    directory = Path(config.data.directory)
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    export_model(out, config.model, reader, length=end.length, dtype=dtype, tokenizer_files=files)
    return {"stage": end.name, "checkpoint": str(end.path), "length": end.length, "folder": str(out)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, such as runs/demo")
    parser.add_argument("--out", type=Path, help="folder to make (default: RUN_DIR/export)")
    parser.add_argument("--stage", help="whose end to export (default: the last one)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    given = parser.parse_args(arguments)
    try:
        done = export(given.run, given.out or given.run / "export", given.stage, dtype_of(given.dtype))
    except (RunError, DataError, CheckpointError) as error:
        print(f"bireme: {error}", file=sys.stderr)
        return error.exit_code
    print(f"exported the end of stage {done['stage']} to {done['folder']}")
    print(json.dumps({"command": "export", **done}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
