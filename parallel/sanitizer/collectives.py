"""The order of communication: NCCL matches operations by their order alone, on every communicator.

It looks at no tag, no name and (within a collective) no size: two ranks that issue the same operations in another order
exchange the wrong data, or hang. Each rank logs what it issues; `mismatches` compares the logs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.sanitizer.findings import Finding, Rule

Communicator = str


@dataclass(frozen=True)
class Issued:
    """One operation. name: what it is and which program step issued it; form: dtype and row shape.

    A collective has give and take (rows by rank of the group; empty where it has none) and no peer; a transfer its
    peer (global rank), and its tag, which NCCL does not see.
    """

    kind: str
    name: str
    form: str
    peer: int = -1
    tag: int = 0
    give: tuple[int, ...] = ()
    take: tuple[int, ...] = ()


Log = dict[Communicator, tuple[tuple[int, ...], list[Issued]]]  # members (global ranks), operations in order


def check_collectives(log: Log, group: dist.ProcessGroup | None = None) -> list[Finding]:
    """Compare the logs of all ranks of `group` (the world), which must all call this. The same on every rank."""
    logs: list[Log | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(logs, log, group=group)
    ranks = range(len(logs)) if group is None else dist.get_process_group_ranks(group)
    return mismatches({rank: found or {} for rank, found in zip(ranks, logs, strict=True)})


def mismatches(logs: dict[int, Log]) -> list[Finding]:
    """The first mismatch of every communicator; what follows one would only repeat it."""
    members = {name: ranks for log in logs.values() for name, (ranks, _) in log.items()}
    found = []
    for name, ranks in sorted(members.items()):
        issued = {rank: logs[rank].get(name, (ranks, []))[1] for rank in ranks if rank in logs}
        line = _collectives(issued) or _transfers(issued)
        if line:
            found.append(Finding(Rule.COLLECTIVE, f"{name}: {line}"))
    return found


def _collectives(issued: dict[int, list[Issued]]) -> str | None:
    rows = {rank: [one for one in row if one.peer < 0] for rank, row in issued.items()}
    first, *others = rows
    for index in range(max(map(len, rows.values()), default=0)):
        for rank in (first, *others):
            if index >= len(rows[rank]):
                longest = max(rows, key=lambda r: len(rows[r]))
                return (
                    f"rank {longest} issues {rows[longest][index].name} as collective {index + 1}, rank {rank} issues "
                    f"{len(rows[rank])} in all; missing: its part in it"
                )
        mine = rows[first][index]
        for rank in others:
            theirs = rows[rank][index]
            if (mine.kind, mine.name, mine.form) != (theirs.kind, theirs.name, theirs.form):
                return (
                    f"collective {index + 1} is {mine.name} of {mine.form} on rank {first} and {theirs.name} of "
                    f"{theirs.form} on rank {rank}; missing: one order on all ranks"
                )
        if mine.give:
            for i, source in enumerate(rows):
                for j, target in enumerate(rows):
                    given, taken = rows[source][index].give[j], rows[target][index].take[i]
                    if given != taken:
                        return (
                            f"collective {index + 1}, {mine.name}: rank {source} gives {given} rows to rank {target}, "
                            f"which takes {taken}; missing: counts that agree"
                        )
    return None


def _transfers(issued: dict[int, list[Issued]]) -> str | None:
    sent: dict[tuple[int, int], list[Issued]] = defaultdict(list)
    received: dict[tuple[int, int], list[Issued]] = defaultdict(list)
    for rank, row in issued.items():
        for one in row:
            if one.kind == "send":
                sent[rank, one.peer].append(one)
            elif one.kind == "receive":
                received[one.peer, rank].append(one)
    for source, target in sorted(sent.keys() | received.keys()):
        outgoing, incoming = sent[source, target], received[source, target]
        for index in range(max(len(outgoing), len(incoming))):
            where = f"transfer {index + 1} from rank {source} to rank {target}"
            if index >= min(len(outgoing), len(incoming)):
                more = (outgoing if len(outgoing) > len(incoming) else incoming)[index]
                return f"{where}: {more.kind} {more.name} has no counterpart; missing: the other side's operation"
            mine, theirs = outgoing[index], incoming[index]
            if (mine.form, mine.tag) != (theirs.form, theirs.tag):
                return (
                    f"{where}: {mine.name} of {mine.form} is sent, {theirs.name} of {theirs.form} is received; NCCL "
                    "ignores tags; missing: one order on both sides"
                )
    return None


def form_of(tensor: torch.Tensor, skip: int = 0) -> str:
    """dtype and shape, without the first `skip` dimensions."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape[skip:])}"
