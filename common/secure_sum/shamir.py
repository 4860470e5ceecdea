"""Shamir's secret sharing (1979) of 32 bytes over the integers modulo a prime above 2**256.

Guarantee: fewer shares than the threshold are independent of the secret, up to the distance of the coefficients from
uniform (below 2**-200 for each).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.types import BadInput

PRIME = 2**256 + 297
"""The smallest prime above 2**256."""

SECRET_BYTES = 32
SHARE_BYTES = 33
_COEFFICIENT_BYTES = 60
"""So many uniform bytes modulo the prime are uniform to 2**-223."""


def split_secret(secret: bytes, num_shares: int, threshold: int, draw: Callable[[int], bytes]) -> list[bytes]:
    """Returns the shares of a secret at the points 1, 2, ..., of SHARE_BYTES each.

    Args:
        secret: SECRET_BYTES.
        num_shares: number of shares.
        threshold: number of shares that determine the secret, from 1 to `num_shares`.
        draw: returns so many fresh uniform bytes.

    Raises:
        ValueError: a number is outside its range.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= num_shares:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes and a threshold from 1 to {num_shares}")
    drawn = draw(_COEFFICIENT_BYTES * (threshold - 1))
    parts = [drawn[start : start + _COEFFICIENT_BYTES] for start in range(0, len(drawn), _COEFFICIENT_BYTES)]
    coefficients = [int.from_bytes(part, "big") % PRIME for part in parts] + [int.from_bytes(secret, "big")]
    shares = []
    for point in range(1, num_shares + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def combine_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Returns the secret that shares determine; of more shares than the threshold, those at the lowest points count.

    Args:
        shares: point of each share -> the share.
        threshold: number of shares that determine the secret.

    Raises:
        BadInput: there are too few shares, or together they are those of no secret.
    """
    if len(shares) < threshold:
        raise BadInput(f"expected at least {threshold} shares of a secret, got {len(shares)}")
    points = sorted(shares)[:threshold]
    secret = 0
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        secret += int.from_bytes(shares[point], "big") * above * pow(below, -1, PRIME)
    secret %= PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise BadInput("expected shares of one secret, got others")
    return secret.to_bytes(SECRET_BYTES, "big")
