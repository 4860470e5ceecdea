"""The only source of privacy randomness: a ChaCha20 stream under a 256-bit key.

The key comes from the operating system at the site. torch's and NumPy's generators are not used: torch's CPU generator
takes 32 bits of its seed, so that all seeds can be tried against a release.

Limit, stated: samples are double-precision floats; the sum of four (below) resists the floating-point attack of
Mironov (2012) as analysed by Holohan and Braghin (2021), it does not sample a discrete distribution.
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

KEY_BYTES = 32

_SUMMANDS = 4

_CHUNK = 4096
"""Gaussians made at once: their four summands stay in a core's own cache."""

Entropy = Callable[[str], bytes]
"""Purpose -> 32 bytes of key. Injected through one argument of the client app's factory; never set by a file."""


def os_entropy(purpose: str) -> bytes:
    """A fresh key from the operating system; the purpose is ignored."""
    del purpose
    return os.urandom(KEY_BYTES)


class SeededEntropy:
    """Keys derived from a seed and the purpose: reproducible, not private. For simulations and tests only."""

    def __init__(self, seed: int) -> None:
        self._secret = hashlib.sha256(f"headwater noise {seed}".encode()).digest()

    def __call__(self, purpose: str) -> bytes:
        """The same key for the same purpose."""
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
        """`count` doubles strictly inside (0, 1), uniform on a grid of 2**53 points."""
        # (x + 1) / 2 of the grid below; its last point would round to 1.
        return np.minimum(self._symmetric(count) * 0.5 + 0.5, 1.0 - 2.0**-53)

    def coins(self, count: int, probability: float) -> NDArray[np.bool_]:
        """`count` independent coins. Probability 1 is certain."""
        if probability >= 1.0:
            return np.ones(count, dtype=np.bool_)
        return self.uniform(count) < probability

    def gaussian(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Independent standard normals, each the sum of four, halved.

        Each summand is sqrt(2) erfinv(x) of its own 64 bits of the stream, in double precision.
        """
        count = math.prod(shape)
        samples = np.empty(count)
        for start in range(0, count, _CHUNK):
            part = samples[start : start + _CHUNK]
            summands = self._symmetric(_SUMMANDS * len(part))
            # In place, by torch: vectorised, and the same bits whatever the position (tested).
            torch.from_numpy(summands).erfinv_()
            np.sum(summands.reshape(_SUMMANDS, -1), axis=0, out=part)
        samples *= math.sqrt(2.0 / _SUMMANDS)
        return samples.reshape(shape)

    def _symmetric(self, count: int) -> NDArray[np.float64]:
        """`count` doubles inside (-1, 1), uniform on the 2**53 points (k + 1/2) / 2**52, each exact; never 0."""
        words = np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<i8")
        points = (words >> 11).astype(np.float64)
        points += 0.5
        points *= 2.0**-52
        return points
