"""The model step benchmark: what it makes of its steps, one side by hand, and the whole of it at a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import model_step
from benchmarks.model_sides import PRODUCTS, Ours, SideFailed, Stepped, Transformers, Work

SMALL = ["num_layers=2", "num_routed_experts=8", "vocab_size=512", "hidden_size=64", "intermediate_size=128"]


def rows(kept: float, theirs: float, peak: int) -> list[dict[str, object]]:
    sides = (("keep", kept, peak), ("recompute", 1.2, 80), ("theirs", theirs, 100))
    return [
        model_step.row(name, [Stepped(seconds, 2 * seconds, 1.0)] * 3, bytes_, 0.5, 100)
        for name, seconds, bytes_ in sides
    ]


def test_bounds() -> None:
    merits, missed = model_step.verdict(rows(1.0, 1.5, 90), 1e-6)
    assert merits["tokens_per_s_ratio"] == merits["processor_ratio"] == 1.5 and merits["peak_memory_ratio"] == 0.9
    assert merits["tokens_per_s_ratio_recompute"] == 1.25 and merits["peak_memory_ratio_recompute"] == 0.8
    assert missed == []
    for found, difference, said in (
        (rows(1.0, 1.29, 90), 0.0, "tokens_per_s"),
        (rows(1.0, 1.5, 100), 0.0, "peak"),
        (rows(1.0, 1.5, 90), 2e-4, "loss"),
        (rows(1.0, 1.5, 90), float("nan"), "loss"),
    ):
        (line,) = model_step.verdict(found, difference)[1]
        assert said in line


def work(folder: Path) -> Work:
    config = model_step.model_config(SMALL)
    model_step.export(folder / "model", config, 16)
    return Work(folder / "model", config, 2, 16, 1)


def test_both_sides_start_with_the_same_loss_and_gradients(tmp_path: Path) -> None:
    given = work(tmp_path)
    torch.manual_seed(0)
    losses, norms = [], []
    for build in (Ours(False), Ours(True), Transformers("grouped_mm", "sdpa"), Transformers("eager", "eager")):
        parameters, step = build(given)
        losses.append(step(given.batch(0)))
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).double().norm().item())
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)
    assert not torch.equal(given.batch(0), given.batch(1))


def test_products_are_torchs_names() -> None:
    for name in PRODUCTS:
        namespace, operation = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operation)


class Broken:
    def __call__(self, work: Work) -> None:
        raise ValueError("no weights\nhere")


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    from benchmarks.model_sides import Side

    with pytest.raises(SideFailed, match="ValueError: no weights here"):
        Side(Broken(), Work(tmp_path, model_step.model_config([]), 1, 8, 1))  # type: ignore[arg-type]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        model_step.main(["--steps", "0"])
    assert ended.value.code == 64 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--steps", "2", "--threads", "1", "--sequences", "2", "--length", "16", "--model", *SMALL]
    code = model_step.main(given)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code in (0, 1) and found["largest_loss_difference"] < 1e-4
    assert [row["side"] for row in found["rows"]][:2] == ["keep", "recompute"]
    assert {trial["name"] for trial in found["trials"]} == set(model_step.THEIRS)
    kept, _, theirs = found["rows"]
    assert found["tokens_per_s_ratio"] == pytest.approx(theirs["seconds"] / kept["seconds"], abs=1e-3)
    assert found["peak_memory_ratio"] == pytest.approx(kept["peak_bytes"] / theirs["peak_bytes"], abs=1e-3)
    assert all(0 < row["product_share"] < 1 and row["peak_bytes"] > 0 for row in found["rows"])
