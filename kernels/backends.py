"""Which code computes each op of the FP8 recipe: chosen by op in the configuration, resolved once at start.

Back ends: `torch` defines the numbers and runs anywhere; `triton` is ours for Hopper; `te`, `deep_gemm` and `scaled_mm`
are adapters of libraries. `auto` is `torch` on a CPU and `triton` on a GPU. What cannot work is refused with the
reason; nothing falls back. Attention, rotation, cross entropy, AdamW and the products of plain operands have torch
only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from kernels.contract import Format, Gemm, GroupedGemm, Norm, Permute, Quantize, SwiGLU

# Op -> back end -> module. Where a back end does not work everywhere, its `problem(device)` says why not, and its
# `check_shapes(name, out, in)` why it cannot multiply by a weight: functions of the module, or of AVAILABLE for ours.
MODULES: dict[str, dict[str, str]] = {
    "quantize": {
        "torch": "kernels.quantize",
        "triton": "kernels.hopper.quantize",
        "te": "kernels.libraries.te_quantize",
    },
    "gemm": {
        "torch": "kernels.gemm",
        "triton": "kernels.hopper.gemm",
        "te": "kernels.libraries.te_gemm",
        "deep_gemm": "kernels.libraries.deep_gemm",
        "scaled_mm": "kernels.libraries.scaled_mm",
    },
    "grouped_gemm": {
        "torch": "kernels.grouped",
        "triton": "kernels.hopper.grouped",
        "te": "kernels.libraries.te_grouped",
        "deep_gemm": "kernels.libraries.deep_gemm_grouped",
    },
    "norm": {"torch": "kernels.norm", "triton": "kernels.hopper.norm"},
    "swiglu": {"torch": "kernels.swiglu", "triton": "kernels.hopper.swiglu"},
    "permute": {"torch": "kernels.permute", "triton": "kernels.hopper.permute"},
    "e5m6": {"torch": "kernels.e5m6", "triton": "kernels.hopper.e5m6"},
}
OPS = tuple(MODULES)
AVAILABLE = "kernels.hopper.available"
PRODUCTS = ("gemm", "grouped_gemm")
TENSOR_CORE = ("triton", "te", "deep_gemm", "scaled_mm")
# Of an H100, H800 or H200: as many as the cost model chooses tiles for.
MULTIPROCESSORS = 132


class BackendError(ValueError):
    """A choice of back ends that cannot work; one line per op, with the reason and the remedy."""


@dataclass
class KernelsConfig:
    """Back end of every op, `auto` or a name of `MODULES`. num_sms: multiprocessors that our persistent kernels occupy,
    0 for all (DeepSeek computes on 112 of 132 and leaves 20 to communication). measured: a table of tile choices that
    `python -m kernels bench --write` made on this kind of GPU; empty: the cost model chooses."""

    quantize: str = "auto"
    gemm: str = "auto"
    grouped_gemm: str = "auto"
    norm: str = "auto"
    swiglu: str = "auto"
    permute: str = "auto"
    e5m6: str = "auto"
    num_sms: int = 0
    measured: str = ""


@dataclass(frozen=True)
class Kernels:
    """The resolved back ends. table: op -> name of its back end, as printed at start and saved with the run."""

    quantize: Quantize
    gemm: Gemm
    grouped_gemm: GroupedGemm
    norm: Norm
    swiglu: SwiGLU
    permute: Permute
    e5m6: Format
    table: dict[str, str]


def torch_kernels() -> Kernels:
    """The definitions of all ops."""
    modules: dict[str, Any] = {op: import_module(names["torch"]) for op, names in MODULES.items()}
    return Kernels(**modules, table=dict.fromkeys(OPS, "torch"))


def config_problems(config: KernelsConfig) -> list[str]:
    """What is wrong with a choice whatever the machine: unknown names, pairs that do not fit."""
    found = []
    for op in OPS:
        allowed = ("auto", *MODULES[op])
        if getattr(config, op) not in allowed:
            found.append(f"kernels.{op}: found '{getattr(config, op)}', allowed {', '.join(allowed)}")
    if not 0 <= config.num_sms <= MULTIPROCESSORS:
        found.append(f"kernels.num_sms: found {config.num_sms}, allowed 0 (all) to {MULTIPROCESSORS}")
    for op in PRODUCTS:
        if config.quantize == "torch" and getattr(config, op) in TENSOR_CORE:
            found.append(
                f"kernels.{op}: '{getattr(config, op)}' multiplies by transposed copies of the weights, which "
                "kernels.quantize=torch does not make; choose kernels.quantize=triton"
            )
    return found


def resolve(config: KernelsConfig, where: torch.device, linears: Iterable[tuple[str, int, int]] = ()) -> Kernels:
    """The modules that a configuration means on a device. Raises BackendError with every problem, one per line.

    linears: (name, output features, input features) of the layers that will run in FP8.
    """
    layers = list(linears)
    automatic = "torch" if where.type == "cpu" else "triton"
    table = {op: automatic if getattr(config, op) == "auto" else getattr(config, op) for op in OPS}
    problems = config_problems(config)
    if problems:
        raise BackendError("\n".join(problems))
    settings = {"num_sms": config.num_sms or None, "measured": config.measured or None}
    modules: dict[str, Any] = {}
    for op, name in table.items():
        checks = import_module(AVAILABLE if name == "triton" else MODULES[op][name])
        reason = checks.problem(where) if hasattr(checks, "problem") else None
        if reason:
            problems.append(f"kernels.{op}: '{name}' cannot work on {where}: {reason}")
            continue
        if op in PRODUCTS and hasattr(checks, "check_shapes"):
            refused = [line for layer in layers if (line := checks.check_shapes(*layer))]
            problems += [f"kernels.{op}: '{name}' cannot multiply by {line}" for line in refused]
        modules[op] = bound(import_module(MODULES[op][name]), settings)
    if config.measured and "triton" in (table[op] for op in PRODUCTS):
        problems += _table_problems(config.measured)
    # After what cannot work here at all: the advice on a pair would only lead there.
    problems = problems or config_problems(_named(config, table))
    if problems:
        raise BackendError("\n".join(problems))
    return Kernels(**modules, table=table)


def bound(module: ModuleType, settings: dict[str, Any]) -> Any:
    """The module's functions with those settings given that they take; the module itself where none takes any."""
    given = {name: value for name, value in settings.items() if value is not None}
    functions: dict[str, Any] = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        taken = {key: value for key, value in given.items() if key in inspect.signature(function).parameters}
        functions[name] = partial(function, **taken) if taken else function
    return SimpleNamespace(**functions) if any(isinstance(each, partial) for each in functions.values()) else module


def _table_problems(path: str) -> list[str]:
    """What is wrong with a table of measured tiles; a product would find it in the middle of a step."""
    allowed = import_module("kernels.hopper.tile").TILES
    try:
        entries = import_module("kernels.compiled.choose").read_entries(Path(path))
    except ValueError as error:
        return [f"kernels.measured: {error}"]
    names = {kind: [tile.name for tile in tiles] for kind, tiles in allowed.items()}
    return [
        f"kernels.measured: {path}: tile '{entry.tile}' of a {entry.kind}; allowed is one of "
        f"{', '.join(names.get(entry.kind, [])) or 'none: the kind is unknown'}"
        for entry in entries
        if entry.tile not in names.get(entry.kind, [])
    ]


def _named(config: KernelsConfig, table: dict[str, str]) -> KernelsConfig:
    """The same configuration with `auto` replaced by what it came to."""
    named: dict[str, Any] = dict(table)
    return replace(config, **named)
