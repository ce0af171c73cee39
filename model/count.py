"""Parameters, training FLOPs and cache bytes, from the configuration alone: one function each, for MFU, planner and
report.

FLOPs are those of matrix products, forward and backward, per token: 2 per parameter and product, 3 products.
Elementwise work (norms, RoPE, softmax, SwiGLU, routing) and the embedding's lookup are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from model.config import ModelConfig
from model.names import is_norm, is_router_bias, layer_shapes

Flops = dict[str, float]
UP_PROJECTIONS = ("attention.q_b", "attention.kv_b")


@dataclass(frozen=True)
class ParameterCounts:
    """total: the main model, router biases included (`router_biases` of them), MTP excluded. active: parameters that
    one token uses, with the head and without the input embedding. mtp: all MTP depths without their shared embedding
    and head. parts, active_parts: `total` and `active` by part; a tied head counts as embedding in the first.
    """

    total: int
    active: int
    mtp: int
    mtp_active: int
    router_biases: int
    parts: dict[str, int]
    active_parts: dict[str, int]


def part_of(name: str) -> str:
    """The part that a tensor of a layer (named without the layer's prefix) is counted with."""
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
        parts[part_of(name)] = parts.get(part_of(name), 0) + prod(shape)
    return parts


def _active_parts(config: ModelConfig, moe: bool) -> dict[str, int]:
    parts = _layer_parts(config, moe)
    if "routed_experts" in parts:
        parts["routed_experts"] = parts["routed_experts"] // config.num_routed_experts * config.experts_per_token
    return parts


def _add(total: dict[str, int], more: dict[str, int], times: int) -> None:
    for name, size in more.items():
        if times:
            total[name] = total.get(name, 0) + times * size


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact counts (V3: total 671,026,419,200; 671,026,404,352 without the 14,848 router biases)."""
    V, d = config.vocab_size, config.hidden_size
    parts = {"embedding": V * d, "head": 0 if config.tie_embeddings else V * d, "norms": d}
    active = {"head": V * d, "norms": d}
    moe_layers = config.num_layers - config.dense_layers
    for number, moe in ((config.dense_layers, False), (moe_layers, config.has_experts)):
        _add(parts, _layer_parts(config, moe), number)
        _add(active, _active_parts(config, moe), number)
    join, depth = 3 * d + 2 * d * d, config.mtp_depth
    return ParameterCounts(
        total=sum(parts.values()),
        active=sum(active.values()),
        mtp=depth * (sum(_layer_parts(config, config.has_experts).values()) + join),
        mtp_active=depth * (sum(_active_parts(config, config.has_experts).values()) + join + V * d),
        router_biases=parts.get("router_biases", 0),
        parts={name: parts[name] for name in sorted(parts)},
        active_parts={name: active[name] for name in sorted(active)},
    )


# FLOPs ----------------------------------------------------------------------------------------------------------------


def matrix_flops(config: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
    """Of one tensor of a layer: 6 per parameter of a matrix, of a routed expert for the share of tokens that reach
    it; 0 for norms and biases.
    """
    if len(shape) != 2:
        return 0.0
    share = config.experts_per_token / config.num_routed_experts if part_of(name) == "routed_experts" else 1.0
    return 6.0 * prod(shape) * share


def score_flops(config: ModelConfig, length: int, causal: bool = True) -> float:
    """Of one layer's attention between its projections: 6 * heads * (qk + value width) * length (V3: 320 * 128 heads),
    half of it where only the pairs that the mask lets through count.
    """
    return 6.0 * config.num_heads * (config.qk_head_dim + config.value_head_dim) * length / (1 + causal)


def layer_flops(config: ModelConfig, moe: bool, length: int, causal: bool = True) -> Flops:
    """One layer by part: attention_projections, attention_scores, and dense_mlp or router, shared_experts,
    routed_experts.
    """
    found: Flops = {}
    for name, shape in layer_shapes(config, moe).items():
        part = {"attention": "attention_projections"}.get(part_of(name), part_of(name))
        flops = matrix_flops(config, name, shape)
        if flops:
            found[part] = found.get(part, 0.0) + flops
    return found | {"attention_scores": score_flops(config, length, causal)}


def training_flops_per_token(config: ModelConfig, length: int, causal: bool = True, mtp: bool = False) -> Flops:
    """Forward and backward per trained token in sequences of `length`, by part, and their sum as `total`.

    Recomputation is not counted (`recompute_flops_per_token`). V3 at 4096: 250.4e9 causal, 281.2e9 not; with MTP
    260.6e9 and 291.8e9. The published MFU of V3 counts neither MTP nor recomputation.
    """
    V, d = config.vocab_size, config.hidden_size
    depths = config.mtp_depth if mtp else 0
    flops = {"head": 6.0 * V * d * (1 + depths)}
    if depths:
        flops["mtp_projection"] = 12.0 * d * d * depths
    for number, moe in _layer_kinds(config, depths):
        for part, size in layer_flops(config, moe, length, causal).items():
            flops[part] = flops.get(part, 0.0) + number * size
    return flops | {"total": sum(flops.values())}


def recompute_flops_per_token(
    config: ModelConfig, length: int, causal: bool = True, mtp: bool = False, recompute: bool = True
) -> Flops:
    """What the backward computes again, by part, and the sum as `total`: on top of `training_flops_per_token`.

    attention_up_projections: queries, keys and values from MLA's latents, unless `recompute` is off (V3 section 3.2.3;
    RMSNorm and SwiGLU are computed again too, and are elementwise). attention_scores: the products of queries and keys,
    which attention never keeps.
    """
    ups = sum(prod(shape) for name, shape in layer_shapes(config, False).items() if name in UP_PROJECTIONS)
    layers = config.num_layers + (config.mtp_depth if mtp else 0)
    flops = {
        "attention_up_projections": 2.0 * layers * ups if recompute else 0.0,
        "attention_scores": 2.0 * layers * config.num_heads * config.qk_head_dim * length / (1 + causal),
    }
    return flops | {"total": sum(flops.values())}


def _layer_kinds(config: ModelConfig, depths: int) -> list[tuple[int, bool]]:
    """(number, MoE) of the main layers and of those of `depths` MTP depths."""
    moe_layers = config.num_layers - config.dense_layers
    return [
        (n, moe) for n, moe in ((config.dense_layers, False), (moe_layers, True), (depths, config.has_experts)) if n
    ]


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

    def layer(moe: bool) -> float:
        return sum(layer_flops(config, moe, length, causal).values())

    head, projection = 6.0 * config.vocab_size * config.hidden_size, 12.0 * config.hidden_size**2
    return PartFlops(layer(False), layer(config.has_experts), 0.0, head, projection + layer(config.has_experts) + head)


# Cache ----------------------------------------------------------------------------------------------------------------


def cache_values_per_token(config: ModelConfig) -> int:
    """Numbers that decoding keeps per token, of every main layer (V2 table 1): latent and rotary key, or the keys and
    values of all key-value heads. V2: 34,560; LLM 67B: 194,560.
    """
    if config.attention == "gqa":
        values = 2 * config.num_key_value_heads * config.head_dim
    else:
        values = config.kv_lora_rank + config.qk_rope_head_dim
    return values * config.num_layers


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Their bytes, in BF16 unless said otherwise (V3: 70,272)."""
    return cache_values_per_token(config) * bytes_per_value


def cache_ratio(config: ModelConfig, reference: ModelConfig) -> float:
    """The cache of `config` over that of `reference`, same bytes per value (V2 over LLM 67B: 0.178, 82.2 % less)."""
    return cache_values_per_token(config) / cache_values_per_token(reference)
