"""What the machine code of one kernel variant says: the input of the gates and of the cost model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Properties:
    """Read from the compiled kernel, never from its source.

    warps: of a block, the producer's included. shared_bytes: shared memory of a block. registers: per thread as the
    assembler reports them. spill_bytes: spill stores and loads. hot_loop: instructions of the innermost loop that
    holds tensor-core instructions, by opcode without suffix (of one warp group; the loop of the consumers where work is
    specialised), per K block of 128. accumulators: FP32 accumulators of a thread. consumers: warp groups that issue
    tensor-core instructions. tensor_core: full opcode of those instructions, None without. global_accesses: loads and
    stores of global memory by width in bits. total: all instructions by opcode. setmaxnreg: registers are handed from
    the producer to the consumers.
    """

    name: str
    triton: str
    tile: tuple[int, int, int] | None
    warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    tensor_core: str | None
    consumers: int
    accumulators: int
    setmaxnreg: bool
    hot_loop: dict[str, int] = field(default_factory=dict)
    global_accesses: dict[int, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
