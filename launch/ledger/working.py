"""Bytes that exist only while a step of a chunk runs: the largest working set, and all-to-all buffers in flight.

Counted: every tensor that `model/` and `parallel/` make on the way. Not counted: what a kernel makes inside itself (the
plain-torch kernels for CPUs widen to FP32; kernels for GPUs do not). `working=lean` is what remains with kernels that
quantise and sum without FP32 copies, and with intermediates freed once used.
"""

from __future__ import annotations

from kernels.tiles import TILE, tile_count
from launch.ledger.caches import BF16, FP32, INT64, rows_fp8
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents
from launch.ledger.load import Load
from model.config import ModelConfig

LOGIT_ROWS = 512  # of a piece with logits=chunked


def _widened(rows: int, width: int, choices: Choices) -> int:
    """A gradient beside its FP8 rows and, in the plain code, its FP32 copy."""
    if not choices.fp8:
        return 0
    return rows_fp8(rows, width) + (FP32 * rows * width if choices.working == "plain" else 0)


def attention_forward(config: ModelConfig, load: Load, choices: Choices) -> int:
    """Normed input, queries, keys with values, keys with rotary part, output (and its copy by token)."""
    N, c = load.tokens, config
    out = c.value_head_dim * (2 if choices.working == "plain" else 1)
    if c.attention == "gqa":
        per_head = c.head_dim + _repeated(c) + out
    else:
        per_head = 2 * c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim + out
    normed = BF16 * N * c.hidden_size + (rows_fp8(N, c.hidden_size) if choices.fp8 else 0)
    return BF16 * N * c.num_heads * per_head + normed


def attention_backward(config: ModelConfig, load: Load, choices: Choices) -> int:
    """Queries, keys and values computed again, output and its gradient, the gradients of all three; in the plain code
    also their copies by token."""
    N, H, c = load.tokens, config.num_heads, config
    if c.attention == "gqa":
        core = c.head_dim + _repeated(c) + 5 * c.head_dim
        shared = 2 * c.num_key_value_heads * c.head_dim
        # By token, and of keys and values the sums over the query heads that share them.
        copies = BF16 * N * (H * c.head_dim + shared) + FP32 * N * shared if choices.working == "plain" else 0
        return BF16 * N * H * core + copies
    key_value = c.qk_nope_head_dim + c.v_head_dim
    core = 2 * c.qk_head_dim + key_value + 2 * c.v_head_dim + 2 * c.qk_head_dim + c.v_head_dim
    if choices.working == "lean":
        return BF16 * N * H * core
    copies = c.qk_head_dim + key_value
    widened = 2 * _widened(N, H * key_value, choices) - FP32 * N * H * key_value if choices.fp8 else 0
    return BF16 * N * H * (core + copies) + widened


def _repeated(config: ModelConfig) -> int:
    """Of grouped-query attention, per head: rotated keys, and where heads share them keys and values of each."""
    if config.num_key_value_heads == config.num_heads:
        return config.head_dim
    return 2 * config.head_dim + -(-config.num_key_value_heads * config.head_dim // config.num_heads)


def mlp(load: Load, inner: int, hidden: int, choices: Choices) -> int:
    """Backward of a dense MLP or the shared expert: SwiGLU's input read back and its gradient."""
    N = load.tokens
    return BF16 * N * (2 * 2 * inner + inner + hidden) + _widened(N, 2 * inner, choices)


def experts(config: ModelConfig, load: Load, choices: Choices) -> int:
    """The larger of backward through SwiGLU and summing the experts' rows for their way back."""
    X, d, f = load.expanded, config.hidden_size, config.moe_intermediate_size
    swiglu = BF16 * X * (2 * 2 * f + f) + _widened(X, 2 * f, choices) + BF16 * X * d
    sums = BF16 * X * d + BF16 * load.moved * d
    if choices.working == "plain":
        sums = BF16 * X * d + FP32 * X * d + FP32 * load.moved * d
    return max(swiglu, sums)


def head(config: ModelConfig, load: Load, choices: Choices) -> int:
    """FP32 logits (their BF16 gradient is in the cache, or in pieces here)."""
    if choices.logits == "chunked":
        return (FP32 + BF16) * min(LOGIT_ROWS, load.tokens) * config.vocab_size
    return FP32 * load.tokens * config.vocab_size


def weight_gradient(config: ModelConfig, contents: Contents, expert: int, choices: Choices) -> int:
    """The largest weight gradient of a stage in FP32, where it is a tensor of its own."""
    if choices.weight_gradients == "into":
        return 0
    d, c = config.hidden_size, config
    rank = c.q_lora_rank if c.attention == "mla" else 0
    sizes = [d * c.num_heads * c.value_head_dim, c.num_heads * c.qk_head_dim * (rank or d)]
    for moe, _ in contents.layers(config):
        inner = c.num_routed_experts // expert * c.moe_intermediate_size if moe else c.intermediate_size
        sizes.append(2 * inner * d)
    if contents.embed or contents.head:
        sizes.append(c.vocab_size * d)
    return FP32 * max(sizes)


def working_set(
    config: ModelConfig, contents: Contents, load: Load, expert: int, choices: Choices, backward: bool
) -> int:
    """Largest working set of a chunk's forward, or of its backward with the weight gradients. Two tensors between
    segments (a residual and what the next one takes) stand beside it."""
    between = 2 * BF16 * load.tokens * config.hidden_size
    sizes = [attention_backward(config, load, choices) if backward else attention_forward(config, load, choices)]
    for moe, _ in contents.layers(config):
        dense = mlp(load, config.intermediate_size, config.hidden_size, choices)
        sizes.append(experts(config, load, choices) if moe else dense)
    if contents.head and (not backward or choices.logits == "chunked"):
        sizes.append(head(config, load, choices))
    if backward:
        sizes.append(weight_gradient(config, contents, expert, choices))
    return between + max(sizes)


def all_to_all(config: ModelConfig, contents: Contents, load: Load, choices: Choices, backward: bool) -> int:
    """Of one chunk in flight: rows picked, packed and received. The larger of a scatter (FP8 rows; expert ids and
    router weights with them in the forward) and a gather (BF16 sums; router-weight gradients in the backward)."""
    if not any(moe for moe, _ in contents.layers(config)):
        return 0
    d, K, rows = config.hidden_size, config.experts_per_token, load.moved
    row = d + FP32 * tile_count(d, TILE) if choices.fp8 else BF16 * d
    scatter = rows * (row + (0 if backward else (INT64 + FP32) * K))
    gather = rows * (BF16 * d + (FP32 * K if backward else 0))
    # The plain code picks rows, then packs them; sums of one column need no packing.
    plain = choices.working == "plain"
    return max((3 if plain else 2) * scatter, (3 if plain and backward else 2) * gather)
