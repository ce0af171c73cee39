"""What a run should be told when it starts, and not at its end: settings without effect, an export that is refused."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.backends import PRODUCTS
from model.errors import ModelError
from model.released_family import family_of
from train.config import RunConfig, StageConfig


def notes(config: RunConfig, table: Mapping[str, str]) -> list[str]:
    """One line each; empty when there is nothing to say. None of it is an error: models and experiments combine
    freely. table: op -> back end, as resolved (`kernels.backends.Kernels.table`).
    """
    found = [
        f"stages.{i}: no effect of {line}" for i, stage in enumerate(config.stages) for line in _idle(config, stage)
    ]
    if not config.precision.fp8:
        found += [
            f"no effect of kernels.{op}={name}: precision.fp8 is off"
            for op in ("quantize", "gemm", "grouped_gemm", "e5m6")
            if (name := getattr(config.kernels, op)) != "auto"
        ]
    products = config.precision.fp8 and "triton" in (table[op] for op in PRODUCTS)
    if config.kernels.measured and not products:
        found.append(f"no effect of kernels.measured={config.kernels.measured}: no product runs on triton")
    if config.kernels.num_sms and not products and table["norm"] != "triton":
        found.append(f"no effect of kernels.num_sms={config.kernels.num_sms}: no product and no norm runs on triton")
    if config.model.has_experts and not config.model.router_bias:
        found += [
            f"stages.{i}: nothing balances the experts: every balance weight is 0 and routers have no bias"
            for i, stage in enumerate(config.stages)
            if not stage.balance.asked
        ]
    try:
        for stage in config.stages:
            family_of(config.model, stage.length)
    except ModelError as error:
        found += [f"no Hugging Face export: {line}" for line in str(error).splitlines()]
    return found


def _idle(config: RunConfig, stage: StageConfig) -> list[str]:
    model = config.model
    found = []
    asked = [kind for kind, weight in vars(stage.balance).items() if weight]
    # The default of a stage that says nothing of it is not worth a line.
    if not model.has_experts and stage.balance != StageConfig().balance:
        found += [f"balance.{kind}: the model has no experts" for kind in asked]
    elif model.num_expert_groups == 1:
        found += [
            f"balance.{kind}: a constant with one group of experts"
            for kind in asked
            if kind in ("device", "communication")
        ]
    if not model.router_bias and any(step.value for step in stage.bias_update):
        found.append("bias_update: the model's routers have no bias")
    if not model.mtp_depth and any(step.value for step in stage.mtp_weight):
        found.append("mtp_weight: the model has no MTP")
    return found
