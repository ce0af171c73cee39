"""A model by name: conf/model/NAME.yaml through the schema, with single numbers changed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from model.config import ModelConfig, RopeScaling, config_problems

CONF = Path(__file__).resolve().parent.parent / "conf" / "model"
KEYS = [
    *(item.name for item in fields(ModelConfig) if item.name != "rope_scaling"),
    *(f"rope_scaling.{item.name}" for item in fields(RopeScaling)),
]


def model_names() -> list[str]:
    """Every model of conf/model."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def named_config(name: str, changes: Mapping[str, str] | None = None) -> ModelConfig:
    """The model called `name`, with `changes` (dotted key of the schema -> text) made to it.

    Raises ValueError, one line: an unknown name or key, a value of another type, numbers that make no model.
    """
    if name not in model_names():
        raise ValueError(f"model={name}: unknown; allowed: {', '.join(model_names())}")
    changes = changes or {}
    for key in changes:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean model.{close[0]}?" if close else f"allowed: {', '.join(KEYS)}"
            raise ValueError(f"model.{key}: unknown; {hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{CONF / f'{name}.yaml'}: {_line(error)}") from None
    for key, text in changes.items():
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{key}={text}"]))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"model.{key}={text}: {_line(error)}") from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    problems = config_problems(config)
    if problems:
        raise ValueError(f"model={name}: {'; '.join(problems)}")
    return config


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
