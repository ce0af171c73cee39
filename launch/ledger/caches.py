"""What a chunk keeps on a rank, tensor by tensor: after its forward (F), and between I and W.

Each entry is named after what it is and counts the storage that the code keeps alive, views included: it follows
`model/segments.py`, `model/ops.py`, `model/latent_attention.py`, `model/grouped_query.py`, `model/stage.py` and the
dispatcher's route, and a test compares it with the storages that they really keep. Balance is by the sequence-wise
loss; V2's three keep a few numbers per sequence instead.

Letters: N tokens, X expanded rows, d hidden, H heads.
"""

from __future__ import annotations

from kernels.tiles import TILE, tile_count
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents
from launch.ledger.load import Load
from model.config import ModelConfig

Bytes = dict[str, int]
BF16, FP32, INT64 = 2, 4, 8

# What is kept for recomputation alone once the input gradients are there.
RECOMPUTED_FROM = (
    "residual into attention",
    "residual into MLP",
    "latent keys and values",
    "latent queries",
    "SwiGLU input",
    "SwiGLU input, shared",
    "SwiGLU input, routed",
    "router weights of rows",
)


def rows_fp8(rows: int, width: int) -> int:
    """E4M3 codes and FP32 scales of 1x128 tiles."""
    return rows * width + FP32 * rows * tile_count(width, TILE)


def columns_fp8(rows: int, width: int) -> int:
    """The same of tiles along tokens."""
    return rows * width + FP32 * width * tile_count(rows, TILE)


def kept_rows(rows: int, width: int, choices: Choices) -> int:
    """A cached activation."""
    return rows_fp8(rows, width) if choices.fp8 else BF16 * rows * width


def attention_output(config: ModelConfig, N: int, choices: Choices) -> int:
    width = config.num_heads * config.value_head_dim
    if not choices.fp8:
        return BF16 * N * width
    codes = N * width * 3 // 2 if choices.attention_output == "packed" else BF16 * N * width
    return codes + FP32 * N * tile_count(width, TILE)


def _attention_inputs(config: ModelConfig, N: int, choices: Choices) -> Bytes:
    """What the weight gradients of the attention segment compute their operands from."""
    latent = config.attention == "mla"
    return {
        "residual into attention": BF16 * N * config.hidden_size,
        "residual into MLP": BF16 * N * config.hidden_size,
        "latent keys and values": BF16 * N * (config.kv_lora_rank + config.qk_rope_head_dim) * latent,
        "attention output": attention_output(config, N, choices),
        "latent queries": BF16 * N * config.q_lora_rank * latent,
    }


def _attention_core(config: ModelConfig, N: int) -> Bytes:
    """What attention's own backward takes besides: the queries where they have no latent, grouped keys and values."""
    found: Bytes = {}
    if config.attention == "gqa" or not config.q_lora_rank:
        found["queries"] = BF16 * N * config.num_heads * config.qk_head_dim
    if config.attention == "gqa":
        found["keys and values"] = BF16 * N * 2 * config.num_key_value_heads * config.head_dim
    return found | {"softmax statistics": FP32 * N * config.num_heads}


def _attention_gradients(config: ModelConfig, N: int) -> dict[str, tuple[int, ...]]:
    """Widths of the gradients that the projections' weight gradients wait with, each quantised by itself."""
    H, queries = config.num_heads, "gradient of queries"
    if config.attention == "gqa":
        width = config.num_key_value_heads * config.head_dim
        return {queries: (H * config.head_dim,), "gradient of keys and values": (width, width)}
    return {
        "gradient of latents": (config.q_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim),
        queries: (H * config.qk_head_dim,),
        "gradient of keys and values": (H * (config.qk_nope_head_dim + config.v_head_dim),),
    }


def _latent_norms(config: ModelConfig) -> list[int]:
    """Widths of the norms of latents."""
    return [config.q_lora_rank, config.kv_lora_rank] if config.attention == "mla" else []


def _kept_instead_of_recomputed(config: ModelConfig, moe: bool, load: Load) -> int:
    """Results of RMSNorm, up-projections and SwiGLU, as they were computed."""
    N, f = load.tokens, config.moe_intermediate_size
    inner = config.num_shared_experts * f if moe else config.intermediate_size
    values = N * (2 * config.hidden_size + sum(_latent_norms(config)) + inner) + load.expanded * f * moe
    return BF16 * values + _expanded(config, N)


def _expanded(config: ModelConfig, N: int) -> int:
    """Queries, keys and values of all heads, projected up from the latents, and the keys with their rotary part;
    grouped-query attention keeps its own."""
    width = 2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    return BF16 * N * config.num_heads * width * (config.attention == "mla")


