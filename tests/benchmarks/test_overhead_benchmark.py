"""The overhead benchmark: the table in torch's terms, and the whole of it at tiny numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks.overhead import actions_of, main, translated
from parallel.schedule.registry import build


def test_a_table_in_torchs_terms() -> None:
    table = build("1f1b", 2, 2)
    assert {rank: " ".join(map(str, row)) for rank, row in translated(table).items()} == {
        0: "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        1: "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    }
    assert actions_of(table) == 16


def test_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="halves of a pair"):
        translated(build("dualpipev", 2, 8))


def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--ranks",
        "2",
        "--micro-batches",
        "4",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--schedules",
        "interleaved",
        "zbv",
    ]
    code = main(given)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["schedule"] for row in found["rows"]] == ["interleaved", "zbv"]
    assert found["overhead_ratio"] == max(row["overhead_ratio"] for row in found["rows"]) > 0
    assert code == (found["overhead_ratio"] > 1.1)
