"""YaRN's frequencies and softmax scale against the published figures; rotation against complex multiplication."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.rope import Rotary, apply_rope, correction_range, yarn_mscale
from tests.model.models import model_config
from tests.model.transformers_oracle import LiftCasts, built_by_hand

# DeepSeek's own code for V3 at base 10000, original length 4096, factor 40; from index 23 on the plain frequency / 40.
V3_FREQUENCIES = [
    1, 0.74989421, 0.56234133, 0.4216965, 0.31622777, 0.23713737, 0.17782794, 0.13335214, 0.1, 0.074989421,
    0.056234133, 0.039006927, 0.02687936, 0.018378146, 0.012447956, 0.008334509, 0.0055, 0.0035619975, 0.0022493653,
    0.0013705136, 0.00079056942, 0.0004149904, 0.00017782794, 3.3338036e-5,
    *(10000 ** (-i / 32) / 40 for i in range(24, 32)),
]  # fmt: skip


# mscale = 0.1 * m * ln(40) + 1 with each config's m, and 192^-0.5 * mscale^2. V2's config has V3's m, unlike its paper.
SCALES = {"v3": (1.3688879, 0.1352338), "v2": (1.3688879, 0.1352338), "v2_lite": (1.2608038, 0.1147214)}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("length", [4097, 32768, 131072])
def test_released_frequencies_and_softmax_scales(name: str, length: int) -> None:
    config = model_config(name)
    rotary = Rotary(config, length)
    assert rotary.yarn
    torch.testing.assert_close(rotary.frequency_P, torch.tensor(V3_FREQUENCIES, dtype=torch.float64), rtol=1e-6, atol=0)
    plain = [10000 ** (-i / 32) for i in range(32)]
    ends = [*range(11), *range(23, 32)]
    expected = torch.tensor([plain[i] / (1 if i <= 10 else 40) for i in ends], dtype=torch.float64)
    torch.testing.assert_close(rotary.frequency_P[ends], expected, rtol=1e-14, atol=0)
    mscale, softmax_scale = SCALES[name]
    assert yarn_mscale(40, config.rope_scaling.mscale_all_dim) == pytest.approx(mscale, abs=5e-8)
    assert rotary.softmax_scale == pytest.approx(softmax_scale, abs=5e-8)
    assert rotary.softmax_scale == pytest.approx(192**-0.5 * mscale**2, rel=1e-7)
    assert rotary.magnitude == 1


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("length", [1, 2048, 4096])
def test_pretraining_length_is_plain_rope(name: str, length: int) -> None:
    rotary = Rotary(model_config(name), length)
    assert not rotary.yarn and rotary.magnitude == 1
    assert rotary.softmax_scale == 192**-0.5
    expected = torch.tensor([10000 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(rotary.frequency_P, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["llm_7b", "llm_67b", "moe_16b"])
def test_whole_heads_turn_in_the_llm(name: str) -> None:
    rotary = Rotary(model_config(name), 4096)
    assert not rotary.yarn and rotary.softmax_scale == 128**-0.5
    expected = torch.tensor([10000 ** (-i / 64) for i in range(64)], dtype=torch.float64)
    torch.testing.assert_close(rotary.frequency_P, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [*SCALES, "llm_7b", "demo", "demo_llm"])
@pytest.mark.parametrize("extended", [False, True])
def test_frequencies_and_scales_are_those_of_transformers(name: str, extended: bool) -> None:
    config = model_config(name)
    length = config.rope_scaling.original_length * (8 if extended else 1)
    rotary = Rotary(config, length)
    # Of the sizes only those of a head matter here.
    sizes = dict.fromkeys(("num_layers", "first_dense_layers", "num_heads", "q_lora_rank", "kv_lora_rank"), 1)
    sizes |= dict.fromkeys(("hidden_size", "vocab_size", "intermediate_size", "num_key_value_heads"), 1)
    theirs = built_by_hand(replace(config, **sizes), length)
    embedding, attention = theirs.model.rotary_emb, theirs.model.layers[0].self_attn
    torch.testing.assert_close(rotary.frequency_P, embedding.inv_freq, rtol=1e-14, atol=0)
    logit_scale = attention.scaling * embedding.attention_scaling**2
    assert rotary.softmax_scale * rotary.magnitude**2 == pytest.approx(logit_scale, rel=1e-14)


def test_the_demo_keeps_v3s_share_of_dimensions() -> None:
    v3, demo = ModelConfig(), model_config("demo")
    low, high = correction_range(v3.qk_rope_head_dim, v3.rope_theta, v3.rope_scaling)
    assert (low, high) == (10, 23)
    demo_low, demo_high = correction_range(demo.qk_rope_head_dim, demo.rope_theta, demo.rope_scaling)
    assert abs(demo_low / demo.qk_rope_head_dim - low / 64) < 0.05
    assert abs(demo_high / demo.qk_rope_head_dim - high / 64) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_is_complex_multiplication(dtype: torch.dtype) -> None:
    config = model_config("tiny")
    rotary = Rotary(config, 64)
    positions_T = torch.arange(5, 30)
    cos, sin = rotary.tables(positions_T, dtype)
    assert cos.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 25, config.qk_rope_head_dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones(25, 4, dtype=torch.float64), positions_T[:, None] * rotary.frequency_P
    )
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(rotated.double(), torch.view_as_real(turned).flatten(-2), atol=tolerance, rtol=tolerance)


def test_half_split_rotation_is_that_of_transformers_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    cos, sin = Rotary(model_config("demo_llm"), 64).tables(torch.arange(5, 30), torch.float64)
    q, k = torch.randn(2, 3, 4, 25, 32, dtype=torch.float64, generator=generator)
    theirs = apply_rotary_pos_emb(q, k, *(torch.cat((x, x), -1)[None] for x in (cos, sin)))
    for mine, their in zip((apply_rope(x, cos, sin, interleaved=False) for x in (q, k)), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-14, atol=1e-14)
    assert (apply_rope(q, cos, sin) - theirs[0]).abs().max() > 0.1


def test_interleaved_rotation_is_that_of_transformers_v2_and_scores_like_v3s() -> None:
    """V3's code there puts the even dimensions first, of queries and keys alike."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    generator = torch.Generator().manual_seed(0)
    cos, sin = Rotary(model_config("demo"), 64).tables(torch.arange(5, 30), torch.float64)
    q, k = torch.randn(2, 3, 4, 25, 16, dtype=torch.float64, generator=generator)
    mine_q, mine_k = (apply_rope(x, cos, sin) for x in (q, k))
    with LiftCasts():
        v2_q, v2_k = apply_rotary_emb(q, k, torch.complex(cos, sin)[None])
    v3_q, v3_k = apply_rotary_pos_emb_interleave(q, k, *(torch.cat((x, x), -1)[None] for x in (cos, sin)))
    torch.testing.assert_close(mine_q, v2_q, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(mine_k, v2_k, rtol=1e-14, atol=1e-14)
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    torch.testing.assert_close(mine_q[..., order], v3_q, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(mine_q @ mine_k.mT, v3_q @ v3_k.mT, rtol=1e-12, atol=1e-12)


def test_angles_at_128k_positions_are_exact_in_float32() -> None:
    rotary = Rotary(ModelConfig(), 131072)
    cos, _ = rotary.tables(torch.tensor([131071]), torch.float32)
    assert cos[0, 0].item() == pytest.approx(math.cos(131071.0), abs=1e-7)
