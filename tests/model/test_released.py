"""Released names, shapes and config.json of every family: counts and shapes of the released folders, both ways, and a
reason for every refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from model.errors import CheckpointError, ModelError
from model.huggingface import stored_tensors
from model.names import canonical_shapes
from model.released import released_entries
from model.released_config import model_config as read_config
from model.released_config import released_config
from model.released_family import differing_fields, essential, family_of
from model.released_fp8 import FP8
from model.rope import Rotary
from tests.model.models import model_config

FAMILY = {
    "v3": "deepseek_v3",
    "tiny": "deepseek_v3",
    "demo": "deepseek_v3",
    "v2": "deepseek_v2",
    "v2_lite": "deepseek_v2",
    "demo_v2": "deepseek_v2",
    "llm_7b": "llama",
    "llm_67b": "llama",
    "demo_llm": "llama",
    "moe_16b": "deepseek",
}


def stored(name: str, dtype: torch.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = [t for entry in released_entries(model_config(name)) for t in stored_tensors(entry, dtype)]
    found = {tensor.name: (str(tensor.dtype).removeprefix("torch."), tensor.shape) for tensor in tensors}
    assert len(found) == len(tensors)
    return found


def test_v3_in_fp8_is_the_released_folder() -> None:
    """Every line of the released shapes: 91,991 tensors with scales."""
    found = stored("v3", FP8)
    assert len(found) == 91_991
    d, moe, mtp = 7168, range(3, 62), "model.layers.61."
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("bfloat16", (129280, d)),
        "model.norm.weight": ("bfloat16", (d,)),
        "lm_head.weight": ("bfloat16", (129280, d)),
        mtp + "enorm.weight": ("bfloat16", (d,)),
        mtp + "hnorm.weight": ("bfloat16", (d,)),
        mtp + "eh_proj.weight": ("bfloat16", (d, 14336)),
        mtp + "embed_tokens.weight": ("bfloat16", (129280, d)),
        mtp + "shared_head.norm.weight": ("bfloat16", (d,)),
        mtp + "shared_head.head.weight": ("bfloat16", (129280, d)),
    }

    def fp8(name: str, shape: tuple[int, int], scale: tuple[int, int]) -> None:
        wanted[name + ".weight"] = ("float8_e4m3fn", shape)
        wanted[name + ".weight_scale_inv"] = ("float32", scale)

    def mlp(place: str, shape: tuple[int, int], scale: tuple[int, int]) -> None:
        for kind in ("gate_proj", "up_proj"):
            fp8(f"{place}.{kind}", shape, scale)
        fp8(f"{place}.down_proj", shape[::-1], scale[::-1])

    for layer in range(62):
        at = f"model.layers.{layer}."
        for norm, width in (("input_layernorm", d), ("post_attention_layernorm", d), ("self_attn.q_a_layernorm", 1536)):
            wanted[f"{at}{norm}.weight"] = ("bfloat16", (width,))
        wanted[at + "self_attn.kv_a_layernorm.weight"] = ("bfloat16", (512,))
        fp8(at + "self_attn.q_a_proj", (1536, d), (12, 56))
        fp8(at + "self_attn.q_b_proj", (24576, 1536), (192, 12))
        fp8(at + "self_attn.kv_a_proj_with_mqa", (576, d), (5, 56))
        fp8(at + "self_attn.kv_b_proj", (32768, 512), (256, 4))
        fp8(at + "self_attn.o_proj", (d, 16384), (56, 128))
        if layer < 3:
            mlp(at + "mlp", (18432, d), (144, 56))
    for layer in moe:
        at = f"model.layers.{layer}.mlp."
        wanted[at + "gate.weight"] = ("bfloat16", (256, d))
        wanted[at + "gate.e_score_correction_bias"] = ("float32", (256,))
        for place in ("shared_experts", *(f"experts.{expert}" for expert in range(256))):
            mlp(at + place, (2048, d), (16, 56))
    assert found == wanted
    assert next(iter(found)) == "model.embed_tokens.weight" and list(found)[-1] == mtp + "shared_head.head.weight"


def test_v2_lite_is_the_released_folder() -> None:
    found = stored("v2_lite", torch.bfloat16)
    assert len(found) == 5_291 and {dtype for dtype, _ in found.values()} == {"bfloat16"}
    shapes = {name: shape for name, (_, shape) in found.items()}
    first, last = "model.layers.0.", "model.layers.26."
    assert shapes[first + "self_attn.q_proj.weight"] == (3072, 2048)
    assert shapes[first + "self_attn.kv_a_proj_with_mqa.weight"] == (576, 2048)
    assert shapes[first + "self_attn.kv_a_layernorm.weight"] == (512,)
    assert shapes[first + "self_attn.kv_b_proj.weight"] == (4096, 512)
    assert shapes[first + "self_attn.o_proj.weight"] == (2048, 2048)
    assert shapes[first + "mlp.up_proj.weight"] == (10944, 2048)
    assert shapes[last + "mlp.gate.weight"] == (64, 2048)
    assert shapes[last + "mlp.experts.63.down_proj.weight"] == (2048, 1408)
    assert shapes[last + "mlp.shared_experts.gate_proj.weight"] == (2816, 2048)
    assert shapes[last + "mlp.shared_experts.down_proj.weight"] == (2048, 2816)
    assert not any("bias" in name for name in shapes)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("extended", [False, True])
def test_config_out_and_in(name: str, extended: bool) -> None:
    config = model_config(name)
    length = config.rope_scaling.original_length * (2 if extended else 1)
    if extended and FAMILY[name] == "deepseek":
        with pytest.raises(ModelError, match="its code has no YaRN"):
            released_config(config, length, "bfloat16", 0, 1)
        return
    values = json.loads(json.dumps(released_config(config, length, "bfloat16", 0, 1, fp8=True)))
    assert values["model_type"] == FAMILY[name]
    again, longest = read_config(values, "config.json")
    assert differing_fields(config, again) == []
    assert longest == (round(40.0 * length / 2) if extended else length)
    assert canonical_shapes(again) == canonical_shapes(config)
    if extended:
        assert again.rope_scaling == config.rope_scaling
    # transformers' other spelling
    rope = values.pop("rope_scaling") or {"type": "default"}
    values["rope_parameters"] = {**rope, "rope_type": rope["type"], "rope_theta": values.pop("rope_theta")}
    assert read_config(values, "config.json") == (again, longest)


def test_released_values() -> None:
    """What the released config.json files say, where it is about the model."""
    v2, lite, llm = (
        released_config(model_config(name), 8192, "bfloat16", 0, 1) for name in ("v2", "v2_lite", "llm_67b")
    )
    assert (v2["topk_method"], v2["n_group"], v2["topk_group"]) == ("group_limited_greedy", 8, 3)
    assert (lite["topk_method"], lite["n_group"], lite["topk_group"]) == ("greedy", 1, 1)
    assert v2["q_lora_rank"] == 1536 and lite["q_lora_rank"] is None
    assert v2["norm_topk_prob"] is False and v2["scoring_func"] == "softmax" and v2["routed_scaling_factor"] == 16.0
    assert lite["rope_scaling"]["mscale"] == lite["rope_scaling"]["mscale_all_dim"] == 0.707
    assert v2["max_position_embeddings"] == 163840 and "attention_factor" not in v2["rope_scaling"]
    assert (llm["num_key_value_heads"], llm["head_dim"], llm["architectures"]) == (8, 128, ["LlamaForCausalLM"])


@pytest.mark.parametrize(
    ("name", "changes", "reasons"),
    [
        ("proxy_1b", {}, ["score_function", "router_bias"]),
        (
            "demo_v2",
            {"renormalise": True, "router_bias": True, "mtp_depth": 1},
            ["renormalise", "router_bias", "mtp_depth"],
        ),
        ("demo_v2", {"rms_norm_eps": 1e-5, "hidden_size": 130}, ["latent norms", "multiple of num_heads"]),
        ("tiny", {"router_bias": False, "group_rule": "max"}, ["router_bias", "group_rule"]),
        ("tiny", {"rope_interleaved": False}, ["rope_interleaved"]),
        (
            "tiny",
            {"num_expert_groups": 1, "groups_per_token": 1, "num_routed_experts": 1, "experts_per_token": 1},
            ["two in a group"],
        ),
        ("demo_llm", {"rope_interleaved": True, "mtp_depth": 1}, ["rope_interleaved", "mtp_depth"]),
        (
            "moe_16b",
            {"num_expert_groups": 2, "head_dim": 64, "routed_scaling_factor": 2.0},
            ["num_expert_groups", "head_dim", "routed_scaling_factor"],
        ),
    ],
)
def test_a_model_that_no_family_says_is_refused_with_every_reason(
    name: str, changes: dict[str, object], reasons: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        family_of(model_config(name, **changes), 128)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(reasons), lines
    assert caught.value.exit_code == 64
    for reason in reasons:
        assert any(reason in line and "found" in line for line in lines), reason


def test_fields_that_change_nothing_are_not_compared() -> None:
    v3 = model_config("tiny")
    assert differing_fields(v3, replace(v3, name="other", init_std=0.5, head_dim=4, num_key_value_heads=2)) == []
    assert differing_fields(v3, replace(v3, kv_lora_rank=16, renormalise=False)) == ["kv_lora_rank", "renormalise"]
    llm = model_config("demo_llm")
    assert differing_fields(llm, replace(llm, kv_lora_rank=9, routed_scaling_factor=3.0, first_dense_layers=0)) == []
    one = replace(v3, num_expert_groups=1, groups_per_token=1)
    assert essential(one) == essential(replace(one, group_rule="max"))
    assert essential(v3) != essential(replace(v3, group_rule="max"))


@pytest.mark.parametrize("name", ["tiny", "demo_v2", "demo_llm"])
@pytest.mark.parametrize(
    ("mscale", "all_dim"), [(1.0, 1.0), (0.7, 0.7), (0.7, 0.3), (0.7, 0.0), (0.0, 0.0), (0.0, 0.5)]
)
def test_yarn_scales_as_deepseek_wherever_it_is_read(name: str, mscale: float, all_dim: float) -> None:
    """The product of all factors on a logit, from transformers' rule on what is written, and from what is read in."""
    changes = {"rope_scaling": {"mscale": mscale, "mscale_all_dim": all_dim}}
    config = model_config(name, **changes)
    values = released_config(config, 1024, "float32", 0, 1)
    rope = values["rope_scaling"]

    def m(x: float) -> float:
        return 0.1 * x * torch.log(torch.tensor(40.0, dtype=torch.float64)).item() + 1

    theirs = rope.get("attention_factor")
    if theirs is None:
        theirs = m(rope["mscale"]) / m(rope["mscale_all_dim"]) if rope["mscale"] and rope["mscale_all_dim"] else m(1.0)
    softmax = m(all_dim) ** 2 if config.attention == "mla" and all_dim else 1.0
    ours = Rotary(config, 1024)
    assert theirs**2 * softmax == pytest.approx(
        ours.magnitude**2 * ours.softmax_scale * config.qk_head_dim**0.5, rel=1e-12
    )
    again = Rotary(read_config(values, "config.json")[0], 1024)
    assert again.magnitude**2 * again.softmax_scale == pytest.approx(ours.magnitude**2 * ours.softmax_scale, rel=1e-12)


