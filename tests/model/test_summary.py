"""`python -m model summary`: its figures are those of the modules, the counts and the placement that runs use."""

from __future__ import annotations

import json
import re
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from model.__main__ import main
from model.count import count_parameters, training_flops_per_token
from model.named import model_names, named_config
from model.partition import RankModel, stage_layout
from model.placement import place
from model.precision import in_fp8
from model.released import released_entries
from model.tree import Node, model_tree
from parallel.schedule.registry import build
from parallel.topology import Topology
from tests.model.models import model_config
from tests.model.test_count import FAMILIES, MODELS

ROOT = Path(__file__).resolve().parents[2]


def summary(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict]:
    assert main(["summary", *arguments]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    return "\n".join(printed), json.loads(last)


def leaves(node: Node) -> list[Node]:
    return [leaf for child in node.children for leaf in leaves(child)] if node.children else [node]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*MODELS, *FAMILIES])
def test_the_tree_adds_up(family: str, tied: bool) -> None:
    name, changes = FAMILIES.get(family, (family, {}))
    config = model_config(name, tie_embeddings=tied, **changes)
    tree, counts = model_tree(config, 4096), count_parameters(config)
    assert tree.parameters == counts.total + counts.mtp
    assert tree.flops == pytest.approx(training_flops_per_token(config, 4096, mtp=True)["total"], rel=1e-12)
    for leaf in leaves(tree):
        assert leaf.shape is None or leaf.parameters % prod(leaf.shape) == 0


def test_folded_names_of_v3() -> None:
    tree = model_tree(model_config("v3"), 4096)
    assert [child.title for child in tree.children] == [
        "embed", "layers.0-2 x3", "layers.3-60 x58", "norm", "head", "mtp.0"
    ]  # fmt: skip
    moe = tree.children[2]
    assert [child.title for child in moe.children][-2:] == ["shared", "experts x256"]
    assert moe.children[-1].children[0].shape == (4096, 7168)


def test_fp8_is_what_the_released_folder_holds_in_fp8() -> None:
    for name in ("tiny", "demo_llm", "demo_v2"):
        for entry in released_entries(model_config(name)):
            assert in_fp8(entry.canonical) == entry.linear, entry


# Placement ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schedule", "pipeline", "expert", "data"),
    [
        ("tiny", "dualpipe", 4, 2, 2),
        ("tiny", "dualpipev", 2, 4, 1),
        ("tiny", "interleaved", 2, 1, 3),
        ("demo_v2", "1f1b", 3, 2, 1),
        ("demo_llm", "zb1p", 2, 1, 2),
    ],
)
def test_placement_is_that_of_every_rank(name: str, schedule: str, pipeline: int, expert: int, data: int) -> None:
    config = model_config(name)
    found = place(config, schedule, pipeline, expert, pipeline * expert * data, "", 64)
    table = build(schedule, pipeline, 2 * pipeline)
    layout = stage_layout(config, table, "")
    holders: dict[str, int] = {}
    copies: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for rank in range(pipeline * expert * data):
        topology = Topology(data, pipeline, expert, rank)
        at = found.ranks[topology.pipeline_rank]
        assert at.first <= rank % (pipeline * expert) <= at.last
        specs = RankModel(config, topology, table, layout, torch.bfloat16, device="meta").specs()
        assert sum(spec.parameter.numel() for spec in specs) == at.parameters
        for spec in specs:
            kind = "experts" if spec.bucket.endswith(".experts") else spec.bucket
            assert len(spec.replicas) in at.replicas[kind if kind in at.replicas else "layers"]
            for part in spec.parts:
                holders[part.name] = holders.get(part.name, 0) + 1
                copies[part.name] = len(spec.replicas)
                sizes[part.name] = (part.last_row - part.first_row) * part.columns
    assert holders == copies
    expected = count_parameters(config)
    biases = expected.router_biases + config.mtp_depth * config.router_bias * config.num_routed_experts
    assert sum(sizes.values()) == expected.total + expected.mtp - biases
    flops = training_flops_per_token(config, 64, mtp=True)["total"]
    assert sum(at.flops for at in found.ranks) == pytest.approx(flops, rel=1e-12)
    assert sum(stage.flops for stage in found.stages) == pytest.approx(flops, rel=1e-12)


