"""The only source of privacy randomness: a ChaCha20 stream under a 256-bit key.

The key comes from the operating system at the site. torch's and NumPy's generators are not used: torch's CPU generator
takes 32 bits of its seed, so that all seeds can be tried against a release.

What is added to a release are whole numbers of the Gaussian law (`common.privacy.rounded_gaussian`), because the sum is
whole as well (`common.privacy.lattice`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from common.privacy.exponential import choose_least_cost
from common.privacy.rounded_gaussian import draw_many_rounded_gaussians, draw_rounded_gaussian

if TYPE_CHECKING:
    from torch import Tensor

KEY_BYTES = 32

_ZEROS = memoryview(bytes(2**17))
"""Zeros are enciphered, so that the stream itself comes out; most draws take no more."""

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
        """Returns `count` doubles in (0, 1], uniform on the 2**53 points k / 2**53."""
        return ((self._draw_words(count) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53

    def coins(self, count: int, probability: float) -> NDArray[np.bool_]:
        """Returns `count` independent coins; with probability 1 all are true and nothing is drawn."""
        if probability >= 1.0:
            return np.ones(count, dtype=np.bool_)
        return self.uniform(count) <= probability

    def rounded_gaussian(self, count: int, log2_deviation: int) -> NDArray[np.int64]:
        """Returns independent integers floor(2**log2_deviation X), X standard normal."""
        return draw_rounded_gaussian(self._draw_words, count, log2_deviation)

    def choose_least_cost(self, costs: Sequence[int], sensitivity: int, epsilon: float) -> int:
        """Returns the index that the exponential mechanism chooses (`common.privacy.exponential`).

        Args:
            costs: cost of each candidate.
            sensitivity: length of an interval that holds the changes of all costs by one unit.
            epsilon: price of the choice.
        """
        return choose_least_cost(costs, sensitivity, epsilon, self._draw_words)

    def inspect(self, total: Tensor, noise: NDArray[np.int64]) -> None:
        """Does nothing with an exact sum and what is about to be added to it.

        The stream that an audit owns keeps both, of synthetic records.
        """

    def _draw_words(self, count: int) -> NDArray[np.uint64]:
        words = np.empty(count, "<u8")
        self._write_words(words)
        return words

    def _write_words(self, words: NDArray[np.uint64]) -> None:
        size = words.nbytes
        if size:  # An empty view has no bytes to cast to.
            self._cipher.update_into(_ZEROS[:size] if size <= len(_ZEROS) else bytes(size), words.data.cast("B"))

    @staticmethod
    def draw_each(streams: Sequence[NoiseStream], count: int, log2_deviation: int) -> NDArray[np.int64]:
        """Returns what `rounded_gaussian` returns from each of some streams: S x `count` integers.

        Args:
            streams: the streams, each of its own key.
            count: number of integers from each.
            log2_deviation: as in `rounded_gaussian`.
        """
        writers, sources = [each._write_words for each in streams], [each._draw_words for each in streams]
        return draw_many_rounded_gaussians(writers, sources, count, log2_deviation)


def draw_key(entropy: Entropy, run: str, site: str, release: str) -> bytes:
    """Returns the key of one release: of a site's rounds and evaluations, and of its audit, which tests this code.

    The purpose names everything that makes a release distinct; a key from the operating system ignores it.

    Args:
        entropy: source of the key.
        run: name of the run.
        site: name of the site.
        release: the round's number, and the kind of release where it is not a round's update.
    """
    return entropy(f"{run}/{site}/{release}")


def open_stream(entropy: Entropy, run: str, site: str, release: str) -> NoiseStream:
    """Returns the stream of one release, under a key of its own (`draw_key`).

    Args:
        entropy: source of the key.
        run: name of the run.
        site: name of the site.
        release: the round's number, and the kind of release where it is not a round's update.
    """
    return NoiseStream(draw_key(entropy, run, site, release))
