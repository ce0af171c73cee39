"""From the YAML groups in `conf/` and `key=value` arguments to a checked `RunConfig`, the same on every rank."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from data.compose import compose_dataclass
from data.errors import DataError
from kernels import backends
from kernels.quantize import WIDTH_MULTIPLE
from model.config import ModelConfig, config_problems
from model.partition import stage_layout
from parallel.optimizer.config import DTYPES, GroupConfig, group_problems
from parallel.pipeline.contract import ORDERS
from parallel.schedule.registry import build
from train.config import RunConfig, StageConfig
from train.errors import ConfigError
from train.schedules import SHAPES

CONF = Path(__file__).resolve().parent.parent / "conf"
COMPUTE = {"bfloat16": "bfloat16", "float32": "float32", "float64": "float64"}


def compose_run(overrides: Sequence[str], conf: Path = CONF) -> RunConfig:
    """conf/config.yaml with overrides, validated. Raises ConfigError with all problems in one line."""
    try:
        config = compose_dataclass(RunConfig, "config", overrides, conf)
    except DataError as error:
        raise ConfigError(str(error)) from None
    problems = problems_of(config)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def problems_of(config: RunConfig) -> list[str]:
    """Everything that cannot work, each with its key, what was found and what is allowed."""
    p, m, found = config.parallel, config.model, list[str]()
    for key in ("pipeline", "expert", "data"):
        if getattr(p, key) < 1:
            found.append(f"parallel.{key}: found {getattr(p, key)}, allowed 1 or more")
    found += config_problems(m)
    if found:
        return found
    if p.order not in ORDERS:
        found.append(f"parallel.order: found '{p.order}', allowed {', '.join(ORDERS)}")
    if m.num_routed_experts % p.expert or (not m.has_experts and p.expert > 1):
        allowed = f"divisors of {m.num_routed_experts} experts" if m.has_experts else "1 (the model has no experts)"
        found.append(f"parallel.expert: found {p.expert}, allowed {allowed}")
    if p.stages_per_rank < 0:
        found.append(f"parallel.stages_per_rank: found {p.stages_per_rank}, allowed 0 or more")
    if any(step < 1 for step in config.logging.trace_steps):
        found.append(f"logging.trace_steps: found {config.logging.trace_steps}, allowed steps from 1")
    if config.precision.compute not in COMPUTE:
        found.append(f"precision.compute: found '{config.precision.compute}', allowed {', '.join(COMPUTE)}")
    if config.precision.fp8 and config.precision.compute != "bfloat16":
        found.append(f"precision.fp8: needs precision.compute bfloat16, found {config.precision.compute}")
    found += backends.config_problems(config.kernels)
    for key in ("master_dtype", "moment_dtype", "accumulate_dtype"):
        if getattr(config.optimizer, key) not in DTYPES:
            value = getattr(config.optimizer, key)
            found.append(f"optimizer.{key}: found '{value}', allowed {', '.join(DTYPES)}")
    if config.optimizer.master_dtype == "bfloat16":
        found.append("optimizer.master_dtype: found 'bfloat16', allowed float32, float64")
    if m.value_head_dim > m.qk_head_dim:
        found.append(f"model.v_head_dim: found {m.v_head_dim}, allowed at most the query's {m.qk_head_dim}")
    if m.has_experts and m.first_dense_layers >= m.num_layers and not m.mtp_depth:
        found.append(
            f"model.first_dense_layers: found {m.first_dense_layers}, at least one layer must have experts "
            "(a dense model has num_routed_experts 0)"
        )
    for key in ("eps", "weight_decay", "clip"):
        if not 0 <= getattr(config.optimizer, key) < math.inf:
            found.append(f"optimizer.{key}: found {getattr(config.optimizer, key)}, allowed 0 or more")
    found += group_problems(config.optimizer.groups)
    if m.tie_embeddings and config.optimizer.groups.head != GroupConfig():
        found.append("optimizer.groups.head: with model.tie_embeddings the head is in optimizer.groups.embedding")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(config.optimizer, key) < 1:
            found.append(f"optimizer.{key}: found {getattr(config.optimizer, key)}, allowed 0 up to, but not, 1")
    for key in ("every", "keep"):
        if getattr(config.checkpoint, key) < 0:
            found.append(f"checkpoint.{key}: found {getattr(config.checkpoint, key)}, allowed 0 or more")
    if not p.timeout_seconds > 0:
        found.append(f"parallel.timeout_seconds: found {p.timeout_seconds}, allowed above 0")
    if not config.name or not all(part.strip(".") for part in config.name.split("/")):
        found.append(f"name: found '{config.name}', allowed a directory name below root (no empty part, no '..')")
    if config.precision.fp8:
        found += fp8_problems(m)
    if config.logging.wandb not in ("offline", "online", "disabled"):
        found.append(f"logging.wandb: found '{config.logging.wandb}', allowed offline, online, disabled")
    if config.resume not in ("auto", "never"):
        found.append(f"resume: found '{config.resume}', allowed auto, never")
    if not 0 <= config.data.fim_rate <= 1:
        found.append(f"data.fim_rate: found {config.data.fim_rate}, allowed 0 to 1")
    if config.data.cache_bytes < 1:
        found.append(f"data.cache_bytes: found {config.data.cache_bytes}, allowed 1 or more")
    if not config.stages:
        found.append("stages: none given; choose an experiment (experiment=demo) or write them")
    names = [stage.name for stage in config.stages]
    if len(set(names)) != len(names):
        found.append(f"stages: names must differ, found {names}")
    for name in names:
        if name == "initial" or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            found.append(f"stages: name '{name}', allowed letters, digits, _ and -, and not 'initial'")
    for i, stage in enumerate(config.stages):
        found += _stage_problems(config, stage, f"stages.{i}")
    return list(dict.fromkeys(found))


def fp8_problems(m: ModelConfig) -> list[str]:
    """Each side of every linear layer that runs in FP8 is the reduced one of one of its three products."""
    widths = {"hidden_size": m.hidden_size, "intermediate_size": m.intermediate_size}
    if m.has_experts:
        widths["moe_intermediate_size"] = m.moe_intermediate_size
    if m.attention == "gqa":
        widths["num_heads x head_dim"] = m.num_heads * m.head_dim
        widths["num_key_value_heads x head_dim"] = m.num_key_value_heads * m.head_dim
    else:
        widths |= {
            "q_lora_rank": m.q_lora_rank,
            "kv_lora_rank": m.kv_lora_rank,
            "kv_lora_rank + qk_rope_head_dim": m.kv_lora_rank + m.qk_rope_head_dim,
            "num_heads x (qk_nope_head_dim + qk_rope_head_dim)": m.num_heads * m.qk_head_dim,
            "num_heads x (qk_nope_head_dim + v_head_dim)": m.num_heads * (m.qk_nope_head_dim + m.v_head_dim),
            "num_heads x v_head_dim": m.num_heads * m.v_head_dim,
        }
    return [
        f"model.{name}: found {width}, precision.fp8 allows multiples of {WIDTH_MULTIPLE}"
        for name, width in widths.items()
        if width % WIDTH_MULTIPLE
    ]


def _stage_problems(config: RunConfig, stage: StageConfig, at: str) -> list[str]:
    found = []
    for key in ("length", "tokens", "micro_batch"):
        if getattr(stage, key) < 1:
            found.append(f"{at}.{key}: found {getattr(stage, key)}, allowed 1 or more")
    for key in ("sequences", "learning_rate", "mtp_weight", "bias_update"):
        pieces = getattr(stage, key)
        if not pieces:
            found.append(f"{at}.{key}: empty, at least one piece is needed")
        untils = [piece.until for piece in pieces]
        if untils != sorted(set(untils)):
            found.append(f"{at}.{key}: `until` must grow, found {untils}")
    for piece in stage.learning_rate:
        if piece.shape not in SHAPES:
            found.append(f"{at}.learning_rate: shape found '{piece.shape}', allowed {', '.join(SHAPES)}")
        if min(piece.start, piece.end) < 0:
            found.append(f"{at}.learning_rate: found {min(piece.start, piece.end)}, allowed 0 or more")
    for kind, weight in vars(stage.balance).items():
        if not 0 <= weight < math.inf:
            found.append(f"{at}.balance.{kind}: found {weight}, allowed 0 or more")
    for name, limits in stage.documents.items():
        if not 0 <= limits.shortest <= limits.longest:
            found.append(
                f"{at}.documents.{name}: found {limits.shortest} to {limits.longest}, allowed 0 <= shortest <= longest"
            )
    for i, samples in enumerate(stage.skip):
        if not 0 <= samples.first < samples.end:
            found.append(f"{at}.skip.{i}: found {samples.first} to {samples.end}, allowed 0 <= first < end")
    if found:
        return found
    parallel = config.parallel
    replicas = parallel.expert * parallel.data
    for wanted in stage.sequences:
        per_pipeline, rest = divmod(int(wanted.value), replicas * stage.micro_batch)
        if rest or wanted.value != int(wanted.value):
            found.append(
                f"{at}.sequences: found {wanted.value}, allowed multiples of {replicas * stage.micro_batch} "
                f"({replicas} replicas x micro-batches of {stage.micro_batch})"
            )
            continue
        try:
            table = build(parallel.schedule, parallel.pipeline, per_pipeline, parallel.stages_per_rank or None)
        except ValueError as error:
            found.append(f"{at}.sequences: {wanted.value:g} gives {per_pipeline} micro-batches per pipeline: {error}")
            continue
        if parallel.layout:
            try:
                stage_layout(config.model, table, parallel.layout)
            except ValueError as error:
                found.append(str(error))
    return found


def config_json(config: RunConfig) -> str:
    """The resolved configuration as canonical JSON."""
    return json.dumps(asdict(config), sort_keys=True, indent=1)


def config_digest(config: RunConfig) -> str:
    """sha256 of the resolved configuration; equal on all ranks of a run."""
    return hashlib.sha256(config_json(config).encode()).hexdigest()


def config_yaml(config: RunConfig) -> str:
    """The resolved configuration as it is saved in the run directory."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
