"""The FP8 recipe as the products see it, against a table written from the papers; recipes that are wrong are caught.

Table: DeepSeek-V3 section 3.3 and appendix B. E4M3 everywhere; activations and their gradients in 1x128 tiles, weights
in 128x128 blocks, both operands of the weight gradient in 1x128 tiles along tokens. Scales are powers of two exactly
for the input of the output projection, the dispatched rows, and the gradient that enters the experts' down-projection.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import kernels.e5m6
import kernels.norm
import kernels.quantize
import kernels.swiglu
from data.contract import IGNORE, MicroBatch, StepCounts
from kernels.quantize import Quantized, dequantize, quantize_columns, quantize_rows
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.operands import Box, Input
from model.ops import Ops
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from tests.distributed_helper import run_distributed
from train.audit import AuditRow, OperandSummary, StepAudit, _OutsideProducts, merge
from train.engine import Engine, StepPlan

LENGTH, MICRO_BATCH, SEQUENCES = 128, 2, 8

# Linear -> which scales are powers of two: (fprop x, dgrad dy, wgrad dy, wgrad x).
REAL = (False, False, False, False)
ATTENTION = {
    "attention.q_a": REAL,
    "attention.q_b": REAL,
    "attention.kv_a": REAL,
    "attention.kv_b": REAL,
    "attention.o": (True, False, False, True),
}
DENSE = {**ATTENTION, "mlp.gate_up": REAL, "mlp.down": REAL}
MOE = {
    **ATTENTION,
    "shared.gate_up": REAL,
    "shared.down": REAL,
    "experts.gate_up": (True, False, False, True),
    "experts.down": (False, True, True, False),
}
LAYERS = {"layers.0": DENSE, "layers.1": MOE, "layers.2": MOE, "layers.3": MOE, "mtp.0.layer": MOE}
FP8 = {f"{layer}.{linear}": scales for layer, linears in LAYERS.items() for linear, scales in linears.items()}
# Outside the FP8 set: output head (used by the MTP depth too), MTP projection, routers.
PLAIN = {
    "head": {"bfloat16"},
    "mtp.0.proj": {"bfloat16"},
    **{f"{layer}.router": {"float32"} for layer in ("layers.1", "layers.2", "layers.3", "mtp.0.layer")},
}
TILES = {"fprop": ("1x128", "128x128"), "dgrad": ("1x128", "128x128"), "wgrad": ("1x128", "1x128")}
RESULT = {"fprop": "bfloat16", "dgrad": "bfloat16", "wgrad": "float32"}
BOUNDS = {"fprop": (0.01, 0.06), "dgrad": (0.01, 0.06), "wgrad": (0.01, 0.08)}


def demo(layers: int) -> ModelConfig:
    path = Path(__file__).parents[2] / "conf/model/demo.yaml"
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path), {"num_layers": layers})
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def random_batch(samples: list[int], vocabulary: int) -> MicroBatch:
    """Random tokens and labels: tokens that are alike would let the roundings of a weight gradient cancel."""
    draws = [np.random.default_rng(sample).integers(0, vocabulary, (4, LENGTH)) for sample in samples]
    tokens, labels, mtp_tokens, mtp_labels = np.stack(draws, 1)
    shape = tokens.shape
    positions = np.broadcast_to(np.arange(LENGTH), shape).copy()
    real, documents = np.ones(shape, bool), np.zeros(shape, np.int64)
    source = np.zeros(len(samples), np.int64)
    return MicroBatch(tokens, labels, positions, documents, mtp_tokens[None], mtp_labels[None], real, source)


def audited_step(
    rank: int, world_size: int, parallel: ParallelConfig, layers: int = 4, sequences: int = 4
) -> dict[str, Any]:
    config = demo(layers)
    engine = Engine(config, parallel, OptimizerConfig(), torch.bfloat16, True, rank, sources=1)
    engine.initialize(seed=3)
    order = engine.sample_order(0, sequences, MICRO_BATCH)
    batches = {key: random_batch(samples, config.vocab_size) for key, samples in order.items()}
    labels = sequences * LENGTH
    plan = StepPlan(StepCounts(labels, (labels,), sequences, labels), 1e-3, 0.3, BalanceWeights(sequence=1e-4), 1e-3)
    audit = StepAudit(engine.ops)
    with audit.watching():
        engine.step(batches, sequences // (engine.topology.replicas * MICRO_BATCH), plan)
    assert engine.ops.check is None
    return audit.found()


def named_layers(names: Iterable[str], layers: int) -> set[str]:
    """Those of a model with fewer layers than the table's."""
    return {name for name in names if not any(name.startswith(f"layers.{i}.") for i in range(layers, 4))}


