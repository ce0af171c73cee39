"""`python -m parallel` and the drawing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from parallel.__main__ import compact, main
from parallel.schedule.actions import Op, Post
from parallel.schedule.boundary import parts
from parallel.schedule.drawing import Bar, Panel, bars_of, draw_timelines
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.registry import build
from parallel.schedule.simulator import simulate


def test_command_prints_the_figures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=dualpipe", "stages=8", "micro_batches=20", f"out={tmp_path}/new"]) == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert (figures["makespan"], figures["bubble"], figures["peak_chunks"], figures["queue_depth"]) == (66, 6, 9, 4)
    assert figures["overlap_share"] == pytest.approx(0.5125)
    assert "F0 x7  (F1 I1 W1) x3  F1" in output
    png, svg = (Path(name) for name in figures["files"])
    assert png.read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(svg)
    assert "makespan 66 F, bubble 6 F per rank (9.1%)" in svg.read_text()
    assert sorted(p.name for p in png.parent.iterdir()) == ["dualpipe_p8_m20.png", "dualpipe_p8_m20.svg"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("schedule=dualpipe stages=8 micro_batches=0", "micro_batches=0: must be an even number of at least 2"),
        ("schedule=dualpipe stages=8 micro_batches=21", "micro_batches=21: must be an even number of at least 2"),
        ("schedule=dualpipe stages=5 micro_batches=20", "ranks=5: must be an even number of at least 2"),
        (
            "schedule=dualpip stages=8 micro_batches=20",
            "schedule=dualpip: unknown; allowed: dualpipe, dualpipev, zbv, zb1p, interleaved, 1f1b, gpipe",
        ),
        ("schedule=1f1b stages=two micro_batches=20", "stages=two: must be a whole number"),
        ("schedule=1f1b stage=2 micro_batches=20", "'stage=2': must be KEY=VALUE with KEY one of schedule, stages"),
        ("schedule=1f1b stages=2", "micro_batches missing"),
        ("schedule=1f1b stages=2 stages=4 micro_batches=2", "stages is given twice: 2 and 4"),
    ],
)
def test_bad_arguments_are_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 64
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["schedule=1f1b", "stages=2", "micro_batches=2", f"out={tmp_path}/file"]) == 73
    captured = capsys.readouterr()
    assert f"out={tmp_path}/file: cannot write" in captured.err and captured.err.count("\n") == 1


def test_compact_unfolds_to_the_list() -> None:
    assert compact(build("1f1b", 4, 8), 0) == "F0 x4  (B0 F0) x4  B0 x4"
    assert compact(build("1f1b", 4, 8), 3) == "(F0 B0) x8"
    table = dualpipe(8, 26)
    for rank in range(8):
        unfolded: list[str] = []
        for run in compact(table, rank).split("  "):
            words, _, times = run.partition(" x")
            unfolded += words.strip("()").split() * int(times or 1)
        plain = [
            "&".join(f"{part.op}{part.direction}" for part in parts(action))
            for action in table.actions[rank]
            if not isinstance(action, Post)
        ]
        assert unfolded == plain


def test_scheduled_above_measured(tmp_path: Path) -> None:
    scheduled = bars_of(simulate(build("dualpipe", 2, 4)))
    pairs = [bar for bar in scheduled if (bar.rank, bar.start) == (0, 5)]
    assert [(bar.op, bar.direction, bar.chunk) for bar in pairs] == [(Op.F, 1, 1), (Op.B, 0, 0)]
    measured = [Bar(b.rank, b.op, b.direction, b.chunk, 900 + 10 * b.start, 898 + 10 * b.end) for b in scheduled]
    panel = Panel("as measured", measured, "ms")
    assert panel.makespan == 118
    assert panel.bubble(0) == 118 - (120 - 8 * 2)  # twelve forwards' time in eight boxes, a pair counted once
    panels = [Panel("as scheduled", scheduled, "F"), panel]
    png, svg = draw_timelines(panels, tmp_path / "timeline")
    text = svg.read_text()
    assert text.index("as scheduled: makespan 12 F") < text.index("as measured: makespan 118 ms")
    first = png.read_bytes(), text
    draw_timelines(panels, tmp_path / "timeline")
    assert first == (png.read_bytes(), svg.read_text())
    with pytest.raises(ValueError, match="no actions to draw"):
        draw_timelines([Panel("empty", [], "F")], tmp_path / "timeline")
