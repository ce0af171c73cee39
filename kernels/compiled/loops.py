"""Loops of machine code: natural loops of the control-flow graph, found by dominators.

Address order is not enough: a wait that did not succeed at once is placed behind the end of the kernel and jumps back
into the middle of the code before it. Such a jump closes no loop, because its target can be reached without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
ENDS = ("EXIT", "RET", "BRA", "JMP", "KILL")
# A block ends behind these, though what follows is reached.
CALLS = ("CALL",)
INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
# A loop of nothing else waits for a barrier.
WAITS = {"SYNCS", "BRA", "NOP", "NANOSLEEP", "YIELD", "WARPSYNC", "BSYNC", "BSSY"}


@dataclass(frozen=True)
class Instruction:
    """`guard`: the predicate it runs under, empty without. `opcode`: with all suffixes."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Address a branch goes to; None for everything else."""
        if self.name not in ("BRA", "JMP"):
            return None
        found = TARGET.search(self.operands)
        if found is None:
            raise ValueError(f"branch without an address at {self.address:#x}: {self.opcode} {self.operands}")
        return int(found[1], 16)

    @property
    def conditional(self) -> bool:
        """A branch or an end under a predicate, before the opcode or among the operands."""
        return bool(self.guard) or "P" in self.operands.replace("UPT", "").replace("PT", "")


@dataclass(frozen=True)
class Loop:
    """Instructions of a natural loop, in order of their addresses. `blocks`: first addresses of its blocks."""

    header: int
    blocks: frozenset[int]
    instructions: tuple[Instruction, ...]


def parse(text: str) -> list[Instruction]:
    """Disassembly of one function as `cuobjdump -sass` prints it. ValueError: no instruction, or several functions."""
    functions = re.findall(r"Function : (\S+)", text)
    if len(functions) > 1:
        raise ValueError(f"one function expected, found {len(functions)}: {', '.join(functions)}")
    found = [
        Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip())
        for match in INSTRUCTION.finditer(text)
    ]
    if not found:
        raise ValueError("no instruction in the disassembly")
    return found


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """All natural loops, inner ones after the loops they are in. Loops of one header count as one."""
    blocks, follows = _graph(instructions)
    dominators = _dominators(min(blocks), follows)
    before: dict[int, list[int]] = {first: [] for first in follows}
    for first, successors in follows.items():
        for successor in successors:
            before[successor].append(first)
    bodies: dict[int, set[int]] = {}
    for first in dominators:
        for header in follows[first]:
            if header in dominators[first]:
                bodies.setdefault(header, {header}).update(_reaching(first, header, before, dominators))
    loops = [
        Loop(
            header,
            frozenset(body),
            tuple(instruction for first in sorted(body) for instruction in blocks[first]),
        )
        for header, body in bodies.items()
    ]
    return sorted(loops, key=lambda loop: (-len(loop.blocks), loop.header))


def usual_path(instructions: list[Instruction]) -> list[Instruction]:
    """What can be reached, without the blocks that call a subroutine: those take the operands of a division next to
    overflow and underflow, which its few instructions on the spot do not."""
    blocks, follows = _graph(instructions)
    rare = {first for first, block in blocks.items() if any(each.name == "CALL" for each in block)}
    kept, waiting = {min(blocks)}, [min(blocks)]
    while waiting:
        new = [first for first in follows[waiting.pop()] if first not in kept | rare]
        kept.update(new)
        waiting += new
    return [instruction for first in sorted(kept) for instruction in blocks[first]]


def innermost(loops: list[Loop], *names: str) -> list[Loop]:
    """Loops with an instruction of one of these names that have no such loop inside, in order of their addresses.

    Loops inside that only wait are left out of their instructions.
    """
    holds = [loop for loop in loops if any(instruction.name in names for instruction in loop.instructions)]
    found = [loop for loop in holds if not any(other.blocks < loop.blocks for other in holds)]
    waits = [loop for loop in loops if all(instruction.name in WAITS for instruction in loop.instructions)]
    return sorted((_without(loop, waits) for loop in found), key=lambda loop: loop.header)


def _without(loop: Loop, waits: list[Loop]) -> Loop:
    gone = {instruction for wait in waits if wait.blocks < loop.blocks for instruction in wait.instructions}
    return Loop(loop.header, loop.blocks, tuple(each for each in loop.instructions if each not in gone))


def _graph(instructions: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Blocks by first address, and the first addresses that may follow each."""
    first = instructions[0].address
    starts = {first}
    for instruction, after in zip(instructions, [*instructions[1:], None]):
        if instruction.name in INDIRECT:
            raise ValueError(f"indirect branch at {instruction.address:#x}: its targets are not known")
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.name in (*ENDS, *CALLS) and after is not None:
            starts.add(after.address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        if instruction.address in starts:
            first = instruction.address
        blocks.setdefault(first, []).append(instruction)
    follows: dict[int, list[int]] = {}
    firsts = sorted(blocks)
    for first, following in zip(firsts, [*firsts[1:], None]):
        last = blocks[first][-1]
        follows[first] = [] if last.target is None else [last.target]
        passes = last.name not in ENDS or last.conditional
        if following is not None and following not in follows[first] and passes:
            follows[first].append(following)
    return blocks, follows


def _dominators(entry: int, follows: dict[int, list[int]]) -> dict[int, set[int]]:
    """Blocks on every path from the entry to a block, itself included; of the blocks that can be reached."""
    order: list[int] = []
    waiting, seen = [entry], {entry}
    while waiting:
        first = waiting.pop()
        order.append(first)
        for successor in follows[first]:
            if successor not in seen:
                seen.add(successor)
                waiting.append(successor)
    before: dict[int, list[int]] = {first: [] for first in order}
    for first in order:
        for successor in follows[first]:
            before[successor].append(first)
    found = {first: set(order) for first in order}
    found[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for first in order:
            if first == entry:
                continue
            dominating = set.intersection(*(found[other] for other in before[first])) | {first}
            if dominating != found[first]:
                found[first], changed = dominating, True
    return found


def _reaching(last: int, header: int, before: dict[int, list[int]], reachable: dict[int, set[int]]) -> set[int]:
    """Blocks from which `last` is reached without passing the header."""
    body, waiting = {last}, [last]
    while waiting:
        first = waiting.pop()
        if first == header:
            continue
        for other in before[first]:
            if other in reachable and other not in body:
                body.add(other)
                waiting.append(other)
    return body | {header}
