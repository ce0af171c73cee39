"""Compiles a kernel variant to sm_90a machine code with Triton's own compiler and assembler: no GPU, no driver.

Triton 3.6, 3.8 and 3.9. Fusion of products and sums is always asked for by name: its default changes between versions,
and with it the instructions that promote an accumulator.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.hopper.variant import Variant

CAPABILITY = 90
WARP_SIZE = 32


class BuildError(RuntimeError):
    """A variant that does not compile, or a process in which nothing can be compiled. One line."""


@dataclass(frozen=True)
class Compiled:
    """`assembler_log`: what the assembler said of this very compilation, with `-v`. `scratch_bytes`: global memory for
    the descriptors a block makes itself."""

    variant: Variant
    triton: str
    ptx: str
    machine_code: bytes
    assembler_log: str
    warps: int
    shared_bytes: int
    scratch_bytes: int


def triton_version() -> str:
    """Of the Triton that is imported. BuildError: it is missing."""
    try:
        import triton
    except ModuleNotFoundError:
        raise BuildError("triton is not installed: pip install 'triton>=3.6'") from None
    version: str = triton.__version__
    return version


def require_compiler() -> None:
    """BuildError: this process runs kernels by the interpreter, so they are no compilable functions, or no Triton."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BuildError(
            f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} is set: kernels are interpreted in this process and "
            "cannot be compiled; unset it before Triton is imported"
        )
    triton_version()


def compile_variant(variant: Variant, *, fp_fusion: bool = True) -> Compiled:
    """Compiles anew in a cache of its own: a cache keeps no assembler log. BuildError: the reason."""
    require_compiler()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": fp_fusion}
    printed = io.StringIO()
    # The compiler writes whole modules to standard error when a pass fails: only the reason is kept.
    with _captured_errors() as errors, triton.knobs.nvidia.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = str(errors.parent / "cache")
        try:
            with contextlib.redirect_stdout(printed):
                source = ASTSource(variant.kernel, **_specialised(variant))
                kernel = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, WARP_SIZE), options=options)
        except Exception as error:  # whatever the compiler raises: of many kinds, also its own asserts
            raise BuildError(f"{variant.name}: {_reason(error, errors)}") from error
    return Compiled(
        variant=variant,
        triton=triton_version(),
        ptx=kernel.asm["ptx"],
        machine_code=kernel.asm["cubin"],
        assembler_log=printed.getvalue(),
        warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        scratch_bytes=getattr(kernel.metadata, "global_scratch_size", 0),
    )


def _specialised(variant: Variant) -> dict[str, Any]:
    """Signature, constants and attributes as the launcher makes them."""
    names = list(variant.kernel.arg_names)
    unknown = sorted(({*variant.signature, *variant.constants, *variant.aligned}) - set(names))
    missing = [name for name in names if name not in variant.signature and name not in variant.constants]
    if unknown or missing:
        raise ValueError(f"arguments not of the kernel: {unknown}; arguments without a type or a constant: {missing}")
    return {
        # In the order of the arguments: the compiler counts, whatever the names say.
        "signature": {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names},
        "constexprs": {(names.index(name),): value for name, value in variant.constants.items()},
        "attrs": {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    }


@contextlib.contextmanager
def _captured_errors() -> Iterator[Path]:
    """Standard error of the process, the compiler's C++ included, goes into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "errors")
        sys.stderr.flush()
        kept = os.dup(2)
        try:
            with path.open("wb") as file:
                os.dup2(file.fileno(), 2)
            yield path
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _reason(error: Exception, errors: Path) -> str:
    """One line: what the compiler raised and the first error it printed."""
    raised = " ".join(f"{type(error).__name__}: {error}".split())
    printed = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines()]
    first = next((line for line in printed if "error:" in line), "")
    return (raised[:300] + (f" ({first[:200]})" if first else "")).strip()
