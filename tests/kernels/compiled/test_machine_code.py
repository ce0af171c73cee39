"""The reader of machine code, on code small enough to count by hand."""

from __future__ import annotations

import pytest

from kernels.compiled.loops import find_loops, innermost, parse, usual_path
from kernels.compiled.machine_code import (
    MachineCodeError,
    assembler_says,
    atomics,
    global_accesses,
    hot_loops,
    per_k_block,
    stream,
    width,
)
from tests.kernels.compiled.sass import ASSEMBLER, COPY, DIVISION, NESTED, PLAIN


def test_a_line_is_address_guard_opcode_and_operands() -> None:
    instructions = parse(PLAIN)
    assert len(instructions) == 20
    assert [each.address for each in instructions] == list(range(0, 0x140, 0x10))
    load = instructions[11]
    assert (load.guard, load.opcode, load.name, load.operands) == ("UP0", "UTMALDG.2D", "UTMALDG", "[UR8], [UR4]")
    assert instructions[5].opcode == "QGMMA.64x128x32.F32.E4M3.E4M3"
    assert (instructions[1].target, instructions[1].conditional) == (0xF0, True)
    assert (instructions[18].target, instructions[18].conditional) == (0x40, False)


def test_text_without_code_and_several_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        parse("Function : nothing\n")
    with pytest.raises(ValueError, match="one function expected, found 2: plain, copy"):
        parse(PLAIN + COPY)
    with pytest.raises(ValueError, match="indirect branch at 0x0"):
        find_loops(parse("/*0000*/ BRX R2 -0x10 ;\n/*0010*/ EXIT ;"))


def test_a_jump_back_from_behind_the_end_closes_no_loop() -> None:
    """By addresses alone [0x40, 0x120] would be a loop, and the shorter one."""
    loops = find_loops(parse(PLAIN))
    assert sorted(loop.header for loop in loops) == [0x20, 0x100]
    (hot,) = hot_loops(parse(PLAIN))
    assert [each.address for each in hot] == [*range(0x20, 0xD0, 0x10), 0x120]  # without the retry itself


def test_the_innermost_loops_are_found_for_every_consumer() -> None:
    first, second = hot_loops(parse(NESTED))
    assert [each.name for each in first] == ["QGMMA", "BRA"]
    assert [each.name for each in second] == ["QGMMA", "FFMA", "BRA"]
    assert len(find_loops(parse(NESTED))) == 4
    # The loop around is the innermost with this one.
    assert [loop.header for loop in innermost(find_loops(parse(NESTED)), "STS")] == [0x20]


def test_counts_are_per_k_block() -> None:
    (hot,) = hot_loops(parse(PLAIN))
    counts, accumulators = per_k_block(hot, (128, 128, 128), 2, "one block")
    assert (counts["QGMMA"], counts["FFMA"], counts["UTMALDG"], counts["LDG"]) == (4, 2, 1, 1)
    assert accumulators == 64
    counts, accumulators = per_k_block(hot, (64, 64, 128), 1, "two blocks")
    assert (counts["QGMMA"], counts["FFMA"], counts["LDG"], accumulators) == (2, 1, 1, 32)


def test_products_that_are_not_the_tiles_are_refused() -> None:
    (hot,) = hot_loops(parse(PLAIN))
    with pytest.raises(MachineCodeError, match=r"an iteration makes 1048576 products .* 128x192 is 1572864"):
        per_k_block(hot, (128, 192, 128), 2, "kernel")
    with pytest.raises(MachineCodeError, match=r"kernel: .* no tile"):
        per_k_block(hot, None, 2, "kernel")


def test_spill_loads_and_stores_are_summed_and_their_absence_is_no_zero() -> None:
    assert assembler_says(ASSEMBLER) == (168, 40)
    with pytest.raises(MachineCodeError, match="no registers or no spills"):
        assembler_says("")


def test_widths() -> None:
    code = "LDG.E.128 R4, x ;|LDG.E.64.CONSTANT R4, x ;|LDG.E R4, x ;|STG.E.U8 x, R4 ;|STG.E.U16 x, R4 ;"
    instructions = parse("\n".join(f"/*{16 * at:04x}*/ {line}" for at, line in enumerate(code.split("|"))))
    assert [width(each) for each in instructions] == [128, 64, 32, 8, 16]
    assert global_accesses(parse(PLAIN)) == {32: 1, 128: 1, 16: 1}


def test_the_stream_is_the_loop_that_moves_most_or_the_whole_kernel() -> None:
    assert stream(parse(COPY)) == (4, 2 * 512)
    # Its loop has narrow accesses only. Of 20 instructions the last is never reached.
    assert stream(parse(PLAIN)) == (19, 512)


def test_the_subroutine_of_rare_operands_is_not_the_usual_path() -> None:
    instructions = parse(DIVISION)
    assert [each.address for each in usual_path(instructions)] == [0x0, 0x10, 0x20, 0x30, 0x70, 0x80]
    assert stream(instructions) == (6, 2 * 512)


def test_publishing_a_descriptor_is_no_atomic_sum() -> None:
    code = ["ATOMG.E.EXCH.STRONG.GPU PT, RZ, [R2], R5", "ATOMG.E.ADD.F32 PT, RZ, [R2], R5", "REDG.E.ADD [R2], R5"]
    instructions = parse("\n".join(f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(code)))
    assert atomics(instructions) == 2