def layer_after_forward(config: ModelConfig, moe: bool, load: Load, choices: Choices) -> Bytes:
    """One layer between a chunk's F and its backward."""
    N, X, K, E = load.tokens, load.expanded, config.experts_per_token, config.num_routed_experts
    f = config.moe_intermediate_size
    found = _attention_inputs(config, N, choices) | _attention_core(config, N)
    if not moe:
        found["SwiGLU input"] = kept_rows(N, 2 * config.intermediate_size, choices)
    else:
        found["SwiGLU input, shared"] = kept_rows(N, 2 * config.num_shared_experts * f, choices)
        found["rows dispatched here"] = kept_rows(X, config.hidden_size, choices)
        found["SwiGLU input, routed"] = kept_rows(X, 2 * f, choices)
        found["router weights of rows"] = FP32 * X
        # Scores, a sum and a mask per token, two constants per sequence (of experts, of tokens); chosen scores and
        # their sum where they are divided by it.
        chosen = K + 1 if config.renormalise else 0
        found["router"] = FP32 * (N * (E + 2 + chosen) + load.sequences * (E + 1))
        found["indices"] = INT64 * (N * K + (0 if load.alone else load.moved) + 2 * X)
    if choices.recompute == "off":
        found["kept, not recomputed"] = _kept_instead_of_recomputed(config, moe, load)
    return {name: size for name, size in found.items() if size}


def layer_after_input_gradient(config: ModelConfig, moe: bool, load: Load, choices: Choices) -> Bytes:
    """One layer between I and W: operands of the weight gradients that wait."""
    N, X, d, f = load.tokens, load.expanded, config.hidden_size, config.moe_intermediate_size

    def gradient(width: int) -> int:
        return columns_fp8(N, width) if choices.fp8 else BF16 * N * width

    def gradient_of_rows(width: int) -> int:
        return columns_fp8(load.padded, width) if choices.fp8 else BF16 * X * width

    found = _attention_inputs(config, N, choices)
    for name, widths in _attention_gradients(config, N).items():
        found[name] = sum(gradient(width) for width in widths if width)
    found["gradient of attention's result"] = gradient(d)
    found["gradient of norms"] = FP32 * (2 * d + sum(_latent_norms(config)))
    inner = config.num_shared_experts * f if moe else config.intermediate_size
    found["SwiGLU input, shared" if moe else "SwiGLU input"] = kept_rows(N, 2 * inner, choices)
    found["gradient of SwiGLU input"] = gradient(2 * inner)
    found["gradient of the MLP's result"] = gradient(d)
    if moe:
        found["rows dispatched here"] = kept_rows(X, d, choices)
        found["SwiGLU input, routed"] = kept_rows(X, 2 * f, choices)
        found["router weights of rows"] = FP32 * X
        found["gradient of SwiGLU input, routed"] = gradient_of_rows(2 * f)
        found["gradient of the experts' result"] = gradient_of_rows(d)
        found["gradient of router logits"] = FP32 * N * config.num_routed_experts
    if choices.recompute == "off":
        for name in RECOMPUTED_FROM:
            found.pop(name, None)
        found["kept, not recomputed"] = _kept_instead_of_recomputed(config, moe, load) - _expanded(config, N)
    return {name: size for name, size in found.items() if size}


def _logits(config: ModelConfig, N: int, choices: Choices, queued: bool) -> int:
    """Of one use of the head: the gradient of all logits, or with pieces that of the head's input until I."""
    if choices.logits == "chunked":
        return 0 if queued else BF16 * N * config.hidden_size
    return BF16 * N * config.vocab_size


def _output(config: ModelConfig, D: int, N: int, choices: Choices, queued: bool) -> Bytes:
    """Final norm, head and D MTP depths without their layers."""
    d = config.hidden_size
    state = BF16 * N * d
    found = {
        "gradient of logits": (1 + D) * _logits(config, N, choices, queued),
        "residual into final norms": (1 + D) * state,
        "MTP: embeddings and states joined": 2 * D * state,
    }
    if choices.recompute == "off":
        # What enters a join is the result of a final norm.
        found["kept, not recomputed"] = (1 + 2 * D) * state
    if queued and choices.recompute == "off":
        del found["residual into final norms"], found["MTP: embeddings and states joined"]
        found["kept, not recomputed"] += D * state
    if queued:
        # Of the projection's result and of the embedding looked up; the gains of both norms of a join and of the final.
        found["MTP: gradients"] = 2 * D * state
        found["gradient of norms"] = FP32 * d * (1 + 3 * D)
    return found


def _add(total: Bytes, more: Bytes, times: int = 1) -> None:
    for name, size in more.items():
        total[name] = total.get(name, 0) + times * size


def stage_after_forward(config: ModelConfig, contents: Contents, load: Load, choices: Choices) -> Bytes:
    """A whole stage between F and backward."""
    found: Bytes = {}
    for moe, layers in contents.layers(config):
        _add(found, layer_after_forward(config, moe, load, choices), layers)
    if contents.head:
        _add(found, _output(config, contents.mtp, load.tokens, choices, queued=False))
    return {name: size for name, size in found.items() if size}


def stage_after_input_gradient(config: ModelConfig, contents: Contents, load: Load, choices: Choices) -> Bytes:
    """A whole stage between I and W."""
    found: Bytes = {}
    for moe, layers in contents.layers(config):
        _add(found, layer_after_input_gradient(config, moe, load, choices), layers)
    if contents.head:
        _add(found, _output(config, contents.mtp, load.tokens, choices, queued=True))
    if contents.embed:
        _add(found, {"gradient of embeddings": BF16 * load.tokens * config.hidden_size})
    return {name: size for name, size in found.items() if size}
