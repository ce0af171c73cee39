"""Records every operation on tensors: its stream, what it reads, writes and allocates, and whether it makes the host
wait.

What an operation does is read off its schema: arguments marked as mutated are written, results that alias an argument
are views and touch no data, other results are allocated and written, `empty` only allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.sanitizer.clock import Clocks, Stream
from parallel.sanitizer.findings import Findings, Rule
from parallel.sanitizer.memory import Memory

SYNCHRONISING = {
    "aten::_local_scalar_dense": "a number is taken to the host (.item(), float(), bool(), if)",
    "aten::is_nonzero": "a number is taken to the host",
    "aten::equal": "its answer is taken to the host",
    "aten::nonzero": "the size of its result depends on values",
    "aten::masked_select": "the size of its result depends on values",
    "aten::bincount": "the size of its result depends on values",
    "aten::histc": "its range depends on values",
    "aten::unique_dim": "the size of its result depends on values",
    "aten::unique_consecutive": "the size of its result depends on values",
    "aten::unique_dim_consecutive": "the size of its result depends on values",
    "aten::_unique": "the size of its result depends on values",
    "aten::_unique2": "the size of its result depends on values",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
ALLOCATING = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
}
METADATA = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"}
TAKEN_TO_HOST = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}
FACTORIES = {
    getattr(torch, name)
    for name in "zeros ones empty full arange eye linspace rand randn randint randperm empty_strided".split()
}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
TO = torch.Tensor.to
NOTED = {TO, *TAKEN_TO_HOST, *FACTORIES, *FROM_DATA}


@dataclass(frozen=True, slots=True)
class Effect:
    """What an overload does: whether each argument is written (w), read (r) or only looked at (v). views: no more than
    another look at an argument."""

    name: str
    arguments: tuple[str, ...]
    keywords: dict[str, str]
    allocates_only: bool
    views: bool

    @staticmethod
    def of(overload: Any) -> Effect:
        schema = overload._schema
        name = schema.name
        looks = name in METADATA or name in ALLOCATING or name.startswith("aten::new_") or name.endswith("_like")
        kinds = {}
        for argument in schema.arguments:
            alias = argument.alias_info
            if alias is not None and alias.is_write:
                kinds[argument.name] = "w"
            else:
                kinds[argument.name] = "v" if alias is not None or looks else "r"
        views = all(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        views = (bool(schema.returns) and views) or name in METADATA
        return Effect(name, tuple(kinds.values()), kinds, name in ALLOCATING, views)


class Watcher(Protocol):
    """The device, as the recorder sees it. quiet: the sanitizer is at work itself."""

    clocks: Clocks
    memory: Memory
    findings: Findings
    at: str
    quiet: bool

    @property
    def current(self) -> Stream:
        """The stream that the host issues on."""
        ...

    def deliver(self, tensors: list[torch.Tensor]) -> None:
        """Have the data of transfers into these tensors."""
        ...

    def outside(self, name: str, group: dist.ProcessGroup | None, touched: list[tuple[torch.Tensor, str]]) -> None:
        """A collective that was not issued through the device."""
        ...


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument: itself, or those of a (nested) list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_of(entry)


class Recorder(TorchDispatchMode):
    """Below autograd: every operation that would be launched."""

    def __init__(self, device: Watcher) -> None:
        super().__init__()
        self.device = device
        self._effects: dict[Any, Effect] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode, and importing torch's compiler to say so takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        if device.quiet:
            return func(*args, **kwargs)
        effect = self._effects.get(func)
        if effect is None:
            effect = self._effects[func] = Effect.of(func)
        if effect.views:
            return func(*args, **kwargs)
        touched = [(t, kind) for kind, value in zip(effect.arguments, args, strict=False) for t in tensors_of(value)]
        touched += [(t, effect.keywords[key]) for key, value in kwargs.items() for t in tensors_of(value)]
        device.memory.poll()
        device.deliver([tensor for tensor, _ in touched])
        if effect.name.startswith("c10d::"):
            device.outside(effect.name, _group_of(args), touched)
            return func(*args, **kwargs)
        if touched and all(device.memory.on_host(tensor) for tensor, _ in touched):
            return self._of_host(func(*args, **kwargs))
        self._mixes(effect.name, touched)
        memory, stream = device.memory, device.current
        tick = device.clocks.launch(stream)
        self._synchronises(effect.name, args, kwargs, stream)
        for tensor, kind in touched:
            if kind == "v" or memory.on_host(tensor) or not (block := memory.block(tensor)):
                continue
            use = memory.write if kind == "w" else memory.read
            use(block, stream, tick, effect.name)
        result = func(*args, **kwargs)
        for tensor in tensors_of(result):
            if not memory.known(tensor):
                made = memory.allocate(tensor, stream, effect.name)
                if made is not None and not effect.allocates_only:
                    memory.write(made, stream, tick, effect.name)
        return result

    def _of_host(self, result: Any) -> Any:
        self.device.memory.keep_on_host(*tensors_of(result))
        return result

    def _mixes(self, name: str, touched: list[tuple[torch.Tensor, str]]) -> None:
        for tensor, _ in touched:
            if tensor.ndim and self.device.memory.on_host(tensor):
                line = f"{name} in {self.device.at} mixes {list(tensor.shape)} of the host with tensors of the device"
                self.device.findings.add(Rule.HOST_TENSOR, f"{line}; missing: .to(device, non_blocking=True)")

    def _synchronises(self, name: str, args: Any, kwargs: Any, stream: Stream) -> None:
        why = SYNCHRONISING.get(name)
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            why = "the size of its result depends on values (output_size is not given)"
        if name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_of(args[1])):
            # A mask with one value is a masked_fill.
            if "put" not in name or args[2].numel() != 1:
                why = "a mask is an index: the size of what it picks depends on values"
        if why:
            synchronised(self.device, name, why, next(tensors_of(args), None))


def synchronised(device: Watcher, name: str, why: str, tensor: torch.Tensor | None) -> None:
    """The host waits for the current stream where it must not."""
    clocks, stream = device.clocks, device.current
    block = device.memory.block(tensor) if tensor is not None else None
    what = f" of {device.memory.describe(block)}" if block else ""
    device.findings.add(
        Rule.HIDDEN_SYNC,
        f"{name}{what} on {clocks.names[stream]} in {device.at}: {why}, so the host waits for the stream; missing: a "
        "form whose sizes the host knows, or Device.read",
    )
    clocks.wait(0, clocks.record(stream))


class Calls(TorchFunctionMode):
    """Above autograd: what leaves no trace below when everything is on the host already."""

    def __init__(self, device: Watcher) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        if func not in NOTED or device.quiet:
            return func(*args, **kwargs)
        name = func.__name__
        if func is TO and device.memory.on_host(args[0]):
            return self._to_device(func, args, kwargs)
        if func in TAKEN_TO_HOST or (func is TO and "cpu" in (*args[1:2], kwargs.get("device"))):
            if isinstance(args[0], torch.Tensor) and not device.memory.on_host(args[0]):
                self._taken(f"Tensor.{name}", args[0])
        elif func in FROM_DATA and not isinstance(args[0], torch.Tensor):
            if kwargs.get("device") is None:
                return self._on_host(func(*args, **kwargs))
            synchronised(device, f"torch.{name}", "numbers of the host are copied to the device", None)
        elif func in FACTORIES and kwargs.get("device") is None:
            made = func(*args, **kwargs)
            if made.numel():
                line = f"torch.{name} in {device.at} makes {list(made.shape)} on the host; missing: device="
                device.findings.add(Rule.HOST_TENSOR, line)
            return made
        return func(*args, **kwargs)

    def _taken(self, name: str, tensor: torch.Tensor) -> None:
        device, stream = self.device, self.device.current
        device.deliver([tensor])
        block = device.memory.block(tensor)
        if block is not None:
            device.memory.read(block, stream, device.clocks.launch(stream), name)
        synchronised(device, name, "the tensor is taken to the host", tensor)

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.device.memory.keep_on_host(tensor)
        return tensor

    def _to_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A host tensor that is sent to a device becomes another tensor; the host goes on only if it says so (and the
        tensor is pinned, which cannot be seen here)."""
        device = self.device
        if not any(isinstance(value, torch.device | str) for value in (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            synchronised(device, "Tensor.to", "numbers of the host are copied to the device", None)
        device.quiet = True
        made = func(*args, **kwargs).clone()
        device.quiet = False
        stream, operation = device.current, "copy from the host"
        block = device.memory.allocate(made, stream, operation)
        if block is not None:
            device.memory.write(block, stream, device.clocks.launch(stream), operation)
        return made


def _group_of(args: Any) -> dist.ProcessGroup | None:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value)
    return None
