"""The count of sent and kept bytes: what it sees, and the whole of it at small widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fp8_bytes import FEW_EXPERTS, OTHER, cache, main, model_config, payload, row_bytes, storages
from benchmarks.layer_bytes import DENSE, MOVEMENTS, CodesOnly, Counted, count, filled
from launch.ledger.caches import layer_after_forward
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents
from launch.ledger.load import Load
from launch.ledger.working import all_to_all
from model.layer import TransformerLayer
from model.operands import Kept

# No width but one is a multiple of 128; experts get different numbers of rows, ranks too.
SMALL = (
    "hidden_size=144 q_lora_rank=64 kv_lora_rank=48 qk_nope_head_dim=32 qk_rope_head_dim=16 v_head_dim=32 num_heads=4 "
    "intermediate_size=272 moe_intermediate_size=48 num_routed_experts=16 num_expert_groups=4 groups_per_token=2 "
    "experts_per_token=3"
).split()
TOKENS, WIDTH, TILES, K = 40, 144, 2, 3
ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", str(TOKENS), "--model", *SMALL]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert found["differs"] == [] and OTHER not in printed
    ids, weights = 8 * K, 4 * K
    assert {movement: (row["bf16"], row["fp8"]) for movement, row in found["payload"].items()} == {
        "dispatch(F)": (2 * WIDTH + ids + weights, WIDTH + 4 * TILES + ids + weights),
        "combine(F)": (2 * WIDTH, 2 * WIDTH),
        "combine(B)": (2 * WIDTH, WIDTH + 4 * TILES),
        "dispatch(B)": (2 * WIDTH + weights, 2 * WIDTH + weights),
    }
    assert found["payload_ratio"] == round((WIDTH + 8 + 36) / (2 * WIDTH + 36), 4)
    for row in found["cache"].values():
        for precision in ("bf16", "fp8"):
            assert row[precision]["total"] == row[precision]["ledger"] == sum(row[precision]["items"].values())
    dense, moe = found["cache"]["dense"], found["cache"]["moe"]
    assert dense["fp8"]["items"]["SwiGLU input"] == 2 * 272 + 4 * 5
    # A token is expanded to K rows, whatever ranks they are on.
    assert moe["bf16"]["items"]["rows dispatched here"] == K * 2 * WIDTH
    assert moe["fp8"]["items"]["rows dispatched here"] == K * (WIDTH + 4 * TILES)
    assert moe["ratio"] == round(moe["fp8"]["total"] / moe["bf16"]["total"], 4) == found["cache_ratio"]["moe"]


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_weigh_what_the_ledger_has_in_flight(fp8: bool) -> None:
    """Its largest movement, rows sent and rows received."""
    config = model_config([])
    load, contents = Load(1, 64, 471, (64,) * 8), Contents(3, 4, 0, 1, 0, False, False)
    choices = Choices(caches="fp8" if fp8 else "bf16", working="lean")
    weighed = row_bytes(config, fp8)
    for backward, movements in ((False, MOVEMENTS[:2]), (True, MOVEMENTS[2:])):
        largest = max(weighed[movement] for movement in movements)
        assert all_to_all(config, contents, load, choices, backward) == 2 * load.moved * largest


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("moe", [False, True])
def test_storages_of_an_item_are_its_bytes(moe: bool, fp8: bool) -> None:
    config, load = model_config([]), Load(1, 64, 471, (64,) * 7 + (65,))
    found = {name: sum(sizes) for name, sizes in storages(config, moe, load, fp8).items()}
    assert found == layer_after_forward(config, moe, load, Choices(caches="fp8" if fp8 else "bf16"))


def test_the_document_holds_the_figures_of_the_default_run() -> None:
    """Those that the benchmark finds equal to what it counts."""
    config = model_config(FEW_EXPERTS)
    document = (ROOT / "docs" / "fp8.md").read_text(encoding="utf-8")
    plain, recipe = row_bytes(config, False), row_bytes(config, True)
    for name in MOVEMENTS:
        assert f"| {name} | {plain[name]:,} | {recipe[name]:,} | {recipe[name] / plain[name]:.3f} |" in document
    load = Load(1, 64, 128, (128,) * 4)
    for moe, name in ((False, "a dense layer"), (True, "an MoE layer")):
        bf16, fp8 = (
            sum(layer_after_forward(config, moe, load, Choices(caches=precision)).values()) / load.tokens
            for precision in ("bf16", "fp8")
        )
        assert f"| **{name}** | **{bf16:,.0f}** | **{fp8:,.0f}** | **{fp8 / bf16:.3f}** |" in document


def counted(fp8: bool) -> Counted:
    torch.manual_seed(0)
    return count(filled(TransformerLayer(model_config(SMALL), False, dtype=torch.bfloat16)), None, TOKENS, fp8)


@pytest.fixture(scope="module")
def plain() -> Counted:
    return counted(False)


def differences(plain: Counted, recipe: Counted) -> tuple[dict[str, Any], list[str]]:
    differs: list[str] = []
    return cache(model_config(SMALL), DENSE, {"bf16": [plain], "fp8": [recipe]}, differs), differs


def test_rows_that_live_on_are_counted_with_their_widened_copy(plain: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differences(plain, counted(True))[1] == []
    monkeypatch.setattr("model.ops.replace", lambda given, **_: given)
    row, differs = differences(plain, counted(True))
    # Inputs of q_a and kv_a (one for both), of gate_up and of down: codes, scales and FP32; of o, not widened.
    widened = 2 * (5 * WIDTH + 4 * TILES) + 5 * 272 + 4 * 3
    assert row["fp8"]["items"][OTHER] == widened + 128 + 4
    assert len(differs) == 1 and differs[0].startswith("dense layer, fp8")


def test_what_outlives_the_chunk_is_told(plain: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    hoard, keep = [], CodesOnly.keep_attention_output

    def hoarding(ops: CodesOnly, x: torch.Tensor) -> Kept:
        hoard.append(x.to(torch.float32))
        return keep(ops, x)

    monkeypatch.setattr(CodesOnly, "keep_attention_output", hoarding)
    assert differences(plain, counted(True))[1] == [f"dense layer, fp8: {4 * TOKENS * 128} bytes outlive the chunk"]


def test_a_row_of_another_size_is_told() -> None:
    config, load = model_config(SMALL), Load(1, TOKENS, 50, (TOKENS,) * 3)
    runs = {
        precision: [Counted([], 0, {name: (50, 50 * size) for name, size in row_bytes(config, fp8).items()}, load)]
        for precision, fp8 in (("bf16", False), ("fp8", True))
    }
    differs: list[str] = []
    payload(config, runs, differs)
    assert differs == []
    runs["fp8"][0].sent["combine(B)"] = (50, 50 * (WIDTH + 4 * TILES) + 1)
    payload(config, runs, differs)
    assert len(differs) == 1 and differs[0].startswith("combine(B), fp8: counted 7601 bytes in 50 rows")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens: found 0, must be at least 1"),
        (["--model", "widht=3"], "--model: Key 'widht'"),
        (["--model", "attention=gqa", "num_key_value_heads=2", "head_dim=32"], "allowed here are latent attention"),
        (["--model", "hidden_size=40"], "model.hidden_size: found 40, precision.fp8 allows multiples of 16"),
        (["--model", "groups_per_token=2"], "found 2, at most num_expert_groups (1)"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 64 and said in error and error.count("\n") == 1
