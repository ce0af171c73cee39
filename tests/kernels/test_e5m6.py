"""E5M6 against a table of all 4096 codes and a search for the nearest."""

from __future__ import annotations

import numpy as np
import torch

from kernels import e5m6
from tests.kernels.oracles import minifloat_values, quantize_tiles, round_by_search

VALUES = minifloat_values(5, 6, 15)
MAGNITUDES = VALUES[: 31 << 6]
FINITE = (np.arange(4096) & 0x7FF) < 31 << 6
MINUS_ZERO = 0x800


def test_every_finite_code_decodes_and_encodes_to_itself() -> None:
    all_codes = torch.arange(4096, dtype=torch.int16)
    decoded = e5m6.from_codes(all_codes).numpy()
    assert np.array_equal(decoded[FINITE], VALUES[FINITE].astype(np.float32))
    assert np.array_equal(np.signbit(decoded[FINITE]), np.arange(4096)[FINITE] >= 2048)
    assert not np.isfinite(decoded[~FINITE]).any()
    encoded = e5m6.to_codes(torch.from_numpy(decoded[FINITE]))
    assert np.array_equal(encoded.numpy(), np.where(np.arange(4096) == MINUS_ZERO, 0, np.arange(4096))[FINITE])


def test_rounds_to_nearest_even_everywhere() -> None:
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    x = np.concatenate([MAGNITUDES, middles]).astype(np.float32)
    x = np.concatenate(
        [x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1e9)), np.array([7e4, 1e38], dtype=np.float32)]
    )
    x = np.concatenate([x, np.random.default_rng(0).lognormal(0, 8, 20000).astype(np.float32)])
    expected = round_by_search(x, MAGNITUDES)
    assert np.array_equal(e5m6.to_codes(torch.from_numpy(x)).numpy(), expected)
    assert np.array_equal(e5m6.to_codes(torch.from_numpy(-x)).numpy(), np.where(expected, expected | MINUS_ZERO, 0))
    assert e5m6.E5M6_MAX == MAGNITUDES[-1]


def test_not_a_number_stays_and_infinity_saturates() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1):
        assert e5m6.from_codes(e5m6.to_codes(torch.tensor([bits], dtype=torch.int32).view(torch.float32))).isnan().all()
    assert e5m6.from_codes(e5m6.to_codes(x))[1:].tolist() == [65024.0, -65024.0]


def test_tiles_have_power_of_two_scales_and_seven_bits() -> None:
    x = torch.randn(6, 576) * torch.exp2(torch.arange(-20.0, 22, 7)).unsqueeze(1)
    x[3] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        q = e5m6.encode(x.to(dtype))
        assert q.shape == (6, 576) and q.scale.shape == (6, 5) and q.codes.dtype == torch.int16
        assert bool((torch.frexp(q.scale).mantissa == 0.5).all())
        amax = torch.stack([tile.abs().amax(1) for tile in x.to(dtype).float().split(128, 1)], 1).clamp_min(2.0**-100)
        assert bool((amax <= 65024 * q.scale).all()) and bool((amax > 65024 * q.scale / 2).all())
        back = e5m6.decode(q)
        assert torch.equal(e5m6.decode(q, torch.float64), back.double())
        error = (back - x.to(dtype).float()).abs()
        assert bool((error <= x.abs() * 2.0**-7 + 2.0**-20 * q.scale.repeat_interleave(128, 1)[:, :576]).all())


def test_non_finite_input_stays_non_finite() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 256)
        x[1, 5] = bad
        back = e5m6.decode(e5m6.encode(x))
        assert not back[1, 5].isfinite() and back[0].isfinite().all() and back[1, 128:].isfinite().all()


def test_decoded_columns_are_quantised_from_the_rounded_values() -> None:
    x = torch.randn(200, 144) * torch.exp2(torch.randint(-9, 9, (200, 1)))
    stored = e5m6.encode(x)
    for dtype in (torch.bfloat16, torch.float32):
        q = e5m6.decode_columns(stored, dtype)
        expected, scales = quantize_tiles(e5m6.decode(stored, dtype).float().numpy().T, 1, 128, True)
        assert np.array_equal(q.data.view(torch.uint8).numpy(), expected) and np.array_equal(q.scale.numpy(), scales)
