"""The coordinator's side of a secure sum: it adds masked vectors and removes the masks that the sites let it remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.secure_sum.masks import SignedKeys, derive_private_key, hash_view, make_pair_mask, make_self_mask
from common.secure_sum.shamir import SHARE_BYTES, combine_shares
from common.secure_sum.terms import SumTerms, list_sorted
from common.types import BadInput


@dataclass(frozen=True)
class Collected:
    """The content of an attempt as it came in, up to the masked vectors.

    Attributes:
        terms: the attempt.
        keys: name -> signed keys of all who take part.
        senders: names of the sites whose shares were passed on.
        heads: digest of the parameters that were sent.
        masked: survivor -> masked vector, all of one length.
    """

    terms: SumTerms
    keys: Mapping[str, str]
    senders: Sequence[str]
    heads: str
    masked: Mapping[str, bytes]


def select_shares(encrypted: Mapping[str, Mapping[str, str]], receiver: str) -> dict[str, str]:
    """Returns name -> the share that each other site encrypted for one receiver.

    Args:
        encrypted: sender -> receiver -> encrypted share.
        receiver: the site that is sent them.
    """
    return {sender: shares[receiver] for sender, shares in encrypted.items() if sender != receiver}


def unmask_sum(collected: Collected, revealed: Mapping[str, Mapping[str, str]]) -> NDArray[np.int64]:
    """Returns the exact sum of the survivors' vectors modulo 2**64, as signed integers.

    Args:
        collected: the attempt.
        revealed: site -> name -> its share of one secret of that site, from enough sites.

    Raises:
        BadInput: there are too few shares, or those of a site do not fit together.
    """
    threshold = collected.terms.rules.compute_threshold(len(collected.keys))
    view = hash_view(collected.terms, collected.keys, collected.senders, collected.heads)
    total: NDArray[np.uint64] = np.zeros(len(next(iter(collected.masked.values()))) // 8, np.uint64)
    for data in collected.masked.values():
        total += np.frombuffer(data, "<u8")
    for name in list_sorted(collected.senders):
        secret = _combine(collected, revealed, name, threshold)
        if name in collected.masked:
            total -= make_self_mask(secret, view, name, len(total))
            continue
        key = derive_private_key(secret)
        if key.public_key().public_bytes_raw() != SignedKeys.parse(collected.keys[name]).mask_key:
            raise BadInput(f"expected shares of the mask key of {name}, got others")
        for other in collected.masked:
            # The site's own mask: the negative of what the survivor added.
            public = SignedKeys.parse(collected.keys[other]).mask_key
            total += make_pair_mask(key, public, view, name=name, other=other, length=len(total))
    signed: NDArray[np.int64] = total.view(np.int64)
    return signed


def _combine(collected: Collected, revealed: Mapping[str, Mapping[str, str]], name: str, threshold: int) -> bytes:
    points = {site: point for point, site in enumerate(list_sorted(collected.keys), start=1)}
    shares = {points[site]: bytes.fromhex(shares[name]) for site, shares in revealed.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise BadInput(f"expected shares of a secret of {name}, got something else")
    return combine_shares(shares, threshold)
