"""`python -m kernels bench`: on a Hopper GPU every kernel against its definition, then TFLOPS and GB/s for the products
of DeepSeek-V3 beside cuBLAS BF16, cuBLAS FP8 and DeepGEMM; without one the modelled figures, labelled so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernels.compiled.choose import Entry, device_name, write_measured
from kernels.compiled.measure import Backend, Bench, GpuTimer, Rate
from kernels.compiled.modelled import ALL_SMS, COLUMNS, TEXT_COLUMNS, cells, markdown, model, modelled_shapes
from kernels.compiled.properties import write_text
from kernels.compiled.shapes import Shape, correctness_shapes, deepseek_shapes
from kernels.compiled.streams import Stream, streams

EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_CANNOT_WRITE = 1, 64, 65, 73
WIDTH = 170
HOPPER = (9, 0)
LIBRARIES = (
    ("scaled_mm", "kernels.libraries.scaled_mm", None),
    ("deep_gemm", "kernels.libraries.deep_gemm", "kernels.libraries.deep_gemm_grouped"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 a kernel is wrong, 64 usage, 65 a table of tiles is none, 73 a file cannot be written."""
    options = _options(arguments)
    try:
        if options.document is not None:
            write_text(options.document, markdown())
        reason = no_gpu()
        if reason is None:
            if options.write is not None:
                write_measured(options.write, [])  # before minutes of measuring, not after
            bench = gpu_bench(options.num_sms, options.measured)
            return measured(bench, options, deepseek_shapes(), correctness_shapes(), streams())
        if options.write is not None:
            _parser().error(f"--write: {reason}, and modelled tiles are no measured ones")
        return modelled(reason, options.only)
    except OSError as error:
        print(f"python -m kernels bench: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_CANNOT_WRITE
    except ValueError as error:
        print(f"python -m kernels bench: {error}", file=sys.stderr)
        return EXIT_DATA


def _parser() -> _Parser:
    parser = _Parser(prog="python -m kernels bench", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="products and kernels whose name contains it")
    parser.add_argument("--num-sms", type=int, default=ALL_SMS, metavar="N", help="SMs our products occupy on a GPU")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="draws of operands for correctness")
    parser.add_argument("--measured", metavar="PATH", help="a table of tiles to choose by")
    parser.add_argument("--write", type=Path, metavar="PATH", help="time every tile; a table of the fastest, as JSON")
    parser.add_argument("--document", type=Path, metavar="PATH", help="the page of modelled figures, as Markdown")
    return parser


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(list(arguments))
    if not 1 <= options.num_sms <= ALL_SMS:
        parser.error(f"--num-sms {options.num_sms}: 1 to {ALL_SMS}")
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    return options


