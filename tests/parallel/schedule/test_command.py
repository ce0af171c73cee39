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
        ("schedule=1f1b micro_batches=2", "exactly one of stages and ranks must be given"),
        ("schedule=1f1b stages=2 ranks=2 micro_batches=2", "exactly one of stages and ranks must be given"),
        ("schedule=zbv stages=5 micro_batches=2", "stages=5: must be a multiple of 2: zbv has 2 on every rank"),
        ("schedule=zbv stages=4 stages_per_rank=2 micro_batches=2", "zbv: stages_per_rank=2: must not be given"),
        ("compare ranks=4", "micro_batches missing"),
        ("compare ranks=5 micro_batches=8", "dualpipe: ranks=5: must be an even number"),
        ("compare ranks=4 micro_batches=8 F=x", "F=x: must be a number"),
        ("compare ranks=4 micro_batches=8 send=-1", "send=-1: must be at least 0"),
        ("compare ranks=4 micro_batches=8 W=3", "F=1 B=2 W=3: F and W must be above 0, and B above W"),
        ("compare schedule=1f1b", "'schedule=1f1b': must be KEY=VALUE with KEY one of ranks, micro_batches"),
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


def test_draws_into_the_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["schedule=1f1b", "stages=2", "micro_batches=2"]) == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert files == [f"runs/schedules/1f1b_p2_m2.{kind}" for kind in ("png", "svg")]
    assert all((tmp_path / name).exists() for name in files)


@pytest.mark.parametrize(
    ("arguments", "ranks", "stages", "bubble"),
    [
        ("schedule=dualpipev stages=8", 4, 8, 6),
        ("schedule=zbv ranks=4", 4, 8, 3),
        ("schedule=interleaved stages=12 stages_per_rank=3", 4, 12, 9),
        ("schedule=interleaved stages=8", 4, 8, 9),
        ("schedule=zb1p stages=4", 4, 4, 3),
    ],
)
def test_stages_and_ranks(
    arguments: str, ranks: int, stages: int, bubble: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments.split(), "micro_batches=12", "out=none"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["ranks"], figures["stages"], figures["bubble"]) == (ranks, stages, bubble)
    busy = figures["makespan"] - bubble
    assert figures["bubble_share"] == pytest.approx(bubble / (busy + bubble), abs=1e-6)


def test_comparison_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal costs of a rank's layers: all ranks work equally long, and only pairs hide the all-to-all."""
    assert main(["compare", "ranks=4", "micro_batches=8", f"out={tmp_path}"]) == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    rows = {row["schedule"]: row for row in figures["schedules"]}
    assert list(rows) == ["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "dualpipe"]
    assert all(row["makespan"] - row["bubble"] == pytest.approx(3 * 8) for row in rows.values())
    bubbles = {"gpipe": 9, "1f1b": 9, "interleaved": 4.5, "zb1p": 3, "zbv": 1.5, "dualpipev": 3, "dualpipe": 2}
    assert {name: row["bubble"] for name, row in rows.items()} == bubbles
    peaks = {"gpipe": 8, "1f1b": 4, "interleaved": 5.5, "zb1p": 4, "zbv": 4, "dualpipev": 4.5, "dualpipe": 5}
    assert {name: row["peak"] for name, row in rows.items()} == peaks
    assert [row["parameters"] for row in rows.values()] == [1] * 6 + [2]
    fastest = sorted(rows, key=lambda name: rows[name]["with_all_to_all"])
    assert set(fastest[:2]) == {"dualpipe", "dualpipev"}
    added = (6.7 + 8.7) / 9.0 + 2 * (5.8 + 7.5) / 22.3
    assert rows["1f1b"]["with_all_to_all"] == pytest.approx((8 + 3) * (3 + added))
    html, *pictures = (Path(name) for name in figures["files"])
    text = html.read_text()
    assert (
        text.count("<svg") == text.count("</svg>") == 2 and "dualpipev" in text and "http" not in text.split("<svg")[0]
    )
    assert {path.name for path in pictures} == {
        f"compare_p4_m8{kind}.{end}" for kind in ("", "_all_to_all") for end in ("png", "svg")
    }
    legend = pictures[1].read_text()
    assert "first stage of a rank / direction 0 (from rank 0)" in legend
    assert "second stage of a rank / direction 1 (from rank 3)" in legend


def test_comparison_at_other_costs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "compare ranks=2 micro_batches=4 F=9 B=22.4 W=7.7 pair=32 all_to_all_F=15.4 all_to_all_B=13.3"
    assert main([*arguments.split(), "exposed_share=0", "out=none"]) == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["schedules"]}
    assert rows["1f1b"]["makespan"] == pytest.approx(5 * 31.4)
    assert rows["1f1b"]["with_all_to_all"] == pytest.approx(5 * (31.4 + 28.7))
    assert main(["compare", "ranks=2", "micro_batches=4", "all_to_all_F=0", "all_to_all_B=0", "out=none"]) == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["schedules"]}
    assert {row["all_to_all_adds"] for row in rows.values()} == {0}


def test_hue_tells_a_rank_s_stages_apart() -> None:
    bars = bars_of(simulate(build("zbv", 2, 4)))
    assert {(bar.rank, bar.hue) for bar in bars} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert {bar.hue for bar in bars_of(simulate(build("interleaved", 2, 4, 3)))} == {0, 1, 2}
    assert all(bar.hue == bar.direction for bar in bars_of(simulate(dualpipe(4, 8))))
    table = build("zbv", 2, 4)
    timed = simulate(table).timed[1]
    assert [bar.hue for bar in bars if bar.rank == 1] == [
        int(part.stage == 2) for t in timed for part in parts(t.action)
    ]


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
