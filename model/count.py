"""Parameters, training FLOPs and cache bytes, from the configuration alone: one function each, for MFU, planner and
report.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from model.config import ModelConfig
from model.names import is_norm, is_router_bias, layer_shapes


@dataclass(frozen=True)
class ParameterCounts:
    """total: the main model, router biases included (`router_biases` of them), MTP excluded. active: parameters that
    one token uses, with the head and without the input embedding. mtp: all MTP depths without their shared embedding
    and head. parts: `total` by part; a head tied to the embedding counts as embedding.
    """

    total: int
    active: int
    mtp: int
    mtp_active: int
    router_biases: int
    parts: dict[str, int]


def _part(name: str) -> str:
    if is_norm(name):
        return "norms"
    if is_router_bias(name):
        return "router_biases"
    return {"mlp": "dense_mlp", "shared": "shared_experts", "experts": "routed_experts"}.get(
        name.split(".")[0], name.split(".")[0]
    )


def _layer_parts(config: ModelConfig, moe: bool) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, shape in layer_shapes(config, moe).items():
        parts[_part(name)] = parts.get(_part(name), 0) + prod(shape)
    return parts


def _active(parts: dict[str, int], config: ModelConfig) -> int:
    routed = parts.get("routed_experts", 0)
    if not routed:
        return sum(parts.values())
    idle = config.num_routed_experts - config.experts_per_token
    return sum(parts.values()) - routed // config.num_routed_experts * idle


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact counts (V3: total 671,026,419,200; 671,026,404,352 without the 14,848 router biases)."""
    V, d = config.vocab_size, config.hidden_size
    dense, moe = _layer_parts(config, False), _layer_parts(config, config.has_experts)
    dense_layers = config.dense_layers
    moe_layers = config.num_layers - dense_layers
    parts = {"embedding": V * d, "head": 0 if config.tie_embeddings else V * d, "norms": d}
    for name in dense.keys() | moe.keys():
        parts[name] = parts.get(name, 0) + dense_layers * dense.get(name, 0) + moe_layers * moe.get(name, 0)
    active = dense_layers * sum(dense.values()) + moe_layers * _active(moe, config) + d + V * d
    join = 3 * d + 2 * d * d
    depth = config.mtp_depth
    return ParameterCounts(
        total=sum(parts.values()),
        active=active,
        mtp=depth * (sum(moe.values()) + join),
        mtp_active=depth * (_active(moe, config) + join + V * d),
        router_biases=parts.get("router_biases", 0),
        parts={name: parts[name] for name in sorted(parts)},
    )


def training_flops_per_token(
    config: ModelConfig, length: int, causal: bool = True, mtp: bool = False
) -> dict[str, float]:
    """Floating-point operations of forward and backward per trained token, by part, and their sum as `total`.

    6 per active matrix parameter (input embedding, norms and biases excluded) plus 6 * layers * heads * (qk + v dims)
    * length for attention, halved when `causal`. Recomputation is not counted. V3 at 4096: 250.4e9 causal, 281.2e9
    not; with MTP 260.6e9 and 291.8e9.
    """
    V, d = config.vocab_size, config.hidden_size
    moe_layers = config.num_layers - config.dense_layers
    attention_layers = config.num_layers
    with_experts = _layer_parts(config, config.has_experts)
    layers = [(config.dense_layers, _layer_parts(config, False)), (moe_layers, with_experts)]
    flops = {"head": 6.0 * V * d}
    if mtp:
        flops["head"] += 6.0 * V * d * config.mtp_depth
        flops["mtp_projection"] = 6.0 * 2 * d * d * config.mtp_depth
        layers.append((config.mtp_depth, with_experts))
        attention_layers += config.mtp_depth
    for number, parts in layers:
        for name, size in parts.items():
            if name in ("norms", "router_biases"):
                continue
            if name == "routed_experts":
                size = size // config.num_routed_experts * config.experts_per_token
            key = "attention_projections" if name == "attention" else name
            flops[key] = flops.get(key, 0.0) + 6.0 * number * size
    scores = 6.0 * attention_layers * config.num_heads * (config.qk_head_dim + config.value_head_dim) * length
    flops["attention_scores"] = scores / 2 if causal else scores
    return flops | {"total": sum(flops.values())}


@dataclass(frozen=True)
class PartFlops:
    """Floating-point operations of forward and backward per token. embedding: a lookup, 0. mtp: one depth with its
    projection, layer and head."""

    dense_layer: float
    moe_layer: float
    embedding: float
    head: float
    mtp: float

    def layers(self, config: ModelConfig) -> list[float]:
        """Of each main layer in order."""
        dense = config.dense_layers
        return [self.dense_layer] * dense + [self.moe_layer] * (config.num_layers - dense)

    def output(self, config: ModelConfig) -> float:
        """Of what follows the last layer: head and all MTP depths."""
        return self.head + config.mtp_depth * self.mtp


def part_flops(config: ModelConfig, length: int, causal: bool = True) -> PartFlops:
    """`training_flops_per_token` by where it is computed, with MTP: the parts of a layout add up to its total."""
    scores = 6.0 * config.num_heads * (config.qk_head_dim + config.value_head_dim) * length

    def layer(moe: bool) -> float:
        parts = _layer_parts(config, moe)
        return 6.0 * (_active(parts, config) - parts["norms"] - parts.get("router_biases", 0)) + scores / (1 + causal)

    head, projection = 6.0 * config.vocab_size * config.hidden_size, 12.0 * config.hidden_size**2
    return PartFlops(layer(False), layer(config.has_experts), 0.0, head, projection + layer(config.has_experts) + head)


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that decoding keeps per token, of every main layer: latent and rotary key (V3 in BF16: 70,272), or the keys
    and values of all key-value heads.
    """
    if config.attention == "gqa":
        values = 2 * config.num_key_value_heads * config.head_dim
    else:
        values = config.kv_lora_rank + config.qk_rope_head_dim
    return values * config.num_layers * bytes_per_value
