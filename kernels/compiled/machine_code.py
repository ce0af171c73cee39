"""Reads machine code: which instructions a compiled kernel is made of, and how many of them one K block costs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from kernels.compiled.build import Compiled
from kernels.compiled.loops import Instruction, find_loops, innermost, parse, usual_path
from kernels.compiled.properties import Properties

TENSOR_CORE = ("QGMMA", "HGMMA", "IGMMA")
GLOBAL = ("LDG", "STG", "LDGSTS", "ATOMG", "ATOM", "RED", "REDG", "LD", "ST")
ATOMIC = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS")
K_BLOCK = 128
GROUP_WARPS = 4  # a warp group issues one tensor-core instruction together
PRODUCER_WARPS = 4
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\.")
WIDTH = re.compile(r"\.(?:U|S|F|B)?(8|16|64|128|256)(?=\.|$)")


class MachineCodeError(RuntimeError):
    """Machine code that cannot be read, or that is not what the tile says."""


def disassemble(compiled: Compiled) -> str:
    """With the disassembler of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.machine_code)
        file.flush()
        done = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True)
    if done.returncode:
        raise MachineCodeError(f"{tool}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout


def properties(compiled: Compiled) -> Properties:
    """MachineCodeError: what does not fit."""
    variant = compiled.variant
    try:
        instructions = parse(disassemble(compiled))
        hot = hot_loops(instructions)
        streamed, stream_bytes = stream(instructions)
    except ValueError as error:
        raise MachineCodeError(f"{variant.name}: {error}") from None
    registers, spill_bytes = assembler_says(compiled.assembler_log)
    total = Counter(instruction.name for instruction in instructions)
    setmaxnreg = total["USETMAXREG"] > 0
    consumers = compiled.warps // GROUP_WARPS - (PRODUCER_WARPS // GROUP_WARPS if setmaxnreg else 0) if hot else 0
    loops = [per_k_block(loop, variant.tile, consumers, variant.name) for loop in hot]
    forms = {instruction.opcode for loop in hot for instruction in loop if instruction.name in TENSOR_CORE}
    return Properties(
        name=variant.name,
        triton=compiled.triton,
        tile=variant.tile,
        warps=compiled.warps,
        num_stages=variant.num_stages,
        shared_bytes=compiled.shared_bytes,
        registers=registers,
        spill_bytes=spill_bytes,
        tensor_core=" + ".join(sorted(forms)) or None,
        consumers=consumers,
        accumulators=max((accumulators for _, accumulators in loops), default=0),
        setmaxnreg=setmaxnreg,
        hot_loop=max((counts for counts, _ in loops), key=lambda counts: sum(counts.values()), default={}),
        hot_loops=[counts for counts, _ in loops],
        global_accesses=dict(sorted(global_accesses(instructions).items())),
        total=dict(sorted(total.items())),
        stream_instructions=streamed,
        stream_bytes=stream_bytes,
        atomics=atomics(instructions),
    )


def assembler_says(log: str) -> tuple[int, int]:
    """(registers of a thread, bytes of spill stores and loads)."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise MachineCodeError(f"the assembler names no registers or no spills: {' '.join(log.split())[:200]!r}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def hot_loops(instructions: list[Instruction]) -> list[tuple[Instruction, ...]]:
    """The innermost loops with tensor-core instructions: one for each consumer where work is specialised."""
    return [loop.instructions for loop in innermost(find_loops(instructions), *TENSOR_CORE)]


def per_k_block(
    loop: tuple[Instruction, ...], tile: tuple[int, int, int] | None, groups: int, name: str
) -> tuple[dict[str, int], int]:
    """(instructions by name, accumulators of a thread), for 128 of K.

    A loop iteration may hold several K blocks. How many follows from the products its tensor-core instructions make
    and those that a warp group's share of the tile needs for one.
    """
    if tile is None:
        raise MachineCodeError(f"{name}: tensor-core instructions, but the variant names no tile")
    shapes = [_shape(instruction) for instruction in loop if instruction.name in TENSOR_CORE]
    products = sum(rows * columns * depth for rows, columns, depth in shapes)
    share = tile[0] * tile[1] * K_BLOCK // groups
    blocks, left = divmod(products, share)
    if left or not blocks:
        raise MachineCodeError(
            f"{name}: an iteration makes {products} products for a warp group; one K block of its share of the tile "
            f"{tile[0]}x{tile[1]} is {share}"
        )
    counts = Counter(instruction.name for instruction in loop)
    # A warp group's 128 threads hold the rows x columns of an instruction's result.
    accumulators = sum(rows * columns * depth for rows, columns, depth in shapes) // (128 * K_BLOCK * blocks)
    return {opcode: -(-count // blocks) for opcode, count in sorted(counts.items())}, accumulators


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    found = SHAPE.search(instruction.opcode)
    if found is None:
        raise MachineCodeError(f"tensor-core instruction without a shape: {instruction.opcode}")
    return int(found[1]), int(found[2]), int(found[3])


def width(instruction: Instruction) -> int:
    """Bits of a memory access."""
    found = WIDTH.search(instruction.opcode)
    return int(found[1]) if found else 32


def global_accesses(instructions: list[Instruction]) -> Counter[int]:
    """Loads and stores of global memory by width in bits; TMA apart."""
    return Counter(width(instruction) for instruction in instructions if instruction.name in GLOBAL)


def atomics(instructions: list[Instruction]) -> int:
    """Instructions that compute on memory. A descriptor made in the kernel is published by an exchange."""
    return sum(instruction.name in ATOMIC and ".EXCH" not in instruction.opcode for instruction in instructions)


def stream(instructions: list[Instruction]) -> tuple[int, int]:
    """(instructions, bytes) of a warp where it moves the most: the innermost loop if it holds most of the kernel's
    128-bit accesses, or all of the kernel; without the paths of rare operands.

    Only 128-bit accesses count as bytes: a narrow one may read the same address in all lanes.
    """
    usual = usual_path(instructions)
    loops = [set(loop.instructions) for loop in innermost(find_loops(instructions), *GLOBAL)]
    parts = [[instruction for instruction in usual if instruction in loop] for loop in loops]
    chosen = max(parts, key=lambda part: global_accesses(part)[128], default=usual)
    if 2 * global_accesses(chosen)[128] <= global_accesses(usual)[128]:
        chosen = usual
    return len(chosen), global_accesses(chosen)[128] * 32 * 16
