"""Blocks of device memory: who reads and writes them on which stream, and when the host gives them back.

The model of CUDA's caching allocator: a block belongs to the stream it was allocated on and is handed out again on
that stream as soon as the host lets go of it, without waiting for anybody. So

- its first use on another stream must come after all that its own stream was given before the allocation (those
  operations may still work on the same memory under another name);
- when the host frees it, every use on another stream must lie before what its own stream does next. `record_stream`
  (`Device.adopt`) names a stream that the allocator waits for as well, up to what it was given before the free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.sanitizer.clock import Clocks, Stream
from parallel.sanitizer.findings import Findings, Rule

SWEEP = 4096  # accesses between two removals of what has died


@dataclass(slots=True)
class Access:
    """One use of a block. at: the program step."""

    stream: Stream
    tick: int
    operation: str
    at: str
    verb: str


@dataclass(slots=True)
class Block:
    """One storage. write: its last one, at first its allocation (origin); reads: those since, the last of each
    stream."""

    reference: StorageWeakRef
    stream: Stream
    dtype: torch.dtype
    shape: torch.Size
    origin: Access
    write: Access
    reads: dict[Stream, Access] = field(default_factory=dict)
    foreign: dict[Stream, Access] = field(default_factory=dict)
    adopted: set[Stream] = field(default_factory=set)


class Memory:
    """All blocks of one device. `at()` names the present program step; `home` is the stream on which tensors made
    before the sanitizer looked are taken to have been made."""

    def __init__(self, clocks: Clocks, findings: Findings, home: Stream, at: Callable[[], str]) -> None:
        self.clocks, self.findings, self.home, self.at = clocks, findings, home, at
        self._blocks: dict[int, Block] = {}
        self._watched: dict[int, Block] = {}
        self._on_host: dict[int, StorageWeakRef] = {}
        self._started = 0
        self._until_sweep = SWEEP

    def start(self) -> None:
        """A step begins: what exists by now was last written on the home stream, just before."""
        self._started = self.clocks.launch(self.home)

    def keep_on_host(self, *tensors: torch.Tensor) -> None:
        """These are meant to be host tensors: no stream ever sees them, and the host may look at them."""
        for tensor in tensors:
            reference = _reference(tensor)
            self._on_host[reference.cdata] = reference

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Whether it was declared to be a host tensor, or made from such alone."""
        return bool(self._on_host) and tensor.untyped_storage()._cdata in self._on_host

    def allocate(self, tensor: torch.Tensor, stream: Stream, operation: str) -> Block | None:
        """A new storage, without contents. None for one of no bytes."""
        access = Access(stream, self.clocks.tick(stream), operation, self.at(), "allocates")
        return self._add(tensor, Block(_reference(tensor), stream, tensor.dtype, tensor.shape, access, access))

    def known(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was seen before."""
        return tensor.untyped_storage()._cdata in self._blocks

    def block(self, tensor: torch.Tensor) -> Block | None:
        """The tensor's block; None for one of no bytes."""
        found = self._blocks.get(tensor.untyped_storage()._cdata)
        if found is not None:
            return found
        access = Access(self.home, self._started, "the host's preparation", "before the step", "writes")
        return self._add(tensor, Block(_reference(tensor), self.home, tensor.dtype, tensor.shape, access, access))

    def read(self, block: Block, stream: Stream, tick: int, operation: str) -> None:
        """Operation `tick` of `stream` reads it."""
        access = Access(stream, tick, operation, self.at(), "reads")
        self._ordered(block, block.write, access)
        block.reads[stream] = access
        self._used(block, access)

    def write(self, block: Block, stream: Stream, tick: int, operation: str) -> None:
        """Operation `tick` of `stream` writes it, and may read it."""
        access = Access(stream, tick, operation, self.at(), "writes")
        self._ordered(block, block.write, access)
        for earlier in block.reads.values():
            self._ordered(block, earlier, access)
        block.write, block.reads = access, {}
        self._used(block, access)

    def adopt(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`record_stream`: a free waits for what `stream` was given until then."""
        block = self.block(tensor)
        if block is not None:
            block.adopted.add(stream)

    def settle(self) -> None:
        """After a stream waited: blocks whose uses elsewhere are all over need no watching."""
        self.poll()
        done = [key for key, block in self._watched.items() if not self._open(block)]
        for key in done:
            del self._watched[key]

    def poll(self) -> None:
        """Look for what the host has let go of since the last look."""
        for key, block in list(self._watched.items()):
            if block.reference.expired():
                del self._watched[key]
                for access in self._open(block):
                    self._freed_early(block, access)

    def describe(self, block: Block) -> str:
        """dtype, shape and where it was allocated."""
        origin, shape = block.origin, f"{str(block.dtype).removeprefix('torch.')}{list(block.shape)}"
        if origin.verb != "allocates":
            return f"{shape} (made before the step)"
        return f"{shape} (allocated by {origin.operation} on {self.clocks.names[origin.stream]} in {origin.at})"

    def _add(self, tensor: torch.Tensor, block: Block) -> Block | None:
        if not tensor.untyped_storage().nbytes():
            return None
        self._blocks[block.reference.cdata] = block
        return block

    def _used(self, block: Block, access: Access) -> None:
        if access.stream != block.stream:
            block.foreign[access.stream] = access
            self._watched[block.reference.cdata] = block
        self._until_sweep -= 1
        if not self._until_sweep:
            self._until_sweep = SWEEP
            self.poll()
            self._blocks = {key: block for key, block in self._blocks.items() if not block.reference.expired()}
            self._on_host = {key: one for key, one in self._on_host.items() if not one.expired()}

    def _open(self, block: Block) -> list[Access]:
        """Uses on other streams that the block's next owner may overtake: it comes after what its own stream and those
        that adopted it were given before the free."""
        before, awaited = self.clocks.before, [block.stream, *block.adopted]
        return [
            access
            for other, access in block.foreign.items()
            if not any(before(other, access.tick, stream) for stream in awaited)
        ]

    def _ordered(self, block: Block, earlier: Access, access: Access) -> None:
        if earlier.stream == access.stream or self.clocks.before(earlier.stream, earlier.tick, access.stream):
            return
        names = self.clocks.names
        self.findings.add(
            Rule.RACE,
            f"{access.operation} on {names[access.stream]} in {access.at} {access.verb} {self.describe(block)}, which "
            f"{earlier.operation} on {names[earlier.stream]} in {earlier.at} {earlier.verb}; missing: "
            f"{names[access.stream]} does not wait for {names[earlier.stream]} in between (a mark in `after`, or a "
            "ticket's wait)",
        )

    def _freed_early(self, block: Block, access: Access) -> None:
        names = self.clocks.names
        self.findings.add(
            Rule.EARLY_FREE,
            f"{self.describe(block)} is freed in {self.at()} while {access.operation} on {names[access.stream]} in "
            f"{access.at} still {access.verb} it; missing: {names[block.stream]} does not wait for "
            f"{names[access.stream]} before (keep it until the ticket was waited for, or adopt it)",
        )


def _reference(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
