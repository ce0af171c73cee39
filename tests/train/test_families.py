"""Whole runs of models unlike V3: no experts at all, or experts without a selection bias. Two stages, the second with
YaRN and other balance weights; cut short and resumed to the same bits; exported and judged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.ranks import Nursery, arguments, losses, make_corpus, nursery
from train import export, report

GQA = ["attention=gqa", "num_heads=4", "num_key_value_heads=2", "head_dim=8", "rope_interleaved=false"]
MODELS = {
    "llm": [*GQA, "num_routed_experts=0", "router_bias=false", "mtp_depth=0"],
    "v2": ["score_function=softmax", "group_rule=max", "renormalise=false", "router_bias=false", "mtp_depth=0"],
}
LAYOUTS = {"llm": ["parallel.pipeline=2", "parallel.schedule=dualpipe"], "v2": ["parallel.expert=2"]}
MORE = ["model.num_layers=3", "model.rope_scaling.original_length=32", "checkpoint.every=2"]


def stage(name: str, length: int, tokens: int, balance: str) -> str:
    return (
        f"{{name:{name},length:{length},tokens:{tokens},sequences:[{{until:9000,value:4}}],"
        "learning_rate:[{until:9000,start:0.01}],mtp_weight:[{until:9000,value:0.3}],"
        f"bias_update:[{{until:9000,value:0.01}}],balance:{balance}}}"
    )


STAGES = [stage("first", 32, 250, "{sequence:0.1}"), stage("second", 64, 400, "{sequence:0.0,device:0.2}")]


@pytest.fixture(scope="module")
def nurse() -> Iterator[Nursery]:
    with nursery() as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def end(run: Path) -> dict[str, bytes]:
    """The tensors of the last stage's end."""
    (last,) = (run / "stages" / "second").glob("step-*")
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_run(
    name: str, nurse: Nursery, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*(f"model.{change}" for change in MODELS[name]), *LAYOUTS[name], *MORE]
    started = nurse.start(arguments(tmp_path, corpus, "run", STAGES, *more), tmp_path / "logs", ranks=2)
    assert started.wait() == [0, 0], started.error(0)
    run, cut = tmp_path / "run", tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "stages" / "second")
    for later in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    started = nurse.start(arguments(tmp_path, corpus, "cut", STAGES, *more), tmp_path / "again", ranks=2)
    assert started.wait() == [0, 0], started.error(0)
    assert losses(cut) == losses(run) and end(cut) == end(run)

    assert export.main([str(run), "--dtype", "float32", "--check"]) == 0
    assert report.main([str(run)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["model_flops"]["second"]["per_token"] > summary["model_flops"]["first"]["per_token"]
    page = (run / "report" / "report.html").read_text()
    # Nobody has to look at the balance of experts that are not there.
    assert ("Dead experts" in page) == (name == "v2") and "load.jsonl" not in page
