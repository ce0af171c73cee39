"""Mini programs with known verdicts, each fault beside the same program without it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from parallel.device import EXPERT, PIPELINE
from parallel.sanitizer.device import SanitizerDevice
from parallel.sanitizer.findings import Rule, StreamFault


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield dist.group.WORLD  # type: ignore[misc]
        dist.destroy_process_group()


@pytest.fixture
def device() -> SanitizerDevice:
    return SanitizerDevice()


def rules(device: SanitizerDevice) -> list[Rule]:
    return [finding.rule for finding in device.findings.take()]


def made(device: SanitizerDevice) -> torch.Tensor:
    """Written by a kernel."""
    return torch.ones(4, 2, device=device.where).mul_(2.0)


# Races ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_a_side_stream_reads_what_compute_wrote(device: SanitizerDevice, marked: bool) -> None:
    with device.watch():
        x = made(device)
        with device.side(EXPERT, [device.mark()] if marked else []):
            y = x + 1
        del y
    found = device.findings.take()
    assert [f.rule for f in found] == ([] if marked else [Rule.RACE])
    assert marked or all(word in found[0].line for word in ("aten::add", "float32[4, 2]", "aten::ones", "aten::mul_"))


def test_a_mark_covers_only_what_came_before_it(device: SanitizerDevice) -> None:
    with device.watch():
        x = made(device)
        mark = device.mark()
        x.add_(1)
        with device.side(EXPERT, [mark]):
            x.clone()
    assert rules(device) == [Rule.RACE]


def test_two_reads_are_no_race(device: SanitizerDevice) -> None:
    with device.watch():
        x = made(device)
        with device.side(EXPERT, [device.mark()]):
            x.clone()
        x.clone()
    assert rules(device) == []


def test_a_write_after_an_unordered_read(device: SanitizerDevice) -> None:
    with device.watch():
        x = made(device)
        with device.side(EXPERT, [device.mark()]):
            x.clone()
        x.add_(1)
    assert rules(device) == [Rule.RACE]


def test_views_are_the_same_memory(device: SanitizerDevice) -> None:
    with device.watch():
        x = made(device)
        with device.side(EXPERT, []):
            x.view(8)[2:].t()  # nothing is touched
        assert rules(device) == []
        with device.side(EXPERT, []):
            x.view(8)[2:].clone()
    assert rules(device) == [Rule.RACE]


def test_a_buffer_of_another_stream_must_be_waited_for(device: SanitizerDevice) -> None:
    """Its memory may still be in use on that stream under another name."""
    for stream in ("compute", "side"):
        with device.watch():
            made(device)
            if stream == "compute":
                buffer = torch.empty(4, 2, device=device.where)
            with device.side(EXPERT, []):
                if stream == "side":
                    buffer = torch.empty(4, 2, device=device.where)
                buffer.zero_()
        assert rules(device) == ([Rule.RACE] if stream == "compute" else [])


def test_what_the_host_has_seen_end_is_over(device: SanitizerDevice) -> None:
    with device.watch():
        with device.side(EXPERT, []):
            x = made(device)
        device.read(EXPERT, None, x)
        device.adopt(x)
        x.clone()
    assert rules(device) == []


def test_what_was_prepared_before_the_step_was_made_on_compute(device: SanitizerDevice) -> None:
    for marked in (True, False):
        x = made(device)
        with device.watch(), device.side(EXPERT, [device.mark()] if marked else []):
            x.clone()
        assert rules(device) == ([] if marked else [Rule.RACE])


# Frees ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kept", "freed", "adopted"])
def test_a_free_before_another_stream_is_done(device: SanitizerDevice, how: str) -> None:
    with device.watch():
        with device.side(EXPERT, []):
            x = made(device)
            y = x.clone()
        device.read(EXPERT, None, y)  # compute may use x now
        x.add_(1)
        if how == "adopted":
            device.adopt(x)
        if how == "kept":
            with device.side(EXPERT, [device.mark()]):
                pass
        del x
        device.mark()
    assert rules(device) == ([Rule.EARLY_FREE] if how == "freed" else [])


def test_a_stream_that_adopted_covers_what_it_waited_for(device: SanitizerDevice, alone: dist.ProcessGroup) -> None:
    """A receive buffer of one side stream, read by another that compute then waits for."""
    with device.watch():
        with device.side(PIPELINE, []):
            x = made(device)
        device.read(PIPELINE, None, x)
        device.adopt(x)
        with device.side(EXPERT, [device.mark()]):
            sent = x * 2
            ticket = device.all_to_all(torch.empty_like(sent), sent, [4], [4], alone)
        ticket.wait()
        del x
        device.mark()
    assert rules(device) == []


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_sent_lives_until_the_wait(device: SanitizerDevice, alone: dist.ProcessGroup, kept: bool) -> None:
    with device.watch():
        sent = made(device)
        with device.side(EXPERT, [device.mark()]):
            out = torch.empty(4, 2, device=device.where)
            ticket = device.all_to_all(out, sent, [4], [4], alone)
        if not kept:
            del sent
        made(device)
        ticket.wait()
        device.adopt(out)
        assert out.sum() is not None
    found = device.findings.take()
    assert [f.rule for f in found] == ([] if kept else [Rule.EARLY_FREE])
    assert kept or "all-to-all" in found[0].line
    assert torch.equal(out, torch.full((4, 2), 2.0))


# Hidden synchronisation -----------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask put": lambda x: x.index_put_((x > 0,), torch.ones(8, device=x.device)),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.to(torch.int64).flatten()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.to(torch.int64)[:, 0], 0),
    "equal": lambda x: torch.equal(x, x),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "pageable": lambda x: torch.tensor([1, 2]).to(x.device),
}
GOES_ON = {
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "fill by mask": lambda x: x.__setitem__(x > 0, 1.0),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 1.0),
    "where of three": lambda x: torch.where(x > 0, x, x),
    "known size": lambda x: x.repeat_interleave(x.to(torch.int64)[:, 0], 0, output_size=8),
    "fixed repeats": lambda x: x.repeat_interleave(3, 0),
    "pinned": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True) + 1,
    "sort": lambda x: x.flatten().argsort(stable=True)[:3],
    "number": lambda x: x.new_full((), 2.0) * 3,
    "backward": lambda x: (x.clone().requires_grad_() * 2).sum().backward(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(device: SanitizerDevice, name: str) -> None:
    with device.watch():
        x = made(device)
        WAITS[name](x)
    assert Rule.HIDDEN_SYNC in rules(device)
    WAITS[name](made(device))  # outside a step nobody minds
    assert rules(device) == []


@pytest.mark.parametrize("name", GOES_ON)
def test_the_host_goes_on(device: SanitizerDevice, name: str) -> None:
    with device.watch():
        x = made(device)
        GOES_ON[name](x)
    assert rules(device) == []


def test_host_tensors_are_declared(device: SanitizerDevice) -> None:
    with device.watch():
        torch.zeros(3)
        assert rules(device) == [Rule.HOST_TENSOR]
        sizes = torch.tensor([1, 2])
        assert (sizes + 1).tolist() == [2, 3]
        assert rules(device) == []
        made(device)[:2, 0] + sizes
    assert rules(device) == [Rule.HOST_TENSOR]
    device.memory.keep_on_host(declared := torch.ones(2))
    with device.watch():
        declared.sum().item()
    assert rules(device) == []


# Communication --------------------------------------------------------------------------------------------------------


def exchanged(device: SanitizerDevice, group: dist.ProcessGroup, channel: str) -> object:
    with device.side(channel, [device.mark()]):
        sent = torch.ones(2, 2, device=device.where)
        return device.all_to_all(torch.empty_like(sent), sent, [2], [2], group)


def test_one_communicator_on_two_side_streams(device: SanitizerDevice, alone: dist.ProcessGroup) -> None:
    with device.watch():
        exchanged(device, alone, EXPERT).wait()  # type: ignore[attr-defined]
        exchanged(device, alone, PIPELINE).wait()  # type: ignore[attr-defined]
    assert rules(device) == []  # the mark lies behind the first wait
    with device.watch():
        first, second = exchanged(device, alone, EXPERT), exchanged(device, alone, PIPELINE)
        first.wait(), second.wait()  # type: ignore[attr-defined]
    assert rules(device) == [Rule.COLLECTIVE]


def test_communication_on_compute(device: SanitizerDevice, alone: dist.ProcessGroup) -> None:
    with device.watch():
        sent = made(device)
        device.all_to_all(torch.empty_like(sent), sent, [4], [4], alone).wait()
    assert rules(device) == [Rule.COLLECTIVE]


@pytest.mark.parametrize("waits", [0, 1, 2])
def test_a_ticket_is_waited_for_once(device: SanitizerDevice, alone: dist.ProcessGroup, waits: int) -> None:
    with device.watch():
        ticket = exchanged(device, alone, EXPERT)
        for _ in range(waits):
            ticket.wait()  # type: ignore[attr-defined]
    assert rules(device) == ([] if waits == 1 else [Rule.TICKET])


def test_a_dropped_ticket(device: SanitizerDevice, alone: dist.ProcessGroup) -> None:
    with device.watch():
        exchanged(device, alone, EXPERT)
        (finding,) = device.findings.take()
        assert finding.rule is Rule.TICKET and "dropped while under way" in finding.line
        exchanged(device, alone, EXPERT).wait()  # type: ignore[attr-defined]
    assert rules(device) == []


def test_a_ticket_is_over_when_asked_twice(device: SanitizerDevice, alone: dist.ProcessGroup) -> None:
    """Then the host knows, and what it issues comes after."""
    for asked in (1, 2):
        with device.watch():
            with device.side(EXPERT, [device.mark()]):
                sent = made(device)
                ticket = device.all_to_all(out := torch.empty_like(sent), sent, [4], [4], alone)
            assert [ticket.is_completed() for _ in range(asked)] == [False, True][:asked]
            device.adopt(out)
            out.clone()
            ticket.wait()
        assert rules(device) == ([Rule.RACE] if asked == 1 else [])


def test_check_raises_the_lines(device: SanitizerDevice) -> None:
    device.findings.check()
    device.findings.add(Rule.RACE, "one")
    device.findings.add(Rule.RACE, "one")
    device.findings.add(Rule.TICKET, "two")
    with pytest.raises(StreamFault, match=r"^race: one\n\.\.\. and 1 more$"):
        device.findings.check(most=1)
