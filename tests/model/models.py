"""Models for the tests, from the same YAML files that runs use."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from model.config import ModelConfig
from model.initialize import initialize
from model.transformer import Transformer

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


def model_config(name: str, **changes: object) -> ModelConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"), changes)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Initial values, with router biases of both signs so that they matter, and norms away from 1."""
    model = Transformer(config, dtype=dtype)
    initialize(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("router.bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2 - 0.4)
            elif name.endswith("norm"):
                value.add_(torch.randn(value.shape, generator=generator).to(dtype) * 0.1)
    return model


def random_tokens(config: ModelConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
