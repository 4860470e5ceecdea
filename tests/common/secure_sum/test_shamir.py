"""Shares determine a secret from the threshold on, and say nothing below it."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secure_sum.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine_shares, split_secret
from common.types import BadInput


def draw_from(seed: int) -> Callable[[int], bytes]:
    return lambda count: hashlib.shake_256(str(seed).encode()).digest(count)


def test_the_modulus_is_prime() -> None:
    """Miller and Rabin with 64 bases: a composite number passes with probability below 2**-128."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 66):
        value = pow(base, odd, PRIME)
        powers = [pow(value, 2**i, PRIME) for i in range(twos)]
        assert value == 1 or PRIME - 1 in powers


@settings(deadline=None, max_examples=60)
@given(
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
    num_shares=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_shares_from_the_threshold_on_determine_the_secret(
    secret: bytes, num_shares: int, seed: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, num_shares))
    shares = split_secret(secret, num_shares, threshold, draw_from(seed))
    assert [len(share) for share in shares] == [SHARE_BYTES] * num_shares
    points = data.draw(st.permutations(range(1, num_shares + 1)))[: data.draw(st.integers(threshold, num_shares))]
    assert combine_shares({point: shares[point - 1] for point in points}, threshold) == secret


def test_the_extreme_secrets_survive() -> None:
    for secret in (bytes(SECRET_BYTES), b"\xff" * SECRET_BYTES):
        shares = split_secret(secret, 5, 3, os.urandom)
        for points in itertools.combinations(range(1, 6), 3):
            assert combine_shares({point: shares[point - 1] for point in points}, 3) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """For each secret there is exactly one polynomial through the shares that are known: they exclude none."""
    shares = split_secret(b"a" * SECRET_BYTES, 5, 3, draw_from(1))
    known = {1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
    for other in (b"b" * SECRET_BYTES, bytes(SECRET_BYTES)):
        # The polynomial of degree 2 through (0, other), (1, ...), (2, ...), evaluated at 3 by Lagrange.
        points = {0: int.from_bytes(other, "big"), **known}
        value = 0
        for x, y in points.items():
            term = y
            for z in set(points) - {x}:
                term = term * (3 - z) * pow(x - z, -1, PRIME) % PRIME
            value = (value + term) % PRIME
        assert combine_shares({1: shares[0], 2: shares[1], 3: value.to_bytes(SHARE_BYTES, "big")}, 3) == other


def test_too_few_shares_and_shares_that_do_not_fit_are_refused() -> None:
    shares = split_secret(b"a" * SECRET_BYTES, 5, 3, draw_from(1))
    with pytest.raises(BadInput, match="at least 3 shares"):
        combine_shares({1: shares[0], 2: shares[1]}, 3)
    # A secret of more than 256 bits: only shares that were not made so give one.
    high = (PRIME - 1).to_bytes(SHARE_BYTES, "big")
    with pytest.raises(BadInput, match="one secret"):
        combine_shares({1: high}, 1)


@pytest.mark.parametrize(("secret", "threshold"), [(b"short", 2), (b"a" * SECRET_BYTES, 0), (b"a" * SECRET_BYTES, 4)])
def test_what_cannot_be_shared_is_refused(secret: bytes, threshold: int) -> None:
    with pytest.raises(ValueError, match="expected a secret"):
        split_secret(secret, 3, threshold, os.urandom)
