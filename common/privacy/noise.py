"""The only source of privacy randomness: a ChaCha20 stream under a 256-bit key.

The key comes from the operating system at the site. torch's and NumPy's generators are not used: torch's CPU generator
takes 32 bits of its seed, so that all seeds can be tried against a release.

Samples are double-precision floats, whose last bits could tell what they were added to (Mironov 2012). So a noised sum
is rounded to a grid of a millionth of the noise (`release`): whatever the sum was, each point stands for billions of
samples, and nobody can tell which it was. Rounding comes after the noise and costs no privacy. Limit, stated: this is
not an exact discrete distribution; a point in the far tail, which is hardly ever drawn, stands for few samples.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32

_CHUNK = 16384
"""Number of Gaussians made at once: they stay in a core's own cache."""

_GRID = 20
"""A noised sum is rounded to a power of two of at most 2**-20 times the noise's standard deviation."""

Entropy = Callable[[str], bytes]
"""Purpose -> 32 bytes of key. Injected through one argument of the client app's factory; never set by a file."""


def os_entropy(purpose: str) -> bytes:
    """Returns a fresh key from the operating system; the purpose is ignored."""
    del purpose
    return os.urandom(KEY_BYTES)


class SeededEntropy:
    """Keys derived from a seed and the purpose: reproducible, not private. For simulations and tests only."""

    def __init__(self, seed: int) -> None:
        self._secret = hashlib.sha256(f"headwater noise {seed}".encode()).digest()

    def __call__(self, purpose: str) -> bytes:
        """Returns the same key for the same purpose."""
        return hmac.new(self._secret, purpose.encode(), hashlib.sha256).digest()


class NoiseStream:
    """A cryptographic stream of uniforms, coins and Gaussians. Each value is drawn once."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
        # A nonce of zeros is safe because a key is used for one stream only.
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __repr__(self) -> str:
        return "NoiseStream(key hidden)"

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Returns `count` doubles strictly inside (0, 1), uniform on a grid of 2**53 points."""
        # (x + 1) / 2 of the grid below; its last point would round to 1.
        return np.minimum(self._fill_symmetric(np.empty(count)) * 0.5 + 0.5, 1.0 - 2.0**-53)

    def coins(self, count: int, probability: float) -> NDArray[np.bool_]:
        """Returns `count` independent coins; with probability 1 all are true and nothing is drawn."""
        if probability >= 1.0:
            return np.ones(count, dtype=np.bool_)
        return self.uniform(count) < probability

    def gaussian(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Returns independent standard normals: sqrt(2) erfinv(x), each of its own 64 bits of the stream."""
        count = math.prod(shape)
        samples = np.empty(count)
        for start in range(0, count, _CHUNK):
            part = self._fill_symmetric(samples[start : start + _CHUNK])
            # In place, by torch: vectorised, and the same bits whatever the position (tested).
            torch.from_numpy(part).erfinv_()
            part *= math.sqrt(2.0)
        return samples.reshape(shape)

    def _fill_symmetric(self, out: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fills an array with doubles inside (-1, 1), uniform on the 2**53 points (k + 1/2) / 2**52.

        Each point is exact and none is 0.
        """
        words = np.frombuffer(self._cipher.update(bytes(8 * len(out))), dtype="<i8")
        np.multiply(words >> 11, 2.0**-52, out=out)
        out += 2.0**-53
        return out


def release(total: Tensor, deviation: float, normals: NDArray[np.float64]) -> Tensor:
    """Returns a sum with Gaussian noise, float64, on the grid; in the sum's shape and on its device.

    Args:
        total: the sum to release, in any precision; double precision adds it without rounding it.
        deviation: standard deviation of the noise; 0 adds none.
        normals: standard normals, one for each value of the sum, drawn for this release alone; overwritten.
    """
    if deviation == 0.0:
        return total.double()
    grid = 2.0 ** (math.floor(math.log2(deviation)) - _GRID)
    noise = torch.from_numpy(normals).to(total.device)
    # Powers of two scale without rounding.
    return noise.mul_(deviation / grid).add_(total, alpha=1.0 / grid).round_().mul_(grid)