def test_v3_on_2048_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    printed, figures = summary(capsys, "model=v3", "pipeline=16", "expert=64", "ranks=2048")
    for said in ("layers.3-60 x58", "experts x256", "671,026,419,200", "671,026,404,352", "11,610,068,224"):
        assert said in printed, said
    for said in ("250.4", "281.2", "260.6", "291.8", "70,272", "18.1% of its 389,120 bytes, 1 : 5.54", "plain, base"):
        assert said in printed, said
    placement = figures["placement"]
    # The ledger's classes of ranks (docs/memory.md): 4.934 and 3.273 billion parameters.
    assert [round(r["parameters"] / 1e9, 3) for r in placement["ranks"]] == [4.934, *[3.273] * 14, 4.934]
    assert placement["experts_per_rank"] == 4 and placement["stages"][15]["ranks"] == [15, 0]
    # A dense layer's copies: data x expert ranks x mirror; those of a rank's experts: data x mirror.
    assert placement["ranks"][3]["replicas"] == {"layers": [256], "experts": [4]}
    assert placement["ranks"][3]["mirrors"] == [12]


def test_changed_numbers_yarn_and_a_given_layout(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=v3", "model.num_layers=4", "model.mtp_depth=0", "length=32768", "pipeline=2", "layout=Et|tttL"]
    printed, figures = summary(capsys, *arguments)
    assert "layers.0-2 x3" in printed and "layers.3 " in printed and "mtp" not in printed
    assert "YaRN" in printed and figures["rope"] == "yarn"
    mscale = 0.1 * torch.log(torch.tensor(40.0, dtype=torch.float64)).item() + 1
    assert figures["softmax_scale"] == pytest.approx(192**-0.5 * mscale**2, rel=1e-12)
    assert [stage["contents"] for stage in figures["placement"]["stages"]] == [
        "embed, layers.0", "layers.1-3, norm, head"
    ]  # fmt: skip


# Command --------------------------------------------------------------------------------------------------------------


def test_the_document_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed, figures = summary(capsys, "model=all", "style=markdown")
    document = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for line in printed.splitlines():
        assert line in document, line
    assert list(figures["models"]) == model_names()
    assert figures["models"]["v3"]["parameters"]["total"] == 671_026_419_200
    # Every model of conf/model has its place in the text too.
    for name in model_names():
        assert re.search(rf"`{name}`", document), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model missing"),
        (["model=v9"], "unknown; allowed: demo, demo_llm"),
        (["model=v3", "model=v2"], "given twice"),
        (["model=v3", "colour=red"], "must be KEY=VALUE"),
        (["model=v3", "model.num_layer=3"], "did you mean model.num_layers?"),
        (["model=v3", "model.num_layers=many"], "model.num_layers=many"),
        (["model=v3", "model.num_layers=0"], "must be above 0"),
        (["model=v3", "model.attention=gqa"], "model.head_dim: found 0"),
        (["model=v3", "length=0.5"], "whole number"),
        (["model=v3", "style=loud"], "allowed: terminal, markdown"),
        (["model=v3", "expert=4"], "pipeline missing"),
        (["model=v3", "pipeline=15"], "must be an even number"),
        (["model=v3", "pipeline=2", "expert=3"], "does not divide"),
        (["model=llm_7b", "pipeline=2", "expert=2"], "does not divide"),
        (["model=v3", "pipeline=2", "ranks=3"], "multiple of pipeline x expert = 2"),
        (["model=v3", "pipeline=2", "layout=Et|t"], "ends without L"),
        (["model=v3", "pipeline=2", "schedule=none"], "unknown; allowed: dualpipe"),
        (["model=all", "pipeline=2"], "model=all has none"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", *arguments]) == 64
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_narrow_terminal_breaks_no_name_or_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["summary", "model=v3"]) == 0
    said = capsys.readouterr().out
    assert "├─ layers.3-60 x58" in said and "682,636,487,424" in said and "129280 x 7168" in said


def test_a_broken_yaml_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.named.CONF", tmp_path)
    (tmp_path / "twisted.yaml").write_text("name: [unclosed\n")
    (tmp_path / "stray.yaml").write_text("number_of_layers: 3\n")
    for name in ("twisted", "stray"):
        with pytest.raises(ValueError, match=rf"{name}\.yaml: ") as caught:
            named_config(name)
        assert "\n" not in str(caught.value)
