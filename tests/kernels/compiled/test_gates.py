"""Each gate catches the kernel that was made for it; the command's lines and exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernels.compiled.build import BuildError, compile_variant
from kernels.compiled.expected import EXPECTED, Product, Stream
from kernels.compiled.gates import held_against, issue_clocks, memory_clocks
from kernels.hopper.variant import Variant
from tests.kernels.compiled.compiler import run
from tests.kernels.compiled.test_properties import ONE

PRODUCT = Product(
    "kernel",
    "QGMMA.64x128x32.F32.E4M3.E4M3",
    warps=12,
    consumers=2,
    qgmma=8,
    accumulators=96,
    ffma=96,
    fmul=4,
    warp_specialised=True,
)
LOOP = {"QGMMA": 8, "FFMA": 96, "FMUL": 4, "BAR": 2}
SOUND = replace(ONE, hot_loop=LOOP, hot_loops=[LOOP, LOOP], total={"UTMALDG": 3, "STS": 9, "PRMT": 5})
COPY = replace(
    ONE,
    tensor_core=None,
    warps=8,
    global_accesses={32: 2, 128: 6},
    hot_loops=[],
    total={"STS": 64},
    stream_instructions=400,
    stream_bytes=6 * 512,
)


@pytest.fixture(scope="module")
def seeded() -> dict[str, Any]:
    done = run("-c", "from tests.kernels.compiled.seeded import main; main()", timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_sound_kernels_pass(seeded: dict[str, Any]) -> None:
    assert not {"specialised", "plain", "rows", "without a row"} & set(seeded["failed"])


def test_an_operand_that_is_not_k_major_is_caught_by_its_conversions(seeded: dict[str, Any]) -> None:
    assert list(seeded["failed"]["operand not K-major"]) == ["conversions"]
    assert "'STS': 64" in seeded["failed"]["operand not K-major"]["conversions"]


def test_fusion_off_is_caught_by_the_mix_unless_the_fma_is_named(seeded: dict[str, Any]) -> None:
    mix = {"instruction mix": "QGMMA 4, FFMA 0, FMUL 66, FADD 64"}
    assert seeded["failed"]["fusion off, acc += p * s"] == mix
    assert seeded["failed"]["fusion off, fma(p, s, acc)"] == {}


def test_four_warps_at_128x128_are_caught_by_spills_and_accumulators(seeded: dict[str, Any]) -> None:
    gates = seeded["failed"]["4 warps at 128x128"]
    assert {"spills", "accumulators", "warps", "consumers"} <= set(gates)
    assert gates["accumulators"] == "128"
    assert gates["spills"] != "0 bytes"


def test_what_is_not_specialised_is_caught(seeded: dict[str, Any]) -> None:
    assert seeded["failed"]["8 warps are not specialised"] == {"warps": "8", "setmaxnreg": "False"}
    assert seeded["failed"]["no twin"] == {"plain twin": "None"}


def test_shared_memory_over_the_limit_is_caught(seeded: dict[str, Any]) -> None:
    assert list(seeded["failed"]["too many stages"]) == ["shared memory"]


def test_narrow_loads_of_a_memory_bound_kernel_are_caught(seeded: dict[str, Any]) -> None:
    gates = seeded["failed"]["sizes not aligned"]
    assert set(gates) == {"narrow accesses", "wide accesses", "issue clocks"}
    assert gates["narrow accesses"] == "{8: 32, 16: 32, 32: 1}"


def test_atomics_are_caught(seeded: dict[str, Any]) -> None:
    assert "atomics" in seeded["failed"]["atomic sum"]


def test_a_failed_compile_fails_and_a_dead_compiler_takes_only_its_own(seeded: dict[str, Any]) -> None:
    assert list(seeded["failed"]["does not compile"]) == ["compiles"]
    assert "incompatible dimensions" in seeded["failed"]["does not compile"]["compiles"]
    assert seeded["failed"]["ends the process"] == {"compiles": "the compiler ended its process"}
    assert len(seeded["read"]) == 11


def test_a_row_without_a_kernel_and_a_kernel_without_a_row_are_missing(seeded: dict[str, Any]) -> None:
    assert seeded["missing"] == ["without a row: no row in the expected list", "without a kernel: no kernel"]


def test_every_gate_of_a_product_is_held_by_itself() -> None:
    assert held_against(PRODUCT, SOUND) == []
    wrong = {
        "tensor core": {"tensor_core": "HGMMA.64x128x16.F32.BF16"},
        "spills": {"spill_bytes": 8},
        "shared memory": {"shared_bytes": 232449},
        "warps": {"warps": 8},
        "accumulators": {"accumulators": 64},
        "consumers": {"consumers": 1},
        "setmaxnreg": {"setmaxnreg": False},
        "atomics": {"atomics": 1},
    }
    for gate, fields in wrong.items():
        (failure,) = held_against(PRODUCT, replace(SOUND, **fields))  # type: ignore[arg-type]
        assert failure.gate == gate
    for total in ({"UTMALDG": 3, "LDGSTS": 1}, {}):
        assert [failure.gate for failure in held_against(PRODUCT, replace(SOUND, total=total))] == ["TMA"]
    # In one consumer's loop only.
    for changed in ({"FADD": 1}, {"FFMA": 95}, {"FMUL": 5}, {"QGMMA": 4}):
        (failure,) = held_against(PRODUCT, replace(SOUND, hot_loops=[LOOP, {**LOOP, **changed}]))
        assert failure.gate == "instruction mix"
    for opcode in ("STS", "LDS", "PRMT", "LDL", "STL"):
        (failure,) = held_against(PRODUCT, replace(SOUND, hot_loops=[LOOP, {**LOOP, opcode: 1}]))
        assert failure.gate == "conversions"
    assert [each.gate for each in held_against(PRODUCT, replace(SOUND, hot_loops=[]))] == ["instruction mix"]


def test_every_gate_of_a_stream_is_held_by_itself() -> None:
    row = Stream("kernel", 8, {32: 2})
    assert held_against(row, COPY) == []
    wrong: dict[str, list[dict[str, Any]]] = {
        "narrow accesses": [{"global_accesses": {32: 3, 128: 6}}, {"global_accesses": {8: 1, 128: 6}}],
        "wide accesses": [{"global_accesses": {32: 2}}],
        "issue clocks": [{"stream_instructions": 1000}],
        "tensor core": [{"tensor_core": "QGMMA.64x128x32.F32.E4M3.E4M3"}],
        "spills": [{"spill_bytes": 8}],
    }
    for gate, cases in wrong.items():
        for fields in cases:
            assert [failure.gate for failure in held_against(row, replace(COPY, **fields))] == [gate]
    slow = replace(COPY, stream_instructions=1000)  # 250 clocks; memory's are 221
    assert held_against(replace(row, issue=1.2), slow) == []
    assert [failure.gate for failure in held_against(replace(row, issue=1.1), slow)] == ["issue clocks"]


def test_clocks_of_a_copy() -> None:
    """400 instructions on four schedulers; 3072 bytes at 13.87 a clock, 1024 of them found in L1."""
    assert issue_clocks(COPY) == 100
    assert memory_clocks(COPY, Stream("kernel", 8, {})) == pytest.approx(221.5, abs=0.1)
    assert memory_clocks(COPY, Stream("kernel", 8, {}, reread=2)) == pytest.approx(147.7, abs=0.1)


def test_every_row_has_its_own_name() -> None:
    assert len({row.name for row in EXPECTED}) == len(EXPECTED)


def test_where_kernels_are_interpreted_nothing_is_compiled() -> None:
    with pytest.raises(BuildError, match=r"^TRITON_INTERPRET=1 is set: .*; unset it before Triton is imported$"):
        compile_variant(Variant("any", None, {}))
    done = run("-m", "kernels", "gates", timeout=60, TRITON_INTERPRET="1")
    assert done.returncode == 64
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("python -m kernels gates: TRITON_INTERPRET=1 is set")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "compile every kernel for sm_90a"),
        (("gate",), "python -m kernels: 'gate': must be one of gates, bench"),
        (("gates", "--jobs", "0"), "--jobs 0: at least 1"),
        (("gates", "--only", "no such kernel"), "--only no such kernel: no variant and no row has it in its name"),
        (("gates", "--only", "x", "--write", "x.md"), "--only with --write or --properties"),
        (("gates", "--all"), "unrecognized arguments: --all"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run("-m", "kernels", *arguments, timeout=60)
    assert done.returncode == 64
    assert said in done.stderr
    assert "Traceback" not in done.stderr
