"""The FP8 loss study: what its formats put into every quantised operand, its verdict, and the whole of it when tiny."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fp8_study
from benchmarks.fp8_figures import judge, relative_difference
from benchmarks.fp8_run import START, VARIANTS, Run, learning_rate, train
from benchmarks.fp8_variants import e4m1_codes, quantised_as
from kernels import swiglu
from kernels.quantize import (
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    requantize_columns,
)
from tests.data.synthetic import VOCABULARY, token_corpus

SMALL = (
    "model.hidden_size=128 model.num_layers=1 model.num_heads=2 model.q_lora_rank=32 model.kv_lora_rank=32 "
    "model.qk_nope_head_dim=16 model.qk_rope_head_dim=16 model.v_head_dim=16 model.moe_intermediate_size=64 "
    f"model.num_routed_experts=4 model.vocab_size={VOCABULARY}"
).split()
GROUPS = [130, 0, 40, 86]
PATHS: dict[str, Callable[[torch.Tensor, torch.Tensor], Quantized]] = {
    "rows": lambda x, w: quantize_rows(x),
    "rows, power of two": lambda x, w: quantize_rows(x, power_of_two=True),
    "columns": lambda x, w: quantize_columns(x),
    "grouped columns": lambda x, w: quantize_columns(x, counts=GROUPS),
    "blocks": lambda x, w: quantize_blocks(w[0]),
    "stacked blocks": lambda x, w: quantize_blocks(w),
    "requantised": lambda x, w: requantize_columns(quantize_rows(x, power_of_two=True), True),
    "requantised groups": lambda x, w: requantize_columns(quantize_rows(x, power_of_two=True), True, GROUPS),
}


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [256, 272] of very different sizes, weights [3, 144, 272]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 272, generator=generator) * torch.exp2(torch.randint(-9, 9, (1, 272), generator=generator))
    return x, torch.randn(3, 144, 272, generator=generator)


def made(path: str, form: str | None) -> Quantized:
    if form is None:
        return PATHS[path](*numbers())
    with quantised_as(form):
        return PATHS[path](*numbers())


def same(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("path", PATHS)
def test_the_control_has_one_mantissa_bit_and_the_recipe_is_untouched(path: str) -> None:
    plain, control = made(path, None), made(path, "e4m1")
    assert (control.data.view(torch.uint8) & 0b11).count_nonzero() == 0
    assert control.data.view(torch.uint8).unique().numel() > 20
    assert (plain.data.view(torch.uint8) & 0b11).count_nonzero() > 0
    assert control.shape == plain.shape and control.scale.shape == plain.scale.shape
    assert same(made(path, "recipe"), plain)
    assert same(made(path, None), plain), "the format outlived its context"


@pytest.mark.parametrize("path", PATHS)
def test_one_scale_for_each_matrix(path: str) -> None:
    plain, whole = made(path, None), made(path, "per_tensor")
    assert whole.scale.flatten(-2).unique(dim=-1).shape[-1] == 1
    if "requantised" not in path:
        assert torch.equal(whole.scale.amax((-2, -1)), plain.scale.amax((-2, -1)))
    assert not same(whole, plain)


def test_one_bit_rounding_is_to_nearest_and_even() -> None:
    """Against a search over all numbers of the format."""
    values = [m * 2.0**e for e in range(-6, 9) for m in (1.0, 1.5)] + [0.0, 2.0**-7]
    table = np.array(sorted(values))
    generator = torch.Generator().manual_seed(1)
    middles = torch.from_numpy((table[1:] + table[:-1]) / 2).float()
    inputs = torch.cat((torch.rand(5000, generator=generator) * 384, torch.exp2(-10 * torch.rand(5000)), middles))
    found = e4m1_codes(inputs).float().numpy()
    for x, y in zip(inputs.double().numpy(), found, strict=True):
        distance = np.abs(table - x)
        nearest = np.flatnonzero(distance == distance.min())
        assert table[nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]] == y
    assert np.array_equal(e4m1_codes(-inputs).float().numpy(), -found)


def test_the_cache_of_swiglu_is_no_operand() -> None:
    x = numbers()[0][:, :256].to(torch.bfloat16)
    plain_kept, plain_rows = swiglu.swiglu_tiles(x)
    with quantised_as("e4m1"):
        kept, rows = swiglu.swiglu_tiles(x)
    assert torch.equal(dequantize(kept), dequantize(plain_kept))
    assert not torch.equal(dequantize(rows), dequantize(plain_rows))


def test_learning_rate() -> None:
    run = Run("bf16", 1, "", steps=1000, tokens=256, length=128, rate=2.0)
    rates = [learning_rate(run, step) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 50) and max(rates) == rates[49] == 2.0
    assert rates[-1] == pytest.approx(0.04, rel=0.01) and rates[49:] == sorted(rates[49:], reverse=True)
    start = replace(run, variant=START)
    assert {learning_rate(start, step) for step in range(50, 1000)} == {2.0} and learning_rate(start, 0) == 2 / 50
    # What goes on from a start has no warm-up.
    assert learning_rate(replace(run, start=600), 0) == 2.0


def test_relative_difference_is_signed() -> None:
    assert relative_difference([2.2] * 50, [2.0] * 50) == pytest.approx(0.1)
    assert relative_difference([1.9] * 50, [2.0] * 50) == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("fp8", "control", "missed"),
    [
        ((0.001, 0.002, 0.003), (0.010, 0.012, 0.014), []),
        ((0.001, 0.002, 0.003), (0.002, 0.005, 0.008), ["without power"]),
        ((-0.004, -0.003, -0.0026), (0.05, 0.05, 0.05), ["recipe"]),
        ((0.001,), (0.5,), ["without power"]),
    ],
)
def test_verdict(fp8: tuple[float, ...], control: tuple[float, ...], missed: list[str]) -> None:
    def losses(differences: tuple[float, ...]) -> dict[int, list[float]]:
        return {seed: [4.0 * (1 + value)] * 10 for seed, value in enumerate(differences, 1)}

    verdict = judge({"bf16": losses((0.0,) * len(fp8)), "fp8": losses(fp8), "e4m1": losses(control)})
    assert verdict.mean["fp8"] == pytest.approx(np.mean(fp8))
    if len(fp8) > 1:
        pooled = np.sqrt((np.var(fp8, ddof=1) + np.var(control, ddof=1)) / 2)
        assert verdict.pooled == pytest.approx(pooled, abs=1e-12)
    assert [line.split(":")[0] for line in verdict.missed()] == missed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    token_corpus(directory, {"en": 120, "zh": 80})
    return directory


def test_variants_differ_and_seeds_are_paired(corpus: Path, tmp_path: Path) -> None:
    def first(variant: str, seed: int) -> tuple[float, list[int]]:
        run = Run(variant, seed, str(corpus), 2, 64, 32, 1e-3, overrides=tuple(SMALL))
        losses, labels = zip(*train(run, tmp_path), strict=True)
        return losses[1], np.concatenate(labels).tolist()

    found = {variant: first(variant, 1) for variant in VARIANTS}
    assert len({loss for loss, _ in found.values()}) == len(VARIANTS)
    assert all(labels == found["bf16"][1] for _, labels in found.values())
    assert first("bf16", 1) == found["bf16"] and first("bf16", 2)[1] != found["bf16"][1]


def test_sequences_that_come_again(corpus: Path, tmp_path: Path) -> None:
    def labels(distinct: int) -> list[list[int]]:
        run = Run("bf16", 1, str(corpus), 5, 64, 32, 1e-3, distinct=distinct, overrides=tuple(SMALL))
        return [found.tolist() for _, found in train(run, tmp_path)]

    again, endless = labels(4), labels(0)
    assert again[:2] == again[2:4] == endless[:2] and again[4] == again[0]
    assert endless[2] not in (endless[0], endless[1])


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fp8_study", *arguments])
    with pytest.raises(SystemExit) as ended:
        fp8_study.main()
    return int(ended.value.code or 0)


def test_the_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--corpus", str(corpus), "--tokens", "64", "--length", "32", "--seeds", "1"]
    arguments += ["--image", str(tmp_path / "plot.png"), "--steps", "5", "--start", "2"]
    assert call(monkeypatch, *arguments, "--report", *SMALL) == 64
    assert "no seed has all" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, *SMALL) == 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["missed"][0].startswith("without power") and figures["seeds"] == [1]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    kept = (out / "fp8-seed1.jsonl").read_text()
    (out / "e4m1-seed1.jsonl").rename(out / "e4m1-seed1.jsonl.part")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert call(monkeypatch, *arguments, *SMALL) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) | {"seconds_per_step": 0} == figures | {
        "seconds_per_step": 0
    }
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "fp8-seed1.jsonl").read_text() == kept and not list(out.glob("*.part"))
    assert call(monkeypatch, *arguments, "--rate", "2e-3", *SMALL) == 64
    assert "made with another rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "100"], "--tokens: found 100, allowed multiples of --length 128"),
        (["--distinct", "3"], "--distinct: found 3, allowed 0 and multiples of a step's 2 sequences"),
        (["--start", "-1"], "--start: found -1, allowed 0 or more"),
        (["--seeds", "0"], "--seeds: found 0, allowed 1 or more"),
        (["--start-rate", "nan"], "--start-rate: found nan, allowed 0 or more"),
        (["--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
    ],
)
def test_usage(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--out", str(tmp_path / "out"), *arguments) == 64
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": {said}")
    assert not (tmp_path / "out").exists()
