"""The report: a stranger sees within seconds whether the run was healthy, and the figures are those of the run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.train.synthetic_run import TOKENS_PER_STEP, write_run
from train.figures import HEATMAP_COLUMNS, HEATMAP_LAYERS, POINTS, expert_figure, smooth, thin
from train.history import JsonLinesSink
from train.record import RecordError, read_run
from train.report import main, write_report
from train.verdict import Grade, judge


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("healthy"))


def grades(directory: Path) -> dict[str, Grade]:
    return {check.title: check.grade for check in judge(read_run(directory)).checks}


def test_a_healthy_run_is_called_healthy(healthy: Path) -> None:
    verdict = judge(read_run(healthy))
    assert verdict.grade is Grade.GOOD and verdict.headline == "Healthy" and verdict.aside == ""


@pytest.mark.parametrize(
    ("broken", "title", "grade"),
    [
        ({"diverges": True}, "Training loss", Grade.BAD),
        ({"diverges": True}, "Held-out English", Grade.BAD),
        ({"dead": True}, "Dead experts", Grade.WARN),
        ({"skips": 2}, "Steady steps", Grade.WARN),
        ({"skips": 40}, "Steady steps", Grade.BAD),
        ({"evaluated": False}, "Held-out text", Grade.UNKNOWN),
        ({"state": "failed"}, "Completion", Grade.BAD),
        ({"state": "running"}, "Completion", Grade.WARN),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, broken: dict[str, object], title: str, grade: Grade) -> None:
    write_run(tmp_path, **broken)  # type: ignore[arg-type]
    assert grades(tmp_path)[title] is grade
    verdict = judge(read_run(tmp_path))
    said = verdict.headline if grade is verdict.grade else verdict.aside
    assert title.lower() in said.lower()


def test_one_infinite_loss_makes_a_run_unhealthy(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    for step in range(1, 20):
        sink.log(step, step * 10, {"train/loss": float("inf") if step == 7 else 5.0 - 0.1 * step})
    sink.close(0)
    (check,) = [check for check in judge(read_run(tmp_path)).checks if check.title == "Training loss"]
    assert check.grade is Grade.BAD and check.figure == "1 not finite"


def test_a_loss_spike_is_seen_and_a_new_stage_is_not_one(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    random = np.random.default_rng(0)
    for step in range(1, 301):
        loss = (2.0 if step <= 200 else 2.8) + 0.01 * random.standard_normal() + 0.5 * (step == 120)
        sink.log(step, step * 10, {"train/loss": loss, "train/stage": int(step > 200)})
    sink.close(0)
    (check,) = [check for check in judge(read_run(tmp_path)).checks if check.title == "Steady steps"]
    assert check.grade is Grade.WARN and "1 loss spikes" in check.text


class Links(HTMLParser):
    """Collects everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_writes_a_page_that_is_one_file(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(healthy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("Held-out Chinese" in line for line in lines)
    figures = json.loads(lines[-1])
    path = Path(figures["report"])
    assert figures["verdict"] == "good"
    text = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert "script" not in links.tags and "link" not in links.tags
    assert len(links.loaded) == 5 and all(link.startswith("data:image/png;base64,") for link in links.loaded)
    on_disk = {png.read_bytes() for png in path.parent.glob("*.png")}
    assert {base64.b64decode(link.partition(",")[2]) for link in links.loaded} == on_disk
    names = {png.stem for png in path.parent.glob("*.png")}
    assert names == {"loss", "evaluation", "timeline", "expert_load", "throughput"}
    for png in path.parent.glob("*.png"):
        image = imread(png)
        assert image.shape[1] > 800 and image[..., :3].std() > 0.02, f"{png.name} is empty"
    assert not list(path.parent.glob("*tmp*"))
    assert "Healthy" in text and "Not shown" not in text
    assert figures["bits_per_byte"]["en"]["extend_32x"]["4096"] == pytest.approx(1.80 * 0.951, abs=1e-4)
    assert figures["data"]["zh"]["tokens"] == 446195 and "446,195" in text
    cells = re.findall(r"<td>(\d\.\d{3})</td>", text)
    assert "1.800" in cells and "2.520" in cells


def test_steps_logged_twice_are_one_row(healthy: Path, tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    sink.log(1, 10, {"train/loss": 3.0})
    sink.log(2, 20, {"train/loss": 2.0})
    sink.log(2, 20, {"val/en": 1.0})
    sink.close(0)
    run = read_run(tmp_path)
    assert run.step.tolist() == [1, 2] and run.logged("val/en")[1].tolist() == [1.0]
    assert run.logged("train/loss")[1].tolist() == [3.0, 2.0]
    assert read_run(healthy).stages[1][0] == "extend_8x"
    assert read_run(healthy).tokens[-1] <= 360 * TOKENS_PER_STEP


def test_a_run_of_one_step_and_nothing_else(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    sink.log(1, 10, {"train/loss": 3.0})
    sink.close(0)
    path, figures = write_report(tmp_path)
    assert figures["steps"] == 1
    assert "pipeline timeline: there is no timeline.json" in path.read_text()


def test_many_layers_are_thinned_to_what_can_be_looked_at(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    for step in range(1, 401):
        sink.log(step, step * 100, {"train/loss": 5 / step})
        sink.expert_load(step, {layer: [100.0 + step * e % 7 for e in range(8)] for layer in range(3, 61)})
    sink.close(0)
    figure = expert_figure(read_run(tmp_path))
    assert figure is not None
    heatmaps = [axes for axes in figure.axes if axes.get_ylabel() == "expert"]
    assert len(heatmaps) == HEATMAP_LAYERS
    assert [heatmaps[0].get_title(loc="left"), heatmaps[-1].get_title(loc="left")] == ["layer 3", "layer 60"]
    assert heatmaps[0].images[0].get_array().shape == (8, HEATMAP_COLUMNS)  # type: ignore[union-attr]


def test_smoothing_and_thinning_keep_the_mean_and_ignore_gaps() -> None:
    values = np.full(300, 2.0)
    values[100] = np.nan
    assert np.allclose(smooth(values), 2.0)
    tokens, thinned = thin(np.arange(10_000), np.arange(10_000) * 2.0)
    assert len(thinned) == POINTS and np.allclose(thinned, tokens * 2)


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        (None, 64, "there is no such directory"),
        ({}, 65, "no metrics"),
        ({"metrics.jsonl": '{"step": 1, "tokens": 10}\n', "evaluation.json": "{"}, 65, "evaluation.json: not JSON"),
        (
            {"metrics.jsonl": '{"step": 1, "tokens": 10}\n', "evaluation.json": '{"rows": [{"label": "x"}]}'},
            65,
            "'language'",
        ),
        ({"metrics.jsonl": '{"step": 1}\n'}, 65, "without step and tokens"),
        ({"metrics.jsonl": '{"step": 1, "tokens": 10}\n', "load.jsonl": '{"step": 1}\n'}, 65, "load.jsonl"),
        (
            {"metrics.jsonl": '{"step": 1, "tokens": 10}\n', "timeline.json": '{"scheduled": [{"rank": 0}]}'},
            65,
            "timeline.json",
        ),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, code: int, words: str
) -> None:
    directory = tmp_path / "run"
    if files is not None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
    assert main([str(directory)]) == code
    error = capsys.readouterr().err
    assert words in error and str(directory) in error and error.count("\n") == 1
    if code == 65 and files:
        with pytest.raises(RecordError):
            write_report(directory)
