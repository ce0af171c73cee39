"""Gates: what the machine code of every kernel variant must hold, against the literal list of `expected`.

A variant without a row, a row without a variant and a choosable tile without a variant are missing; a variant that does
not compile has failed. There is no list of exceptions.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context

from kernels.compiled.build import BuildError, compile_variant
from kernels.compiled.expected import Product, Row, Stream
from kernels.compiled.machine_code import MachineCodeError, properties
from kernels.compiled.properties import Properties
from kernels.hopper.variant import Variant

PACKAGE = "kernels.hopper"
# Of a block of sm_90: 227 KiB.
SHARED_LIMIT = 232448
# Bytes that an SM can get from memory in a clock: 3.35 TB/s over 132 SMs at 1.83 GHz, the clock of the H800's 1979
# TFLOPS. Its four schedulers issue one instruction of one warp each.
MEMORY_BYTES_PER_CLOCK = 3.35e12 / 132 / 1.83e9
SCHEDULERS = 4
WIDE_BYTES = 512  # of a warp's 128-bit access
# What a change of layout through shared memory is made of, and spills.
CONVERSIONS = ("STS", "LDS", "LDSM", "STSM", "MOVM", "PRMT", "LDL", "STL")


@dataclass(frozen=True)
class Failure:
    name: str
    gate: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.name}: {self.gate}: {self.found}; allowed: {self.allowed}"


@dataclass
class Report:
    """`read`: of every variant that compiled, by name. `missing`: one line each."""

    triton: str
    names: list[str]
    read: dict[str, Properties] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of variants that failed at least one gate."""
        return sorted({failure.name for failure in self.failures})


def variant_modules(package: str = PACKAGE) -> tuple[str, ...]:
    """Modules of a package that list variants."""
    folder = import_module(package).__path__
    names = sorted(f"{package}.{module.name}" for module in pkgutil.iter_modules(folder))
    return tuple(name for name in names if hasattr(import_module(name), "variants"))


@lru_cache(maxsize=2)
def variants_of(modules: tuple[str, ...]) -> dict[str, Variant]:
    """By name. ValueError: two variants of one name."""
    found: dict[str, Variant] = {}
    for module in modules:
        for variant in import_module(module).variants():
            if variant.name in found:
                raise ValueError(f"{module}: variant {variant.name!r} is listed twice")
            found[variant.name] = variant
    return found


def examine(modules: tuple[str, ...], name: str) -> Properties | Failure:
    """Compiles and reads one variant; runs in a process of its own."""
    try:
        return properties(compile_variant(variants_of(modules)[name]))
    except BuildError as error:
        return Failure(name, "compiles", str(error), "machine code for sm_90a")
    except MachineCodeError as error:
        return Failure(name, "machine code", str(error), "what the tile says")