def yarn(**changes: object) -> dict[str, object]:
    return {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128, **changes}


def test_a_llama_without_our_keys_keeps_transformers_meaning() -> None:
    values = released_config(model_config("demo_llm"), 1024, "float32", 0, 1)
    for rope, wanted in (
        (yarn(), 1.0 + 0.1 * 3.6888794541139363),
        (yarn(attention_factor=1.2), 1.2),
        (yarn(mscale=0.7, mscale_all_dim=0.7), 1.0),
        (yarn(mscale=1.0, attention_factor=1.5), 1.5),
    ):
        rotary = Rotary(read_config(values | {"rope_scaling": rope}, "config.json")[0], 1024)
        scale = rotary.magnitude**2 * rotary.softmax_scale * 32**0.5
        assert scale == pytest.approx(wanted**2, rel=1e-12)


LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
UNSUPPORTED = [
    ("tiny", {"attention_bias": True, "hidden_act": "gelu"}, ["attention_bias is True", "hidden_act is 'gelu'"]),
    ("tiny", LINEAR | {"moe_layer_freq": 2}, ["rope type is 'linear'", "moe_layer_freq is 2, supported is 1"]),
    ("tiny", {"scoring_func": "softmax", "topk_method": "greedy"}, ["scoring_func", "topk_method"]),
    ("tiny", {"rope_interleave": False, "num_key_value_heads": 1}, ["rope_interleave", "num_key_value_heads is 1"]),
    (
        "tiny",
        {"tie_word_embeddings": "yes", "hidden_size": "32"},
        ["tie_word_embeddings", "hidden_size is '32', an integer"],
    ),
    (
        "tiny",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quant_method is 'gptq'", "weight_block_size is None"],
    ),
    (
        "tiny",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        ["weight_block_size is [64, 64]"],
    ),
    ("tiny", {"rms_norm_eps": 1e-5}, ["latent norms"]),
    ("tiny", {"max_position_embeddings": 0, "n_group": 3}, ["max_position_embeddings is 0"]),
    ("tiny", {"n_group": 3}, ["model.num_expert_groups: found 3"]),
    ("tiny", {"rope_scaling": yarn(mscale=0.7)}, ["attention_factor must say which is meant"]),
    ("tiny", {"rope_scaling": yarn(attention_factor=2.0, mscale=1.0, mscale_all_dim=1.0)}, ["attention_factor is 2.0"]),
    ("tiny", {"rope_scaling": yarn(truncate=False, factor="40")}, ["truncate", "factor is '40'"]),
    ("tiny", {"rope_scaling": 7}, ["rope_scaling is 7"]),
    ("tiny", {"num_attention_heads": 0}, ["model.num_heads: found 0, must be above 0"]),
    ("tiny", {"rope_scaling": {"factor": 40.0}}, ["rope type is missing beside factor 40.0"]),
    ("tiny", {"routed_scaling_factor": float("nan")}, ["model.routed_scaling_factor: found nan, must be finite"]),
    (
        "demo_llm",
        {"rope_scaling": yarn(original_max_position_embeddings=1.5, attention_factor=-1)},
        ["original_max_position_embeddings is 1.5, a whole number", "attention_factor is -1, a number above 0"],
    ),
    (
        "demo_v2",
        {"norm_topk_prob": True, "topk_method": "noaux_tc", "mlp_bias": True},
        ["norm_topk_prob", "noaux_tc", "mlp_bias"],
    ),
    ("demo_v2", {"n_group": None}, ["n_group is None"]),
    ("demo_llm", {"partial_rotary_factor": 0.5, "head_dim": "x"}, ["partial_rotary_factor is 0.5", "head_dim is 'x'"]),
    ("moe_16b", {"rope_scaling": yarn(), "scoring_func": "sigmoid"}, ["rope type is 'yarn'", "scoring_func"]),
    (
        "tiny",
        {"model_type": "mixtral"},
        ["model_type is 'mixtral', supported: deepseek_v3, deepseek_v2, llama, deepseek"],
    ),
]


@pytest.mark.parametrize(("name", "changes", "wanted"), UNSUPPORTED)
def test_unsupported_config_fields_all_at_once(name: str, changes: dict[str, object], wanted: list[str]) -> None:
    config = model_config(name)
    values = released_config(config, config.rope_scaling.original_length, "bfloat16", 0, 1) | changes
    with pytest.raises(CheckpointError) as caught:
        read_config(values, "here/config.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wanted), lines
    for text in wanted:
        assert any(text in line and line.startswith("here/config.json: ") for line in lines), text
    assert caught.value.exit_code == 66


def test_greedy_looks_at_no_group() -> None:
    values = released_config(model_config("demo_v2"), 128, "bfloat16", 0, 1)
    for groups in ({"n_group": None, "topk_group": None}, {"n_group": 4, "topk_group": 2}):
        config, _ = read_config(values | groups | {"topk_method": "greedy"}, "config.json")
        assert config.num_expert_groups == config.groups_per_token
