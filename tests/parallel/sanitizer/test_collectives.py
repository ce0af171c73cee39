"""Logs of several ranks compared: what NCCL would match wrongly."""

from __future__ import annotations

from dataclasses import replace

from parallel.sanitizer.collectives import Issued, Log, mismatches

DISPATCH = Issued("all-to-all", "dispatch", "uint8[8]", give=(1, 2), take=(1, 3))
BACK = Issued("all-to-all", "dispatch", "uint8[8]", give=(3, 4), take=(2, 4))
COMBINE = Issued("all-to-all", "combine", "uint8[8]", give=(1, 3), take=(1, 2))
OTHER = Issued("all-to-all", "combine", "uint8[8]", give=(2, 4), take=(3, 4))


def line(*rows: list[Issued]) -> str:
    """The only mismatch of ranks 0, 1, ...; empty when there is none."""
    members = tuple(range(len(rows)))
    logs: dict[int, Log] = {rank: {"group": (members, row)} for rank, row in enumerate(rows)}
    found = mismatches(logs)
    assert len(found) <= 1
    return found[0].line if found else ""


def test_collectives() -> None:
    assert line([DISPATCH, COMBINE], [BACK, OTHER]) == ""
    assert "collective 1 is dispatch of uint8[8] on rank 0 and combine" in line([DISPATCH, COMBINE], [OTHER, BACK])
    assert "rank 0 issues combine as collective 2, rank 1 issues 1 in all" in line([DISPATCH, COMBINE], [BACK])
    assert "uint8[9] on rank 1" in line([DISPATCH], [replace(BACK, form="uint8[9]")])
    assert "rank 0 gives 2 rows to rank 1, which takes 5" in line([DISPATCH], [replace(BACK, take=(5, 4))])


def sent(tag: int, peer: int, form: str = "float32[2]") -> Issued:
    return Issued("send", f"send {tag}", form, peer, tag)


def received(tag: int, peer: int, form: str = "float32[2]") -> Issued:
    return Issued("receive", f"receive {tag}", form, peer, tag)


def test_transfers_match_in_order() -> None:
    assert line([sent(1, 1), received(9, 1), sent(2, 1)], [received(1, 0), received(2, 0), sent(9, 0)]) == ""
    crossed = line([sent(1, 1), sent(2, 1)], [received(2, 0), received(1, 0)])
    assert "transfer 1 from rank 0 to rank 1: send 1" in crossed and "receive 2" in crossed
    assert "float32[3] is received" in line([sent(1, 1)], [received(1, 0, "float32[3]")])
    assert "send 2 has no counterpart" in line([sent(1, 1), sent(2, 1)], [received(1, 0)])
    assert "receive 1 has no counterpart" in line([], [received(1, 0)])


def test_order_counts_by_pair_of_ranks() -> None:
    """What goes to different peers has no order in common."""
    assert line([sent(1, 1), sent(2, 2)], [received(1, 0)], [received(2, 0)]) == ""
    assert line([sent(2, 2), sent(1, 1)], [received(1, 0)], [received(2, 0)]) == ""
