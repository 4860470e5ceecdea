"""A site's side of one attempt at a secure sum: five answers, each given once, from one secret seed.

The state is a value: it is kept on the site's disk, so that a site that is killed between two steps goes on with the
same keys. Each `accept_` function takes a request's content into the state: the same content again changes nothing, and
another one is refused. All else follows from the state, so that a repeated request gets the same bytes.

Guarantee (proof in docs/secure-sum.md): whatever the coordinator and `colluding` sites do, of an honest site's vectors
at most one sum leaves, modulo 2**64, in which those of at least `min_sites` - `colluding` honest sites stand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from common.secure_sum.identity import is_signed
from common.secure_sum.masks import (
    SignedKeys,
    agree,
    decrypt_share,
    derive_key,
    derive_private_key,
    encrypt_share,
    hash_roster,
    hash_view,
    make_pair_mask,
    make_self_mask,
    make_stream,
)
from common.secure_sum.shamir import SHARE_BYTES, split_secret
from common.secure_sum.terms import MAX_SITES, SumRules, SumTerms, hash_terms, list_sorted
from common.types import BadInput


@dataclass(frozen=True)
class Member:
    """A site that takes part in secure sums.

    Attributes:
        name: its name.
        identity: its private identity key.
        roster: name -> public identity key of every site, itself among them, from its own file.
    """

    name: str
    identity: Ed25519PrivateKey
    roster: Mapping[str, str]


@dataclass(frozen=True)
class SiteAttempt:
    """The state of one site in one attempt.

    Attributes:
        terms: the attempt.
        name: the site's name.
        seed: 32 secret bytes, of this attempt alone.
        keys: name -> signed keys of all who take part; None until they came.
        shares: name -> encrypted share of each other site whose shares arrived; None until they came.
        heads: digest of the parameters that came with the shares.
        survivors: the one list of survivors that this site confirmed; None before.
    """

    terms: SumTerms
    name: str
    seed: bytes = field(repr=False)
    keys: Mapping[str, str] | None = None
    shares: Mapping[str, str] | None = None
    heads: str = ""
    survivors: tuple[str, ...] | None = None

    def to_bytes(self) -> bytes:
        """Returns the state as it is kept on disk."""
        return json.dumps({**asdict(self), "seed": self.seed.hex()}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteAttempt:
        """Returns the state that `to_bytes` wrote.

        Raises:
            BadInput: it is none.
        """
        try:
            values = json.loads(data)
            terms, survivors = values["terms"], values["survivors"]
            return cls(
                SumTerms(**{**terms, "rules": SumRules(**terms["rules"])}),
                values["name"],
                bytes.fromhex(values["seed"]),
                values["keys"],
                values["shares"],
                values["heads"],
                None if survivors is None else tuple(survivors),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput("expected the state of a secure sum, got something else") from error

    @property
    def roster(self) -> Mapping[str, str]:
        """Name -> signed keys of all who take part.

        Raises:
            BadInput: they have not come yet.
        """
        if self.keys is None:
            raise BadInput("expected the keys of all sites first")
        return self.keys

    @property
    def senders(self) -> tuple[str, ...]:
        """The sites whose shares arrived, and this one.

        Raises:
            BadInput: they have not come yet.
        """
        if self.shares is None:
            raise BadInput("expected the shares of the other sites first")
        return list_sorted([*self.shares, self.name])

    @property
    def threshold(self) -> int:
        """The number of shares that determine a secret, and of sites that confirm a list of survivors."""
        return self.terms.rules.compute_threshold(len(self.roster))

    @property
    def num_needed(self) -> int:
        """The number of sites without which nothing is unmasked."""
        return self.terms.rules.count_needed(len(self.roster))

    @property
    def view(self) -> bytes:
        """Everything that the masks are bound to."""
        return hash_view(self.terms, self.roster, self.senders, self.heads)

    @property
    def mask_secret(self) -> bytes:
        """The bytes of the private key of pairwise masks, which are shared."""
        return derive_key(self.seed, b"mask key")

    @property
    def mask_private_key(self) -> X25519PrivateKey:
        """The private key of pairwise masks."""
        return derive_private_key(self.mask_secret)

    @property
    def self_secret(self) -> bytes:
        """The secret of the mask that this site adds alone, which is shared."""
        return derive_key(self.seed, b"self mask")

    @property
    def share_key(self) -> X25519PrivateKey:
        """The private key that encrypts and decrypts shares."""
        return derive_private_key(derive_key(self.seed, b"share key"))


# --- 1: keys ---------------------------------------------------------------------------------------------------------


def make_keys(member: Member, attempt: SiteAttempt) -> str:
    """Returns the site's public keys for this attempt, signed, as hex digits."""
    mask_key = attempt.mask_private_key.public_key().public_bytes_raw()
    share_key = attempt.share_key.public_key().public_bytes_raw()
    signature = member.identity.sign(_hash_keys(attempt.terms, member.name, mask_key, share_key))
    return SignedKeys(mask_key, share_key, signature).format()