def check(
    modules: tuple[str, ...],
    names: Sequence[str],
    rows: Sequence[Row],
    triton: str,
    *,
    jobs: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Compiles the named variants and holds them against the rows. `advance` is called after each."""
    report = Report(triton, list(names))
    expected = {row.name: row for row in rows}
    if len(expected) != len(rows):
        raise ValueError("a name stands twice in the expected list")
    report.missing += [f"{name}: no row in the expected list" for name in names if name not in expected]
    report.missing += [f"{name}: no kernel" for name in expected if name not in names]
    for found in _all(modules, names, jobs):
        if isinstance(found, Failure):
            report.failures.append(found)
        else:
            report.read[found.name] = found
            if found.name in expected:
                report.failures += held_against(expected[found.name], found)
        advance()
    known = variants_of(modules)
    for variant in (known[name] for name in names):
        if variant.warp_specialised and variant.plain_twin not in known:
            report.failures.append(
                Failure(variant.name, "plain twin", str(variant.plain_twin), "the name of a variant that is listed")
            )
    report.failures.sort(key=lambda failure: (names.index(failure.name), failure.gate))
    return report


def _all(modules: tuple[str, ...], names: Sequence[str], jobs: int) -> Iterator[Properties | Failure]:
    """Results as they come. A compiler that ends its process takes only its own variant with it."""
    context = get_context("spawn")
    waiting = list(names)
    while waiting:
        running: dict[Future[Properties | Failure], str] = {}
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        future = pool.submit(examine, modules, waiting[0])
                        running[future] = waiting.pop(0)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        del running[future]
                        yield found
            except BrokenProcessPool:
                pass
        # Left only if a process died: which of its variants killed it is seen when each has its own.
        for name in running.values():
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    yield pool.submit(examine, modules, name).result()
                except BrokenProcessPool:
                    yield Failure(name, "compiles", "the compiler ended its process", "machine code for sm_90a")


def held_against(row: Row, found: Properties) -> list[Failure]:
    """Every gate that a variant fails."""
    checks = [
        ("warps", found.warps == row.warps, found.warps, row.warps),
        ("spills", found.spill_bytes == 0, f"{found.spill_bytes} bytes", "0"),
        ("shared memory", found.shared_bytes <= SHARED_LIMIT, f"{found.shared_bytes} bytes", f"up to {SHARED_LIMIT}"),
        ("atomics", found.atomics == 0, found.atomics, "none"),
        *(_product_checks(row, found) if isinstance(row, Product) else _stream_checks(row, found)),
    ]
    return [Failure(found.name, gate, str(seen), str(allowed)) for gate, passes, seen, allowed in checks if not passes]


Check = tuple[str, bool, object, object]


def _product_checks(row: Product, found: Properties) -> list[Check]:
    """Per K block of 128, in every loop that holds tensor-core instructions."""
    total, loops = found.total, found.hot_loops
    copies = (total.get("UTMALDG", 0) > 0, total.get("LDGSTS", 0) == 0)
    mixes = {_promotion(loop) for loop in loops}
    expected = _promotion({"QGMMA": row.qgmma, "FFMA": row.ffma, "FMUL": row.fmul})
    converted = [_of(loop, CONVERSIONS) for loop in loops]
    return [
        ("tensor core", found.tensor_core == row.tensor_core, found.tensor_core, row.tensor_core),
        ("accumulators", found.accumulators == row.accumulators, found.accumulators, row.accumulators),
        ("instruction mix", mixes == {expected}, " and ".join(sorted(mixes)) or "no loop", expected),
        ("conversions", not any(converted), converted, "none in the hot loop"),
        ("TMA", all(copies), _of(total, ("UTMALDG", "LDGSTS")), "UTMALDG, no LDGSTS"),
        ("setmaxnreg", found.setmaxnreg == row.warp_specialised, found.setmaxnreg, row.warp_specialised),
        ("consumers", found.consumers == row.consumers, found.consumers, row.consumers),
    ]


def _promotion(loop: dict[str, int]) -> str:
    return ", ".join(f"{opcode} {loop.get(opcode, 0)}" for opcode in ("QGMMA", "FFMA", "FMUL", "FADD"))


def _stream_checks(row: Stream, found: Properties) -> list[Check]:
    narrow = {width: count for width, count in found.global_accesses.items() if width != 128}
    fits = all(count <= row.narrow.get(width, 0) for width, count in narrow.items())
    issue, memory = issue_clocks(found), memory_clocks(found, row) * row.issue
    return [
        ("wide accesses", found.global_accesses.get(128, 0) > 0, found.global_accesses, "some of 128 bits"),
        ("narrow accesses", fits, narrow, f"up to {row.narrow} by bits"),
        (
            "issue clocks",
            issue < memory,
            f"{issue:.0f} a warp and SM",
            f"below {memory:.0f}, of {row.issue} x memory's",
        ),
        ("tensor core", found.tensor_core is None, found.tensor_core, None),
    ]


def issue_clocks(found: Properties) -> float:
    """Of an SM for one warp, where the kernel moves most."""
    return found.stream_instructions / SCHEDULERS


def memory_clocks(found: Properties, row: Stream) -> float:
    """Of an SM for the bytes of one warp at the same place, at the memory's peak."""
    return (found.stream_bytes - WIDE_BYTES * row.reread) / MEMORY_BYTES_PER_CLOCK


def _of(counts: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts.get(name)}
