"""Small facts exchanged between ranks as JSON: what every rank found, the same list on every rank.

torch's object collectives would do the same through pickle, which has no place beside files that come from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data.errors import DataError
from train.checkpoint_format import CheckpointError
from train.errors import AgreedError, RunError

T = TypeVar("T")


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank of `group` (default: all), by group rank; collective. Without torch.distributed:
    [value]."""
    text = json.dumps(value, allow_nan=False)
    if not dist.is_initialized():
        return [json.loads(text)]
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64, device=device), group=group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    received = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(received, padded, group=group)
    texts = [bytes(row[: int(size)].cpu().numpy()) for row, size in zip(received, sizes, strict=True)]
    return [json.loads(found) for found in texts]


def together(work: Callable[[], T]) -> T:
    """work() of this rank. AgreedError on every rank if it failed on any, so that none is left waiting for another:
    each different message once, with the exit code of the first rank that failed. Collective."""
    failure: RunError | DataError | CheckpointError | None = None
    result: T | None = None
    try:
        result = work()
    except (RunError, DataError, CheckpointError) as error:
        failure = error
    found = gather_json([str(failure), failure.exit_code] if failure else None)
    failed = [entry for entry in found if entry is not None]
    if failed:
        raise AgreedError("; ".join(dict.fromkeys(line for line, _ in failed)), failed[0][1]) from failure
    return result  # type: ignore[return-value]
