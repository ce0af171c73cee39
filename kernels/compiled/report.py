"""`python -m kernels gates`: compiles every kernel variant for sm_90a, reads the machine code and prints the table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kernels.compiled.build import BuildError, require_compiler, triton_version
from kernels.compiled.expected import EXPECTED, Stream
from kernels.compiled.gates import (
    Report,
    check,
    held_against,
    issue_clocks,
    memory_clocks,
    variant_modules,
    variants_of,
)
from kernels.compiled.properties import Properties, source_digest, write_properties, write_text

EXIT_FAILED, EXIT_USAGE, EXIT_CANNOT_WRITE = 1, 64, 73
WIDTH = 170
PRODUCT_COLUMNS = ("kernel", "warps", "registers", "spill", "shared", "tensor core", "QGMMA", "FFMA", "FMUL", "issued")
STREAM_COLUMNS = ("kernel", "warps", "registers", "spill", "shared", "128-bit", "narrower", "issue", "memory")
TEXT_COLUMNS = ("kernel", "tensor core", "narrower", "gates")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 all gates passed, 1 not, 64 usage or no compiler here, 73 a file cannot be written."""
    parser = _Parser(prog="python -m kernels gates", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="variants and rows whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes that compile")
    parser.add_argument("--write", type=Path, metavar="PATH", help="the table as Markdown")
    parser.add_argument("--properties", type=Path, metavar="PATH", help="what was read of all variants, as JSON")
    options = parser.parse_args(list(arguments))
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if options.only is not None and (options.write or options.properties):
        parser.error("--only with --write or --properties: those hold all variants")
    try:
        require_compiler()
    except BuildError as error:
        parser.error(str(error))
    modules = variant_modules()
    names = [name for name in variants_of(modules) if _wanted(name, options.only)]
    rows = [row for row in EXPECTED if _wanted(row.name, options.only)]
    if not names and not rows:
        parser.error(f"--only {' '.join(options.only)}: no variant and no row has it in its name")
    digest = source_digest()
    with _progress(len(names)) as progress:
        task = progress.add_task("compiling", total=len(names))
        report = check(
            modules, names, rows, triton_version(), jobs=options.jobs, advance=lambda: progress.advance(task)
        )
    choosable = {name for name in choosable_variants() if _wanted(name, options.only)}
    report.missing += [f"{name}: no kernel, but its tile can be chosen" for name in sorted(choosable - set(names))]
    _show(report)
    try:
        if options.write is not None:
            write_text(options.write, markdown(list(report.read.values()), report.triton))
        if options.properties is not None:
            write_properties(options.properties, list(report.read.values()), report.triton, digest)
    except OSError as error:
        print(f"python -m kernels gates: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_CANNOT_WRITE
    print(json.dumps(summary(report)))
    return EXIT_FAILED if report.failures or report.missing else 0


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(text in name for text in only)


def choosable_variants() -> list[str]:
    """Names of the variants of every tile that the chooser can return."""
    from kernels.compiled.choose import variant_name
    from kernels.hopper.tile import TILES

    return [variant_name(kind, tile) for kind, tiles in TILES.items() for tile in tiles]


def summary(report: Report) -> dict[str, object]:
    return {
        "triton": report.triton,
        "variants": len(report.names),
        "failed": len(report.failed),
        "missing": len(report.missing),
        "failures": [asdict(failure) for failure in report.failures] + [{"missing": line} for line in report.missing],
    }


def product_cells(each: Properties) -> tuple[str, ...]:
    loop = each.hot_loop
    return (
        *_common(each),
        each.tensor_core or "-",
        *(str(loop.get(opcode, 0)) for opcode in ("QGMMA", "FFMA", "FMUL")),
        str(sum(loop.values())),
    )


def stream_cells(each: Properties) -> tuple[str, ...]:
    narrow = ", ".join(f"{count}x{width}" for width, count in each.global_accesses.items() if width != 128)
    wide = str(each.global_accesses.get(128, 0))
    row = next((row for row in EXPECTED if row.name == each.name and isinstance(row, Stream)), None)
    memory = "-" if row is None else f"{memory_clocks(each, row):.0f}"
    return (*_common(each), wide, narrow or "-", f"{issue_clocks(each):.0f}", memory)


def _common(each: Properties) -> tuple[str, ...]:
    return (each.name, str(each.warps), str(each.registers), str(each.spill_bytes), str(each.shared_bytes))


def _show(report: Report) -> None:
    # A narrower terminal breaks lines itself: within a column they would break inside names and numbers.
    console = Console(highlight=False, width=max(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)
    failed = set(report.failed)
    for part in _parts(list(report.read.values())):
        table = Table(title=part.title, title_justify="left")
        for column in (*part.columns, "gates"):
            table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
        for each in part.found:
            verdict = "[red]failed[/]" if each.name in failed else "passed"
            table.add_row(*map(escape, part.cells(each)), verdict)
        console.print(table)
    for line in [*map(str, report.failures), *(f"missing: {line}" for line in report.missing)]:
        console.print(escape(line), soft_wrap=True)


def verdict(each: Properties) -> str:
    row = next((row for row in EXPECTED if row.name == each.name), None)
    if row is None:
        return "no row"
    return ", ".join(f"failed: {failure.gate}" for failure in held_against(row, each)) or "passed"


def markdown(found: list[Properties], triton: str) -> str:
    """The committed table; of what was read alone, so that it can be compared with the stored properties."""
    text = [INTRODUCTION.format(triton=triton, variants=len(found)).strip()]
    for part in _parts(found):
        columns = (*part.columns, "gates")
        align = tuple("---" if column in TEXT_COLUMNS else "---:" for column in columns)
        lines = [columns, align, *((*part.cells(each), verdict(each)) for each in part.found)]
        text.append(f"## {part.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(text) + "\n"


@dataclass(frozen=True)
class _Part:
    title: str
    columns: tuple[str, ...]
    found: list[Properties]
    cells: Callable[[Properties], tuple[str, ...]]


def _parts(found: list[Properties]) -> list[_Part]:
    ordered = sorted(found, key=lambda each: each.name)
    products = [each for each in ordered if each.tensor_core]
    streams = [each for each in ordered if not each.tensor_core]
    return [
        _Part("Products: per K block of 128 and warp group", PRODUCT_COLUMNS, products, product_cells),
        _Part("Memory-bound: accesses of a thread, clocks of an SM for a warp", STREAM_COLUMNS, streams, stream_cells),
    ]


def _progress(total: int) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=total == 0,
    )


INTRODUCTION = """
# The kernels' machine code

Every Triton kernel of `kernels/hopper`, compiled for sm_90a without a GPU by Triton {triton} and read from its machine
code: {variants} variants. Written by

```
python -m kernels gates --write docs/kernel-gates.md --properties kernels/compiled/properties.json
```

which compares each with its row in `kernels/compiled/expected.py` and ends with 1 if one fails. What is held:

- all: no spills, at most 232,448 bytes of shared memory, no atomics;
- products: the FP8 tensor-core instruction that is meant, one FFMA for each accumulator and K block (FMUL and FFMA
  where both operands have scales along K), no FADD, no change of layout through shared memory and no PRMT in the loop,
  loads by TMA and never by `cp.async`; 12 warps and registers handed from the producer to the consumers where work is
  specialised, and a plain twin for each such kernel;
- memory-bound kernels: 128-bit accesses, narrower ones only as many as the row names (scales, indices), and fewer
  clocks to issue instructions than the memory needs for the bytes, at 3.35 TB/s over 132 SMs at 1.83 GHz.

`shared`, `spill`: bytes. `issued`: all instructions of a warp in a K block. Nothing here was measured on a GPU.
"""