def no_gpu() -> str | None:
    """Why nothing can be measured here; None on a Hopper GPU."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    found = torch.cuda.get_device_capability()
    if found != HOPPER:
        return f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, the kernels need 9.0"
    return None


def modelled(reason: str, only: str = "") -> int:
    """Prints the modelled table."""
    console = _console()
    console.print(f"{reason}: nothing is measured; the figures below are modelled from machine code", soft_wrap=True)
    found = [model(shape) for shape in modelled_shapes() if only in f"{shape.label} {shape.name}"]
    if not found:
        _parser().error(f"--only {only}: no product has it in its name")
    table = Table(title="Modelled TFLOPS (DeepGEMM: modelled, then published)", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
    for each in found:
        table.add_row(*cells(each))
    console.print(table)
    print(json.dumps({"measured": False, "reason": reason, "products": [each.to_json() for each in found]}))
    return 0


def gpu_bench(num_sms: int, table: str | None) -> Bench:
    """On the current GPU, with every library that works there."""
    device = torch.device("cuda", torch.cuda.current_device())
    others = []
    for name, gemm, grouped in LIBRARIES:
        module = import_module(gemm)
        reason = module.problem(device)
        if reason is None:
            others.append(Backend(name, module, None if grouped is None else import_module(grouped)))
        else:
            print(f"not measured: {reason}", file=sys.stderr)
    ours = Backend("triton", import_module("kernels.hopper.gemm"), import_module("kernels.hopper.grouped"), True)
    quantize = import_module("kernels.hopper.quantize")
    return Bench(device, GpuTimer(device), ours, quantize, others, num_sms, table)


def measured(
    bench: Bench,
    options: argparse.Namespace,
    timed: Sequence[Shape],
    checked: Sequence[Shape],
    memory_bound: Sequence[Stream],
) -> int:
    """Correctness, then rates; a kernel that is wrong ends it before anything is timed."""

    def wanted(name: str) -> bool:
        return options.only in name

    shapes = [each for each in timed if wanted(f"{each.label} {each.name}")]
    checked = [each for each in checked if wanted(f"{each.label} {each.name}")]
    kernels = [each for each in memory_bound if wanted(each.name)]
    if not shapes and not checked and not kernels:
        _parser().error(f"--only {options.only}: no product and no kernel has it in its name")
    console = _console()
    with _progress() as progress:
        wrong = _check(bench, checked, kernels, range(options.seeds), progress)
        if not wrong:
            rates = _time(bench, shapes, kernels, options.write is not None, progress)
    if wrong:
        for name, lines in wrong.items():
            for line in lines:
                console.print(f"wrong: {name}: {line}", soft_wrap=True)
        print(json.dumps({"measured": True, "device": _name(bench), "wrong": wrong}))
        return EXIT_FAILED
    _show(console, rates, [backend.name for backend in bench.others])
    if options.write is not None:
        write_measured(options.write, _entries(bench, shapes, rates))
    summary = {
        "measured": True,
        "device": _name(bench),
        "num_sms": bench.num_sms,
        "wrong": {},
        "rates": [asdict(rate) for rate in rates],
    }
    print(json.dumps(summary))
    return 0


def _name(bench: Bench) -> str:
    return device_name() if bench.device.type == "cuda" else str(bench.device)


def _check(
    bench: Bench, shapes: Sequence[Shape], kernels: Sequence[Stream], seeds: Sequence[int], progress: Progress
) -> dict[str, list[str]]:
    """What is wrong, by kernel."""
    wrong = {}
    bar = progress.add_task("correctness", total=None)
    for name, lines in (*bench.wrong_streams(kernels, seeds), *bench.wrong(shapes, seeds)):
        progress.update(bar, advance=1, description=f"correctness: {name}")
        if lines:
            wrong[name] = lines
    return wrong


def _time(
    bench: Bench, shapes: Sequence[Shape], kernels: Sequence[Stream], every_tile: bool, progress: Progress
) -> list[Rate]:
    bar = progress.add_task("rates", total=len(shapes) + len(kernels))
    rates = []
    for stream in kernels:
        progress.update(bar, description=stream.name)
        rates.append(bench.stream_rate(stream))
        progress.advance(bar)
    for shape in shapes:
        progress.update(bar, description=shape.label)
        rates.append(bench.rate(shape, every_tile))
        progress.advance(bar)
    return rates


def _entries(bench: Bench, shapes: Sequence[Shape], rates: Sequence[Rate]) -> list[Entry]:
    """The fastest tile of every product."""
    timed = {rate.label: rate for rate in rates}
    entries = []
    for shape in shapes:
        problem, tiles = shape.problem, timed[shape.label].tiles
        fastest = max(tiles, key=lambda name: tiles[name])
        entries.append(
            Entry(
                device=_name(bench),
                kind=problem.kind,
                rows=problem.rows,
                columns=problem.columns,
                depth=problem.depth,
                groups=problem.groups,
                num_sms=bench.num_sms,
                tile=fastest,
                tflops=round(tiles[fastest], 1),
            )
        )
    return entries


def _show(console: Console, rates: Sequence[Rate], libraries: Sequence[str]) -> None:
    products = [rate for rate in rates if rate.tflops is not None]
    memory_bound = [rate for rate in rates if rate.tflops is None]
    table = Table(title="Measured TFLOPS", title_justify="left")
    names = ["bf16", *libraries]
    for column in ("product", "weight", "tile", "ours", *names, "us", "GB/s"):
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
    for rate in products:
        others = [f"{rate.others[name]:.0f}" if name in rate.others else "" for name in names]
        us, moved = f"{rate.seconds * 1e6:.1f}", f"{rate.gigabytes_per_s:.0f}"
        table.add_row(rate.label, rate.name, rate.tile, f"{rate.tflops:.0f}", *others, us, moved)
    if products:
        console.print(table)
    table = Table("memory-bound kernel", "us", "GB/s", title="Measured bandwidth", title_justify="left")
    for rate in memory_bound:
        table.add_row(rate.name, f"{rate.seconds * 1e6:.1f}", f"{rate.gigabytes_per_s:.0f}")
    if memory_bound:
        console.print(table)


def _console() -> Console:
    return Console(highlight=False, width=max(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
