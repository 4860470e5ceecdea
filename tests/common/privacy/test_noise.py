"""The noise stream: distribution, independence, key, secrecy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import binomtest, kstest

from common.privacy.noise import KEY_BYTES, NoiseStream, SeededEntropy, os_entropy, release

KEY = bytes(range(KEY_BYTES))
ALARM = 1e-6


def test_gaussians_are_standard_normal() -> None:
    draws = NoiseStream(KEY).gaussian((200_000,))
    assert kstest(draws, "norm").pvalue > ALARM
    assert kstest(1.05 * draws, "norm").pvalue < ALARM


def test_uniforms_are_uniform_and_never_zero_or_one() -> None:
    draws = NoiseStream(KEY).uniform(200_000)
    assert kstest(draws, "uniform").pvalue > ALARM
    assert draws.min() > 0.0 and draws.max() < 1.0


@pytest.mark.parametrize("probability", [0.01, 0.25, 0.9])
def test_coins_fall_with_their_probability(probability: float) -> None:
    heads = int(NoiseStream(KEY).coins(100_000, probability).sum())
    assert binomtest(heads, 100_000, probability).pvalue > ALARM


def test_a_certain_coin_is_certain() -> None:
    assert NoiseStream(KEY).coins(1000, 1.0).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_stream_never_gives_the_same_bytes_twice(counts: list[int]) -> None:
    stream, whole = NoiseStream(KEY), NoiseStream(KEY).uniform(sum(counts))
    assert np.array_equal(np.concatenate([stream.uniform(count) for count in counts]), whole)


def test_the_stream_is_chacha20_under_the_whole_key() -> None:
    block = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(80))
    signed = np.frombuffer(block, dtype="<i8").tolist()
    expected = [((word >> 11) + 0.5) * 2.0**-53 + 0.5 for word in signed]
    assert NoiseStream(KEY).uniform(10) == pytest.approx(expected, abs=1e-15)
    first = NoiseStream(KEY).gaussian((8,))
    for byte in range(KEY_BYTES):
        changed = bytearray(KEY)
        changed[byte] ^= 1
        assert not np.isin(NoiseStream(bytes(changed)).gaussian((8,)), first).any()


@pytest.mark.parametrize("count", [1, 7, 16_384, 16_385, 40_000])
def test_a_gaussian_takes_64_bits_of_the_stream(count: int) -> None:
    """By the inverse of the normal distribution function, which is not how it is computed."""
    uniforms = NoiseStream(KEY).uniform(count)
    assert NoiseStream(KEY).gaussian((count,)) == pytest.approx(ndtri(uniforms), rel=1e-9, abs=1e-12)
    assert len(np.unique(uniforms)) == count


def test_draws_in_parts_are_the_draw_as_a_whole() -> None:
    stream, whole = NoiseStream(KEY), NoiseStream(KEY).gaussian((20_000,))
    assert np.array_equal(np.concatenate([stream.gaussian((count,)) for count in (1, 4095, 15_904)]), whole)


@pytest.mark.parametrize("deviation", [1.0, 0.7, 3e-4, 1e9])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_a_release_is_the_noised_sum_on_a_grid_that_shows_nothing_finer(deviation: float, size: float) -> None:
    total = size * deviation * torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    normals = NoiseStream(KEY).gaussian((5000,))
    noisy = release(total, deviation, normals.copy())
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 20)
    assert deviation / 2**20 >= grid > deviation / 2**21
    assert torch.equal(torch.round(noisy / grid) * grid, noisy)
    assert (noisy - total).numpy() == pytest.approx(deviation * normals, abs=grid * 0.51)


def test_the_sum_under_a_release_cannot_be_told_from_its_last_bits() -> None:
    """Sums that differ by less than the grid give the same points; without the grid, no value would be the same."""
    normals = NoiseStream(KEY).gaussian((1000,))
    here, there = (release(torch.full((1000,), value), 1.0, normals.copy()) for value in (0.25, 0.25 + 2.0**-24))
    assert (here == there).double().mean() > 0.9


def test_no_noise_leaves_the_sum_as_it_is() -> None:
    total = torch.tensor([0.1, -3.0], dtype=torch.float32)
    assert torch.equal(release(total, 0.0, NoiseStream(KEY).gaussian((2,))), total.double())


def test_the_grid_is_symmetric_and_its_ends_are_finite() -> None:
    """The most extreme 64 bits give the most extreme summand and its mirror image."""

    class Ends(NoiseStream):
        def __init__(self) -> None:
            NoiseStream.__init__(self, KEY)
            self._cipher = self

        def update(self, data: bytes) -> bytes:
            return np.array([2**63 - 1, -(2**63), 0, -1] * (len(data) // 32), dtype="<i8").tobytes()

    points = Ends()._fill_symmetric(np.empty(4))
    assert points.tolist() == [1 - 2.0**-53, -(1 - 2.0**-53), 2.0**-53, -(2.0**-53)]
    assert math.sqrt(2) * float(torch.erfinv(torch.from_numpy(points))[0]) == pytest.approx(-ndtri(2.0**-54), rel=1e-9)


def test_a_value_s_bits_do_not_depend_on_its_place() -> None:
    """Executors are compared to the bit; vectorised code treats the ends of an array in its own way."""
    points = torch.from_numpy(NoiseStream(KEY).uniform(1003) * 2 - 1)
    whole = torch.erfinv(points)
    for offset in range(1, 20):
        assert torch.equal(torch.erfinv(points[offset:].clone()), whole[offset:])


def test_a_seed_of_torch_or_numpy_changes_nothing() -> None:
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        draws.append(NoiseStream(KEY).gaussian((4,)))
    assert np.array_equal(*draws)


def test_the_operating_system_gives_a_new_key_for_the_same_purpose() -> None:
    assert len(os_entropy("run/site/1")) == KEY_BYTES >= 16
    assert os_entropy("run/site/1") != os_entropy("run/site/1")


def test_seeded_keys_repeat_by_seed_and_purpose_only() -> None:
    assert SeededEntropy(1)("a") == SeededEntropy(1)("a")
    assert len({SeededEntropy(1)("a"), SeededEntropy(1)("b"), SeededEntropy(2)("a")}) == 3


@pytest.mark.parametrize("key", [b"", bytes(4), bytes(31), bytes(33)])
def test_a_short_or_long_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        NoiseStream(key)


def test_the_key_is_not_shown() -> None:
    assert KEY.hex() not in repr(NoiseStream(KEY))
    assert str(KEY) not in repr(NoiseStream(KEY))
