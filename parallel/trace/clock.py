"""How far the clocks of different machines are apart."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

import torch
import torch.distributed as dist

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ClockOffset(NamedTuple):
    """offset_ns: add it to this rank's clock to get that of the group's first rank. round_trip_ns: of the quickest
    exchange; the offset is wrong by at most half of it where the two ways are equally long."""

    offset_ns: int
    round_trip_ns: int


SAME_CLOCK = ClockOffset(0, 0)


def clock_offset(
    group: dist.ProcessGroup | None = None, exchanges: int = 9, device: torch.device | str = "cpu"
) -> ClockOffset:
    """Every rank of `group` compares its clock with the group's first rank, one after another; a collective call.

    As in NTP (RFC 5905, section 8) with an instant reply: a rank asks at t0, the first rank answers with its own time
    t, the answer arrives at t1, and the offset is t - (t0 + t1) / 2; the median of `exchanges` is taken. Ranks of one
    machine share a clock: their offset is exactly 0. device: where the backend of `group` wants its tensors.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    machines = torch.tensor(_machine(), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(machines) for _ in range(size)]
    dist.all_gather(gathered, machines, group=group)
    if rank:
        same = bool(torch.equal(gathered[rank], gathered[0]))
        return _ask(group, exchanges, device, same)
    for peer in range(1, size):
        message = torch.zeros(1, dtype=torch.int64, device=device)
        # One more than counted: the first exchange opens the connection.
        for _ in range(exchanges + 1):
            dist.recv(message, group=group, group_src=peer)
            message.fill_(perf_counter_ns())
            dist.send(message, group=group, group_dst=peer)
    return SAME_CLOCK


def _ask(group: dist.ProcessGroup | None, exchanges: int, device: torch.device | str, same: bool) -> ClockOffset:
    offsets, round_trips = [], []
    message = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(exchanges + 1):
        asked = perf_counter_ns()
        dist.send(message, group=group, group_dst=0)
        dist.recv(message, group=group, group_src=0)
        theirs = int(message.item())
        answered = perf_counter_ns()
        offsets.append(theirs - (asked + answered) // 2)
        round_trips.append(answered - asked)
    offset, round_trip = int(median(offsets[1:])), min(round_trips[1:])
    # Containers of one machine may still keep clocks of their own; then the measured offset stands.
    if same and abs(offset) <= max(round_trips[1:]):
        offset = 0
    return ClockOffset(offset, round_trip)


def _machine() -> list[int]:
    """Two integers that name this boot of this machine."""
    try:
        text = BOOT_ID.read_text().strip().replace("-", "")
    except FileNotFoundError:
        return [0, dist.get_rank()]  # not Linux: every rank counts as a machine of its own
    return [int(text[:15], 16), int(text[15:30], 16)]
