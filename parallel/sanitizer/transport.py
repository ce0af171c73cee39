"""How the data really move: gloo sends and receives between private copies, so that what is sent and what arrives are
held by the sanitizer and not by gloo, and the host sees a tensor die when the program lets go of it.

An all-to-all is sent piece by piece under a tag made of its name: ranks that cross two of them still exchange the right
data here, finish, and are told so by `check_collectives`. What has arrived is put in place when something first looks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.device import PointToPoint

Works = list[dist.Work]


class Landing:
    """Data on its way into a tensor, which may die before."""

    def __init__(self, target: torch.Tensor, arriving: torch.Tensor, works: Works) -> None:
        self.key = target.untyped_storage()._cdata
        self._reference = StorageWeakRef(target.untyped_storage())
        self._place = target.storage_offset(), target.shape, target.stride()
        self._arriving, self._works = arriving, works

    def finish(self) -> None:
        """Wait for the data and put them in place."""
        for work in self._works:
            work.wait()
        storage = torch.UntypedStorage._new_with_weak_ptr(self._reference.cdata)
        if storage is not None:
            torch.empty(0, dtype=self._arriving.dtype).set_(storage, *self._place).copy_(self._arriving)


def exchange(
    out: torch.Tensor,
    sent: torch.Tensor,
    take: Sequence[int],
    give: Sequence[int],
    group: dist.ProcessGroup,
    name: str,
) -> tuple[list[Landing], Works]:
    """An all-to-all of rows: (what lands, what is sent)."""
    me, tag = dist.get_rank(group), zlib.crc32(name.encode()) & 0x3FFFFFFF
    arriving, leaving = torch.empty_like(out), sent.detach().clone()
    receives, sends = Works(), Works()
    pairs = zip(dist.get_process_group_ranks(group), arriving.split(list(take)), leaving.split(list(give)), strict=True)
    for index, (peer, incoming, outgoing) in enumerate(pairs):
        if index == me:
            incoming.copy_(outgoing)
            continue
        if incoming.numel():
            receives.append(_started(dist.irecv(incoming, peer, group, tag)))
        if outgoing.numel():
            sends.append(_started(dist.isend(outgoing, peer, group, tag)))
    return [Landing(out, arriving, receives)], sends


def post(operations: Sequence[PointToPoint]) -> tuple[list[Landing], Works]:
    """A batch of sends and receives: (what lands, what is sent)."""
    landings, sends = list[Landing](), Works()
    for operation in operations:
        send, tensor, peer, tag = operation
        if send:
            sends.append(_started(dist.isend(tensor.detach().clone(), peer, tag=tag)))
        else:
            arriving = torch.empty_like(tensor)
            landings.append(Landing(tensor, arriving, [_started(dist.irecv(arriving, peer, tag=tag))]))
    return landings, sends


def _started(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("a transfer was issued by a rank outside its group")
    return work
