"""Commands on a run's checkpoints: rewinding, another model refused, export that never costs an earlier one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.config import TokenizerConfig
from data.tokenizer import tokenizer_json, train_tokenizer
from model.huggingface import export_model
from model.initialize import initial_tensor
from train import evaluate, export, generate
from train.compose import compose_run, config_json, config_yaml
from train.config import RunConfig
from train.engine import Engine
from train.errors import AgreedError
from train.run_checkpoints import RunCheckpoints, restore
from train.state import RunState


def small_config(root: Path) -> RunConfig:
    overrides = ["experiment=demo", "model=tiny", "model.vocab_size=384", f"root={root}"]
    overrides += [f"data.directory={root}/data"]
    overrides += ["precision.fp8=false", "precision.compute=float32"]
    return compose_run([*overrides, "parallel.pipeline=1", "parallel.expert=1", "parallel.schedule=1f1b"])


def small_engine(config: RunConfig) -> Engine:
    engine = Engine(config.model, config.parallel, config.optimizer, torch.float32, False, 0, sources=2)
    engine.initialize(seed=1)
    return engine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that holds its start."""
    config = small_config(tmp_path_factory.mktemp("runs"))
    path = Path(config.root) / config.name
    state = {"run": RunState().to_json(), "config": json.loads(config_json(config))}
    RunCheckpoints(path, keep=3).save(0, small_engine(config), state, stage="initial")
    (path / "config.yaml").write_text(config_yaml(config))
    return path


def test_later_steps_are_set_aside_and_nothing_else(tmp_path: Path) -> None:
    places = [tmp_path / "checkpoints", tmp_path / "stages" / "pretrain", tmp_path / "stages" / "initial"]
    steps = [(100, 150, 200), (180,), (0,)]
    for place, numbers in zip(places, steps, strict=True):
        for number in numbers:
            (place / f"step-{number:08d}").mkdir(parents=True)
    checkpoints = RunCheckpoints(tmp_path, keep=3)
    moved = checkpoints.rewind(150)
    assert sorted(path.name for path in moved) == ["step-00000180.replaced-1", "step-00000200.replaced-1"]
    assert sorted(path.name for path in places[0].iterdir()) == [
        "step-00000100",
        "step-00000150",
        "step-00000200.replaced-1",
    ]
    (places[0] / "step-00000200").mkdir()
    assert [path.name for path in checkpoints.rewind(150)] == ["step-00000200.replaced-2"]
    assert checkpoints.rewind(150) == []


def test_another_model_of_the_same_shapes_is_refused(run: Path) -> None:
    config = small_config(run.parent)
    found = RunCheckpoints(run, keep=3).latest([]).checkpoint
    assert found is not None
    engine = small_engine(config)
    restore(found, engine, config.optimizer)
    engine.config = replace(config.model, rope_theta=10000.0, experts_per_token=1, name="other", init_std=0.5)
    expected = r"experts_per_token is 2 .* and 1 here, model.rope_theta is 73.0"
    with pytest.raises(AgreedError, match=expected) as raised:
        restore(found, engine, config.optimizer)
    assert raised.value.exit_code == 66
    assert "init_std" not in str(raised.value) and "\n" not in str(raised.value)