def accept_keys(member: Member, attempt: SiteAttempt, keys: Mapping[str, str]) -> SiteAttempt:
    """Returns the state with the keys of all who take part, of which each is known and signed.

    Args:
        member: the site.
        attempt: its state.
        keys: name -> signed keys.

    Raises:
        BadInput: other keys came before, a site is not in the roster of this site's file or did not sign its keys,
            this site's own keys are not among them, two sites have the same key or one has a key that is none, or there
            are too few sites.
    """
    if attempt.keys is not None:
        return _refuse_another(attempt, attempt.keys == dict(keys), "list of keys")
    if keys.get(member.name) != make_keys(member, attempt):
        raise BadInput("expected this site's own keys among those of all sites, got others or none")
    least = attempt.terms.rules.min_sites
    if not least <= len(keys) <= MAX_SITES:
        raise BadInput(f"expected the keys of {least} to {MAX_SITES} sites, got those of {len(keys)}")
    public: set[bytes] = set()
    for name, text in sorted(keys.items()):
        if name not in member.roster:
            raise BadInput("a site takes part that is not in the roster of this site's file")
        signed = SignedKeys.parse(text)
        signed_hash = _hash_keys(attempt.terms, name, signed.mask_key, signed.share_key)
        if not is_signed(member.roster[name], signed.signature, signed_hash):
            raise BadInput(f"the keys of {name} were not signed for this attempt by the key in this site's roster")
        # Now, because a vector is charged before it is masked: a key with which none can agree is to cost nothing.
        agree(attempt.mask_private_key, signed.mask_key, b"check")
        agree(attempt.share_key, signed.share_key, b"check")
        public |= {signed.mask_key, signed.share_key}
    if len(public) != 2 * len(keys):
        raise BadInput("expected different keys of all sites, got one twice")
    return replace(attempt, keys=dict(keys))


# --- 2: shares -------------------------------------------------------------------------------------------------------


def make_shares(attempt: SiteAttempt) -> dict[str, str]:
    """Returns name -> encrypted shares of this site's two secrets for each other site, as hex digits."""
    names, roster, key = list_sorted(attempt.roster), hash_roster(attempt.terms, attempt.roster), attempt.share_key
    encrypted = {}
    split = [_split(attempt, secret, roster) for secret in (attempt.mask_secret, attempt.self_secret)]
    for name, mask_share, self_share in zip(names, *split, strict=True):
        if name != attempt.name:
            public = SignedKeys.parse(attempt.roster[name]).share_key
            info = _name_direction(roster, attempt.name, name)
            encrypted[name] = encrypt_share(key, public, info, mask_share + self_share).hex()
    return encrypted


def accept_shares(attempt: SiteAttempt, shares: Mapping[str, str], heads: str) -> SiteAttempt:
    """Returns the state with the shares of the other sites, all of which this site can read.

    Args:
        attempt: the site's state.
        shares: name -> encrypted share of each other site whose shares arrived.
        heads: digest of the parameters that came with them.

    Raises:
        BadInput: other shares or parameters came before, a share is not readable or of nobody who takes part, or there
            are too few.
    """
    if attempt.shares is not None:
        same = attempt.shares == dict(shares) and attempt.heads == heads
        return _refuse_another(attempt, same, "list of shares, or with other parameters")
    if not set(shares) <= set(attempt.roster) - {attempt.name}:
        raise BadInput("expected shares of the other sites that take part, got one of another site")
    if len(shares) + 1 < attempt.num_needed:
        raise BadInput(f"expected the shares of at least {attempt.num_needed} sites, got those of {len(shares) + 1}")
    accepted = replace(attempt, shares=dict(shares), heads=heads)
    _read_shares(accepted, shares)
    return accepted


# --- 3: the masked vector --------------------------------------------------------------------------------------------


def mask_vector(attempt: SiteAttempt, values: NDArray[np.int64]) -> bytes:
    """Returns a vector modulo 2**64 under all masks, as little-endian bytes.

    Args:
        attempt: the site's state after `accept_shares`.
        values: the vector, of one dimension.
    """
    view, key = attempt.view, attempt.mask_private_key
    masked = values.astype("<i8").view("<u8").copy()
    masked += make_self_mask(attempt.self_secret, view, attempt.name, len(values))
    for other in attempt.senders:
        if other != attempt.name:
            public = SignedKeys.parse(attempt.roster[other]).mask_key
            masked += make_pair_mask(key, public, view, name=attempt.name, other=other, length=len(values))
    return masked.tobytes()


# --- 4: the list of survivors ----------------------------------------------------------------------------------------