def faults(parts: list[dict[str, Any]], layers: int = 4) -> list[str]:
    """Everything that the table does not allow."""
    rows, outside = merge(parts)
    found = [f"outside: {product}" for product in outside]
    by_key = {(row.name, row.kind): row for row in rows}
    expected = {(name, kind) for name in named_layers((*FP8, *PLAIN), layers) for kind in TILES}
    found += [f"{' '.join(key)}: {'missing' if key in expected else 'unknown'}" for key in expected ^ by_key.keys()]
    for (name, kind), row in by_key.items():
        if name in PLAIN:
            if not {*row.a.dtypes, *row.b.dtypes} <= PLAIN[name] | {"float32"} or row.a.tiles or row.b.tiles:
                found.append(f"{name} {kind}: {row.a.dtypes} {row.b.dtypes}")
        elif name in FP8:
            found += [f"{name} {kind}: {fault}" for fault in fp8_faults(row, FP8[name])]
    return found


def fp8_faults(row: AuditRow, scales: tuple[bool, bool, bool, bool]) -> list[str]:
    fprop_x, dgrad_dy, wgrad_dy, wgrad_x = scales
    powers = {"fprop": (fprop_x, False), "dgrad": (dgrad_dy, False), "wgrad": (wgrad_dy, wgrad_x)}[row.kind]
    found = []
    for side, operand, tile, power in zip("ab", (row.a, row.b), TILES[row.kind], powers, strict=True):
        seen = operand.dtypes, operand.tiles, operand.scale_dtypes, operand.codes_valid
        if seen != (["float8_e4m3fn"], [tile], ["float32"], True):
            found.append(f"{side} format {seen}")
            continue
        if operand.power_of_two != power:
            found.append(f"{side} power-of-two scales {operand.power_of_two}")
        # A tile that has its own scale uses the upper end of the format.
        if operand.least_peak is None or not (224 <= operand.least_peak <= 448 if power else operand.least_peak == 448):
            found.append(f"{side} scale is not its tile's: largest code {operand.least_peak}")
        if operand.floor_tiles > 0.05 * operand.tiles_seen:
            found.append(f"{side} {operand.floor_tiles} of {operand.tiles_seen} tiles at the floor")
    low, high = BOUNDS[row.kind]
    if row.difference is None or not low <= row.difference <= high or row.compared != row.products or row.not_finite:
        found.append(f"difference {row.difference} over {row.compared} of {row.products} products")
    if row.noise is None or not 0.02 <= row.noise <= 0.08:
        found.append(f"noise {row.noise}")
    if row.results != [RESULT[row.kind]]:
        found.append(f"result {row.results}")
    return found


def test_one_process_follows_the_table() -> None:
    part = audited_step(0, 1, ParallelConfig())
    assert faults([part]) == []
    rows, _ = merge([part])
    by_kind = {kind: [row.difference for row in rows if row.kind == kind and row.name in FP8] for kind in TILES}
    print({kind: (min(found), max(found)) for kind, found in by_kind.items()})


def test_four_processes_follow_the_table() -> None:
    parallel = ParallelConfig(pipeline=2, expert=2, schedule="dualpipe")
    parts = run_distributed(audited_step, 4, parallel, 4, SEQUENCES, timeout=200)
    assert faults(json.loads(json.dumps(parts))) == []
    rows, _ = merge(parts)
    assert len(rows) == 3 * (len(FP8) + len(PLAIN))
    # A chunk passes a layer on one rank, and there meets that rank's experts.
    chunks = SEQUENCES // MICRO_BATCH
    for row in rows:
        recomputed = row.name.endswith(("q_b", "kv_b")) and row.kind == "fprop"
        assert row.products == chunks * (2 if recomputed or row.name == "head" else 1), (row.name, row.kind)


# Wrong recipes --------------------------------------------------------------------------------------------------------


def bf16_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ops.linear

    def linear(
        self: Ops, x: torch.Tensor, weight: nn.Parameter, given: Input, name: str, box: Box | None = None
    ) -> torch.Tensor:
        if not name.endswith("layers.1.shared.down"):
            return right(self, x, weight, given, name, box)
        kept = x.detach()
        return self.high_linear(x, weight, lambda: kept, name, self.dtype)

    monkeypatch.setattr(Ops, "linear", linear)


def torch_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ops.multiply

    def multiply(self: Ops, given: Input, weight: nn.Parameter, name: str) -> torch.Tensor:
        if name != "layers.1.attention.kv_b":
            return right(self, given, weight, name)
        assert isinstance(given.rows, Quantized)
        return dequantize(given.rows, self.dtype) @ weight.detach().t()

    monkeypatch.setattr(Ops, "multiply", multiply)


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Quantized]) -> None:
    """In place of the quantiser wherever the torch back end calls it."""
    for module in (kernels.quantize, kernels.norm, kernels.swiglu, kernels.e5m6):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


