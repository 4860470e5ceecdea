"""A group of sites for tests of secure sums: the real site's side, with an honest coordinator that tests may change."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from common.secure_sum.attempt import (
    Member,
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    mask_vector,
    reveal_shares,
    sign_survivors,
)
from common.secure_sum.identity import format_public_key
from common.secure_sum.terms import SumRules, SumTerms
from common.secure_sum.unmasking import Collected, select_shares, unmask_sum

HEADS = "ab" * 32


def make_members(num_sites: int) -> dict[str, Member]:
    """Returns sites with fixed identity keys, all in one roster."""
    keys = {
        f"site-{i:02d}": Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % i).digest())
        for i in range(num_sites)
    }
    roster = {name: format_public_key(key) for name, key in keys.items()}
    return {name: Member(name, key, roster) for name, key in keys.items()}


def make_terms(min_sites: int = 3, colluding: int = 0, *, round_: int = 1, attempt: int = 1) -> SumTerms:
    """Returns the terms of one attempt."""
    return SumTerms("run-1", round_, attempt, SumRules(min_sites, colluding), 30)


@dataclass
class Group:
    """Sites in the middle of one attempt."""

    members: Mapping[str, Member]
    terms: SumTerms
    states: dict[str, SiteAttempt] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    encrypted: dict[str, dict[str, str]] = field(default_factory=dict)
    masked: dict[str, bytes] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    revealed: dict[str, dict[str, str]] = field(default_factory=dict)

    def advertise(self, without: Collection[str] = ()) -> None:
        """Has every site make its keys, but for those that are gone."""
        for name, member in self.members.items():
            if name not in without:
                seed = hashlib.sha256(f"seed {name} {self.terms.round} {self.terms.attempt}".encode()).digest()
                self.states[name] = SiteAttempt(self.terms, name, seed)
                self.keys[name] = make_keys(member, self.states[name])

    def share(self, without: Collection[str] = ()) -> None:
        """Passes all keys on, and has every site encrypt its shares."""
        for name in self.keys:
            if name not in without:
                self.states[name] = accept_keys(self.members[name], self.states[name], self.keys)
                self.encrypted[name] = make_shares(self.states[name])

    def mask(self, values: Mapping[str, NDArray[np.int64]], without: Collection[str] = ()) -> None:
        """Passes the shares on, and has every site mask its vector."""
        for name in self.encrypted:
            if name not in without:
                self.states[name] = accept_shares(self.states[name], select_shares(self.encrypted, name), HEADS)
                self.masked[name] = mask_vector(self.states[name], values[name])

    def confirm(self, without: Collection[str] = ()) -> None:
        """Passes the list of survivors on, and has every survivor sign it."""
        for name in self.masked:
            if name not in without:
                self.states[name] = accept_survivors(self.states[name], list(self.masked))
                self.signatures[name] = sign_survivors(self.members[name], self.states[name])

    def reveal(self, without: Collection[str] = ()) -> None:
        """Passes the signatures on, and has every site that signed reveal its shares."""
        for name in self.signatures:
            if name not in without:
                self.revealed[name] = reveal_shares(self.members[name], self.states[name], self.signatures)

    def unmask(self) -> NDArray[np.int64]:
        """Returns what the coordinator computes."""
        return unmask_sum(Collected(self.terms, self.keys, list(self.encrypted), HEADS, self.masked), self.revealed)


def draw_values(names: Collection[str], length: int = 17, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Returns a vector of large whole numbers for each site, the extremes of int64 among them."""
    generator = np.random.default_rng(seed)
    values = {name: generator.integers(-(2**60), 2**60, length) for name in names}
    values[min(names)][:2] = [np.iinfo(np.int64).max, np.iinfo(np.int64).min]
    return values


def add_modulo(values: Collection[NDArray[np.int64]]) -> list[int]:
    """Returns the sum of vectors modulo 2**64 as signed numbers, in Python's own integers."""
    sums = [sum(int(vector[i]) for vector in values) for i in range(len(next(iter(values))))]
    return [(total + 2**63) % 2**64 - 2**63 for total in sums]
