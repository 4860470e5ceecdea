"""The noise stream: coins, independence, key, secrecy; its Gaussians are in test_rounded_gaussian.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest

from common.privacy.noise import KEY_BYTES, NoiseStream, SeededEntropy, os_entropy

KEY = bytes(range(KEY_BYTES))
ALARM = 1e-6


def test_uniforms_are_uniform_and_never_zero() -> None:
    draws = NoiseStream(KEY).uniform(200_000)
    assert kstest(draws, "uniform").pvalue > ALARM
    assert draws.min() > 0.0 and draws.max() <= 1.0


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
    words = np.frombuffer(block, dtype="<u8").tolist()
    assert NoiseStream(KEY).uniform(10).tolist() == [((word >> 11) + 1) * 2.0**-53 for word in words]
    first = NoiseStream(KEY).rounded_gaussian(8, 40)
    for byte in range(KEY_BYTES):
        changed = bytearray(KEY)
        changed[byte] ^= 1
        assert not np.isin(NoiseStream(bytes(changed)).rounded_gaussian(8, 40), first).any()


def test_a_seed_of_torch_or_numpy_changes_nothing() -> None:
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        draws.append(NoiseStream(KEY).rounded_gaussian(4, 40))
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