def test_export_is_checked_and_never_costs_an_earlier_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--dtype", "float32", "--check"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["stage"] == "initial" and last["logit_difference"] < 1e-4
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    cases = {73: [str(run)], 64: [str(run), "--replace", "--stage", "pretrian"]}
    for code, arguments in cases.items():
        assert export.main(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("bireme: ") and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before
    other = run.parent / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert export.main([str(run), "--replace", "--out", str(other)]) == 64
    assert [path.name for path in other.iterdir()] == ["config.json"]
    assert export.main([str(run), "--replace"]) == 0
    assert not (run / "export.new").exists() and (run / "export" / "config.json").exists()


def test_a_wrong_export_fails_the_check(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for value in (2e-4, float("nan")):
        monkeypatch.setattr(export, "logit_difference", lambda folder, value=value: value)
        assert export.main([str(run), "--check", "--out", str(tmp_path / f"export-{value}")]) == 77
        assert "logits differ" in capsys.readouterr().err


def test_the_configuration_is_the_checkpoints_own(run: Path) -> None:
    from train.reading import read_config

    config = small_config(run.parent)
    original = (run / "config.yaml").read_text()
    try:
        (run / "config.yaml").write_text(config_yaml(replace(config, model=replace(config.model, rope_theta=5.0))))
        assert asdict(read_config(run).model) == asdict(config.model)
    finally:
        (run / "config.yaml").write_text(original)


def test_generate_continues_a_prompt_of_either_language(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    assert export.main([str(run), "--out", str(folder)]) == 0
    tokenizer = train_tokenizer(["In the beginning", "却说那日"] * 20, TokenizerConfig(vocab_size=300))
    (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
    for prompt in ("In the beginning", "却说那日", "a <｜end▁of▁sentence｜> spelt out"):
        capsys.readouterr()
        assert generate.main([str(folder), "--prompt", prompt, "--tokens", "5"]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["prompt"] == prompt and isinstance(last["continuation"], str)
    assert generate.main([str(folder), "--prompt", "long " * 200]) == 64
    assert capsys.readouterr().err.startswith("bireme: generate: prompt has")


def test_speculative_and_plain_greedy_text_are_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def lines(*options: str) -> list[str]:
        capsys.readouterr()
        arguments = [str(run), "--prompt", "In the beginning", "--tokens", "8", "--temperature", "0", *options]
        assert generate.main(arguments) == 0
        return capsys.readouterr().out.splitlines()

    data = Path(small_config(run.parent).data.directory)
    assert data.is_relative_to(run.parent)
    tokenizer = train_tokenizer(["In the beginning"] * 20, TokenizerConfig(vocab_size=300))
    data.mkdir(parents=True, exist_ok=True)
    (data / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
    plain, naive, speculative = (
        lines(*options) for options in ((), ("--form", "naive"), ("--speculative", "--depths", "1"))
    )
    assert plain[0] == naive[0] == speculative[0]
    found, costs = (json.loads(text[-1]) for text in (speculative, plain))
    assert costs["main_forwards"] == costs["tokens"] and "acceptance_rate" not in costs
    assert found["main_forwards"] + sum(found["accepted"]) >= found["tokens"]
    assert found["acceptance_rate"] == sum(found["accepted"]) / sum(found["drafted"])
    assert f"{found['acceptance_rate']:.1%} of drafts accepted" in speculative[1]


def test_speculation_that_cannot_be_is_refused(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = replace(small_config(tmp_path).model, mtp_depth=0)
    folder = tmp_path / "export"
    export_model(folder, config, lambda name: initial_tensor(name, config, 0), length=128)
    tokenizer = train_tokenizer(["In the beginning"] * 20, TokenizerConfig(vocab_size=300))
    (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
    assert generate.main([str(folder), "--prompt", "In", "--speculative"]) == 64
    assert capsys.readouterr().err == (
        "bireme: generate: speculative decoding drafts with MTP depths, and this model has none\n"
    )
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(folder), "--prompt", "In", "--depths", "1"])
    assert stopped.value.code == 64
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(folder), "--prompt", "In", "--seed", str(2**70)])
    assert stopped.value.code == 64
    assert generate.main([str(folder), "--prompt", "In", "--temperature", "nan"]) == 64


@pytest.mark.parametrize("command", [evaluate, export, generate], ids=lambda module: module.__name__)
def test_wrong_usage_is_64(command: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--no-such-option"])
    assert stopped.value.code == 64
    arguments = [str(tmp_path), "--prompt", "x"] if command is generate else [str(tmp_path)]
    assert command.main(arguments) == 64
    unreachable = [str(tmp_path / ("x" * 300)), *arguments[1:]]
    assert command.main(unreachable) == 64
    assert "Traceback" not in capsys.readouterr().err