def one_scale_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(x: torch.Tensor, power_of_two: bool = False) -> Quantized:
        q = quantize_rows(x, power_of_two)
        scale = q.scale.max().expand_as(q.scale).contiguous()
        codes = x.float() / scale.repeat_interleave(128, 1)[:, : x.shape[1]]
        return Quantized(codes.to(torch.float8_e4m3fn), scale)

    everywhere(monkeypatch, "quantize_rows", rows)


def every_scale_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, "quantize_rows", lambda x, power_of_two=False: quantize_rows(x, True))


def no_scale_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch, "quantize_rows", lambda x, power_of_two=False: quantize_rows(x, False))


def gradient_scales_of_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def columns(x: torch.Tensor, power_of_two: bool = False, counts: Any = None) -> Quantized:
        q = quantize_columns(x, power_of_two, counts)
        return Quantized(q.data, q.scale.roll(1, 1), q.counts)

    everywhere(monkeypatch, "quantize_columns", columns)


def gradient_rows_of_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def columns(x: torch.Tensor, power_of_two: bool = False, counts: Any = None) -> Quantized:
        return quantize_columns(x if counts is not None else x.roll(128, 0), power_of_two, counts)

    right = Ops.multiply_backward

    def multiply_backward(
        self: Ops, dy: torch.Tensor, given: Input, weight: nn.Parameter, name: str, box: Box | None = None
    ) -> torch.Tensor:
        with monkeypatch.context() as patch:
            everywhere(patch, "quantize_columns", columns)
            return right(self, dy, given, weight, name, box)

    monkeypatch.setattr(Ops, "multiply_backward", multiply_backward)


# Wrong recipe -> what the audit must say of it: (part of a row's name and kind, part of the fault).
WRONG: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, str]] = {
    bf16_linear: ("layers.1.shared.down fprop", "a format (['bfloat16']"),
    torch_linear: ("outside: mm", "test_fp8_audit:multiply"),
    one_scale_per_tensor: ("mlp.gate_up fprop", "a scale is not its tile's"),
    every_scale_a_power_of_two: ("layers.0.attention.q_a fprop", "a power-of-two scales True"),
    no_scale_a_power_of_two: ("layers.1.experts.gate_up fprop", "a power-of-two scales False"),
    gradient_scales_of_other_tiles: ("layers.1.attention.q_a wgrad", "difference"),
    gradient_rows_of_other_tiles: ("layers.0.mlp.down wgrad", "difference"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_recipes_are_caught(wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    found = faults([audited_step(0, 1, ParallelConfig(), layers=2)], layers=2)
    where, what = WRONG[wrong]
    assert any(where in fault and what in fault for fault in found), found[:10]


@pytest.mark.parametrize(
    ("module", "outside"), [("kernels.libraries.scaled_mm", 0), ("kernels.gemm", 0), ("model.layer", 1)]
)
def test_products_belong_to_the_back_ends(module: str, outside: int) -> None:
    place: dict[str, Any] = {"__name__": module}
    exec("def product(x): return x @ x", place)
    found: Counter[str] = Counter()
    with _OutsideProducts(found):
        place["product"](torch.ones(2, 2))
    assert found.total() == outside


def test_gradients_far_below_one_keep_their_bits() -> None:
    """At 63 million tokens a step a gradient is some 1e-10: its tiles need scales of their own size."""
    dy = torch.randn(256, 256) * 1e-10
    for q in (quantize_rows(dy), quantize_rows(dy, power_of_two=True), quantize_columns(dy)):
        back = dequantize(q) if q.data.is_contiguous() else dequantize(q).t()
        assert (back - dy).norm() < 0.03 * dy.norm()


def test_summaries_survive_json_and_do_not_average_deviations_away() -> None:
    x, part = torch.randn(256, 256), OperandSummary.of(quantize_rows(torch.randn(256, 256), power_of_two=True))
    assert OperandSummary(**json.loads(json.dumps(asdict(part)))) == part
    part.add(OperandSummary.of(x))
    assert part.dtypes == ["float32", "float8_e4m3fn"] and part.tiles == ["1x128"] and part.power_of_two is True
    part.add(OperandSummary.of(quantize_rows(x)))
    assert part.power_of_two is False and part.tiles_seen == 1024


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_columns])
def test_an_operand_of_no_tokens_says_nothing(quantize: Callable[[torch.Tensor], Quantized]) -> None:
    nothing = OperandSummary.of(quantize(torch.empty(0, 256)))
    assert nothing.least_peak == 0.0 and nothing.tiles_seen == 0 and nothing.codes_valid
    something = OperandSummary.of(quantize(torch.ones(128, 256)))
    peak = something.least_peak
    something.add(nothing)
    assert something.least_peak == peak and something.codes_valid


def test_labels_of_the_random_batch_are_all_counted() -> None:
    assert (random_batch([0, 1], 4096).labels != IGNORE).all()
