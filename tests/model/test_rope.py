"""YaRN's frequencies and softmax scale against the published figures; rotation against complex multiplication."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.rope import Rotary, apply_rope, correction_range
from tests.model.models import model_config

# DeepSeek's own code for V3 at base 10000, original length 4096, factor 40; from index 23 on the plain frequency / 40.
V3_FREQUENCIES = [
    1, 0.74989421, 0.56234133, 0.4216965, 0.31622777, 0.23713737, 0.17782794, 0.13335214, 0.1, 0.074989421,
    0.056234133, 0.039006927, 0.02687936, 0.018378146, 0.012447956, 0.008334509, 0.0055, 0.0035619975, 0.0022493653,
    0.0013705136, 0.00079056942, 0.0004149904, 0.00017782794, 3.3338036e-5,
    *(10000 ** (-i / 32) / 40 for i in range(24, 32)),
]  # fmt: skip


def test_v3_frequencies_and_softmax_scale() -> None:
    rotary = Rotary(ModelConfig(), 32768)
    assert rotary.yarn
    torch.testing.assert_close(rotary.frequency_P, torch.tensor(V3_FREQUENCIES, dtype=torch.float64), rtol=1e-6, atol=0)
    assert rotary.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert rotary.magnitude == 1


def test_v2_lite_softmax_scale() -> None:
    scaling = RopeScaling(mscale=0.707, mscale_all_dim=0.707)
    assert Rotary(ModelConfig(rope_scaling=scaling), 8192).softmax_scale == pytest.approx(0.1147214, abs=5e-8)


def test_pretraining_length_is_plain_rope() -> None:
    rotary = Rotary(ModelConfig(), 4096)
    assert not rotary.yarn
    assert rotary.softmax_scale == 192**-0.5
    expected = torch.tensor([10000 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(rotary.frequency_P, expected, rtol=1e-14, atol=0)


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


def test_angles_at_128k_positions_are_exact_in_float32() -> None:
    rotary = Rotary(ModelConfig(), 131072)
    cos, _ = rotary.tables(torch.tensor([131071]), torch.float32)
    assert cos[0, 0].item() == pytest.approx(math.cos(131071.0), abs=1e-7)
