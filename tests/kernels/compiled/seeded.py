"""Kernels for the tests of the gates: sound ones, and ones that break exactly one rule. Compiled, never run."""

from __future__ import annotations

import json
import os

import triton
import triton.language as tl

from kernels.compiled.build import compile_variant
from kernels.compiled.expected import Product, Stream
from kernels.compiled.gates import check, held_against, variants_of
from kernels.compiled.machine_code import properties
from kernels.hopper.variant import Variant


@triton.jit
def specialised(
    A, B, C, As, Bs, M, N, K, sas, sbs, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SMS: tl.constexpr
):
    """C = A B^T, both K-major, block scales, one producer and two consumers."""
    a_desc = tl.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK])
    b_desc = tl.make_tensor_descriptor(B, [N, K], [K, 1], [BN, BK])
    c_desc = tl.make_tensor_descriptor(C, [M, N], [N, 1], [BM, BN])
    columns = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, SMS, warp_specialize=True):
        m, n = tile // columns * BM, tile % columns * BN
        rows = m + tl.arange(0, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BK)):
            a = a_desc.load([m, k * BK])
            b = b_desc.load([n, k * BK])
            scale = tl.load(As + k * sas + rows) * tl.load(Bs + n // 128 * sbs + k)
            acc = tl.fma(tl.dot(a, b.T), tl.broadcast_to(scale[:, None], (BM, BN)), acc)
        c_desc.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def plain(
    a_desc, b_desc, c_desc, As, Bs, N, K, sas, sbs, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    K_MAJOR: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """The same by one kind of warps. K_MAJOR: B is [N, K], else [K, N]. FMA: promotion as one operation by name."""
    columns = tl.cdiv(N, BN)
    m, n = tl.program_id(0) // columns * BM, tl.program_id(0) % columns * BN
    rows = m + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, tl.cdiv(K, BK)):
        a = a_desc.load([m, k * BK])
        scale = tl.load(As + k * sas + rows) * tl.load(Bs + n // 128 * sbs + k)
        if K_MAJOR:
            product = tl.dot(a, b_desc.load([n, k * BK]).T)
        else:
            product = tl.dot(a, b_desc.load([k * BK, n]))
        if FMA:
            acc = tl.fma(product, tl.broadcast_to(scale[:, None], (BM, BN)), acc)
        else:
            acc += product * scale[:, None]
    c_desc.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def rows_to_fp8(X, Y, S, M, N, BM: tl.constexpr):
    """1x128 tiles; memory-bound."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = rows[:, None] < M
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-4) / 448.0
    tl.store(Y + at, (x * (1.0 / scale)[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(S + tl.program_id(1) * M + rows, scale, mask=rows < M)


@triton.jit
def counted(X, Y, INDEX, N, BN: tl.constexpr):
    """Adds rows by atomics."""
    columns = tl.arange(0, BN)
    target = tl.load(INDEX + tl.program_id(0)).to(tl.int64)
    x = tl.load(X + tl.program_id(0).to(tl.int64) * N + columns)
    tl.atomic_add(Y + target * N + columns, x, sem="relaxed")


@triton.jit
def wrong(X, N, BN: tl.constexpr):
    """Does not compile: shapes of 128 and 64."""
    tl.store(X + tl.arange(0, 128), tl.arange(0, 64))


POINTERS = {"A": "*fp8e4nv", "B": "*fp8e4nv", "C": "*bf16", "As": "*fp32", "Bs": "*fp32"}
SIZES = {"M": "i32", "N": "i32", "K": "i32", "sas": "i32", "sbs": "i32"}
MATRIX = {"X": "*bf16", "Y": "*fp8e4nv", "S": "*fp32", "M": "i32", "N": "i32"}


def plain_variant(name: str, *, warps: int = 8, k_major: bool = True, fma: bool = True, stages: int = 4) -> Variant:
    b = "tensordesc<fp8e4nv[128, 128]>"
    return Variant(
        name=name,
        kernel=plain,
        signature={
            "a_desc": "tensordesc<fp8e4nv[128, 128]>",
            "b_desc": b,
            "c_desc": "tensordesc<bf16[128, 128]>",
            "As": "*fp32",
            "Bs": "*fp32",
            "N": "i32",
            "K": "i32",
            "sas": "i32",
            "sbs": "i32",
        },
        constants={"BM": 128, "BN": 128, "BK": 128, "K_MAJOR": k_major, "FMA": fma},
        aligned=("As", "Bs", "N", "K", "sas"),
        num_warps=warps,
        num_stages=stages,
        tile=(128, 128, 128),
    )


def specialised_variant(name: str, *, twin: str | None, warps: int = 4) -> Variant:
    return Variant(
        name=name,
        kernel=specialised,
        signature={**POINTERS, **SIZES},
        constants={"BM": 128, "BN": 128, "BK": 128, "SMS": 132},
        aligned=(*POINTERS, "M", "N", "K", "sas"),
        num_warps=warps,
        num_stages=4,
        tile=(128, 128, 128),
        warp_specialised=True,
        plain_twin=twin,
    )


def rows_variant(name: str, *, aligned: bool = True) -> Variant:
    return Variant(
        name=name,
        kernel=rows_to_fp8,
        signature=MATRIX,
        constants={"BM": 32},
        aligned=("X", "Y", "S", "M", "N") if aligned else ("X", "Y", "S"),
        num_warps=4,
    )


def atomic_variant(name: str) -> Variant:
    return Variant(
        name=name,
        kernel=counted,
        signature={"X": "*fp32", "Y": "*fp32", "INDEX": "*i64", "N": "i32"},
        constants={"BN": 512},
        aligned=("X", "Y", "INDEX", "N"),
    )


def wrong_variant(name: str) -> Variant:
    return Variant(name=name, kernel=wrong, signature={"X": "*i32", "N": "i32"}, constants={"BN": 128})


class EndsTheProcess:
    """In place of a kernel: what a failed assertion in the compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(3)


def variants() -> list[Variant]:
    """Sound ones first; what is wrong with the others is their name."""
    return [
        specialised_variant("specialised", twin="plain"),
        plain_variant("plain"),
        rows_variant("rows"),
        plain_variant("operand not K-major", k_major=False, stages=3),
        plain_variant("4 warps at 128x128", warps=4, stages=3),
        plain_variant("too many stages", stages=8),
        specialised_variant("8 warps are not specialised", warps=8, twin="plain"),
        specialised_variant("no twin", twin=None),
        rows_variant("sizes not aligned", aligned=False),
        atomic_variant("atomic sum"),
        wrong_variant("does not compile"),
        Variant("ends the process", EndsTheProcess(), {}),
        rows_variant("without a row"),
    ]


def product(name: str, *, specialised: bool = False) -> Product:
    return Product(
        name,
        "QGMMA.64x128x32.F32.E4M3.E4M3",
        warps=12 if specialised else 8,
        consumers=2,
        qgmma=4,
        accumulators=64,
        ffma=64,
        fmul=2,
        warp_specialised=specialised,
    )


ROWS = (
    product("specialised", specialised=True),
    product("plain"),
    Stream("rows", 4, {32: 1}),
    product("operand not K-major"),
    product("4 warps at 128x128"),
    product("too many stages"),
    product("8 warps are not specialised", specialised=True),
    product("no twin", specialised=True),
    Stream("sizes not aligned", 4, {32: 1}),
    Stream("atomic sum", 4, {32: 1, 64: 1}),
    Stream("does not compile", 4, {}),
    Stream("ends the process", 4, {}),
    Stream("without a kernel", 4, {}),
)


def main() -> None:
    """Prints the gates that each variant fails, and what is missing, as JSON."""
    modules = (__name__,)
    report = check(modules, list(variants_of(modules)), ROWS, triton.__version__, jobs=2)
    failed: dict[str, dict[str, str]] = {}
    for failure in report.failures:
        failed.setdefault(failure.name, {})[failure.gate] = failure.found
    for name, fma in (("fusion off, acc += p * s", False), ("fusion off, fma(p, s, acc)", True)):
        found = properties(compile_variant(plain_variant(name, fma=fma), fp_fusion=False))
        failed[name] = {failure.gate: failure.found for failure in held_against(product(name), found)}
    print(json.dumps({"failed": failed, "missing": report.missing, "read": sorted(report.read)}))