def accept_survivors(attempt: SiteAttempt, survivors: Sequence[str]) -> SiteAttempt:
    """Returns the state with the one list of survivors that this site confirms.

    Args:
        attempt: the site's state after `accept_shares`.
        survivors: names of the sites whose masked vectors arrived.

    Raises:
        BadInput: it confirmed another list before, is not in this one, or the list is too short or has a name in it
            that sent no shares.
    """
    listed = list_sorted(survivors)
    if attempt.survivors is not None:
        return _refuse_another(attempt, attempt.survivors == listed, "list of survivors")
    if attempt.name not in listed or not set(listed) <= set(attempt.senders):
        raise BadInput("expected a list of survivors with this site, and without sites that sent no shares")
    if len(listed) < attempt.num_needed:
        raise BadInput(f"expected at least {attempt.num_needed} survivors, got {len(listed)}")
    return replace(attempt, survivors=listed)


def sign_survivors(member: Member, attempt: SiteAttempt) -> str:
    """Returns this site's signature of the list that it confirms and of all that it has seen, as hex digits."""
    return member.identity.sign(_hash_survivors(attempt)).hex()


# --- 5: shares of what removes the masks -----------------------------------------------------------------------------


def reveal_shares(member: Member, attempt: SiteAttempt, signatures: Mapping[str, str]) -> dict[str, str]:
    """Returns name -> this site's share of one secret of each site that sent shares, as hex digits.

    Of a survivor it is the secret of the mask that it added alone, of another site the one of its pairwise masks; never
    both.

    Args:
        member: the site.
        attempt: its state after `accept_survivors`.
        signatures: name -> signature of the list of survivors.

    Raises:
        BadInput: too few survivors signed the list that this site confirmed.
    """
    message, confirmed = _hash_survivors(attempt), 0
    # A site that left the roster since its keys came counts no more.
    for name in set(signatures) & set(attempt.survivors or ()) & set(member.roster):
        confirmed += is_signed(member.roster[name], _from_hex(signatures[name]), message)
    if confirmed < attempt.threshold:
        raise BadInput(
            f"expected the signatures of at least {attempt.threshold} survivors under the list that this site "
            f"confirmed, got {confirmed}"
        )
    survivors, revealed = set(attempt.survivors or ()), {}
    for name, (mask_share, self_share) in _read_shares(attempt, attempt.senders).items():
        revealed[name] = (self_share if name in survivors else mask_share).hex()
    return revealed


# --- parts -----------------------------------------------------------------------------------------------------------


def _refuse_another(attempt: SiteAttempt, same: bool, what: str) -> SiteAttempt:
    if not same:
        raise BadInput(f"a second {what} came for one attempt")
    return attempt


def _hash_keys(terms: SumTerms, name: str, mask_key: bytes, share_key: bytes) -> bytes:
    return hash_terms(terms, "keys", name, mask_key.hex(), share_key.hex())


def _hash_survivors(attempt: SiteAttempt) -> bytes:
    if attempt.survivors is None:
        raise BadInput("expected the list of survivors first")
    return hash_terms(attempt.terms, "survivors", attempt.view.hex(), list(attempt.survivors))


def _name_direction(roster: bytes, sender: str, receiver: str) -> bytes:
    return b"share" + roster + f"{sender}/{receiver}".encode()  # No name holds a slash.


def _split(attempt: SiteAttempt, secret: bytes, roster: bytes) -> list[bytes]:
    """Returns the shares of a secret, drawn anew for each list of keys but the same whenever it is asked for."""
    draw = make_stream(derive_key(attempt.seed, b"coefficients" + roster + secret))
    return split_secret(secret, len(attempt.roster), attempt.threshold, draw)


def _read_shares(attempt: SiteAttempt, names: Iterable[str]) -> dict[str, tuple[bytes, bytes]]:
    """Returns this site's shares of the mask secret and of the self secret of some sites, perhaps of itself.

    Raises:
        BadInput: one was not encrypted for this site in this attempt.
    """
    roster, key, read = hash_roster(attempt.terms, attempt.roster), attempt.share_key, {}
    for name in names:
        if name == attempt.name:
            position = list_sorted(attempt.roster).index(name)
            secrets = (attempt.mask_secret, attempt.self_secret)
            first, second = (_split(attempt, secret, roster)[position] for secret in secrets)
            read[name] = (first, second)
            continue
        public = SignedKeys.parse(attempt.roster[name]).share_key
        encrypted = _from_hex((attempt.shares or {})[name])
        both = decrypt_share(key, public, _name_direction(roster, name, attempt.name), encrypted)
        if len(both) != 2 * SHARE_BYTES:
            raise BadInput(f"expected two shares of {name}, got something else")
        read[name] = (both[:SHARE_BYTES], both[SHARE_BYTES:])
    return read


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise BadInput("expected hex digits, got something else") from error
