"""Keys and masks of one attempt at a secure sum (Bonawitz et al. 2017, Section 4).

Each pair of sites agrees on a key by X25519; HKDF-SHA256 binds the attempt, all sites' keys, the sites whose shares
arrived and the parameters that were sent into it; ChaCha20 stretches it to a vector modulo 2**64, which one of the two
adds and the other subtracts. A second mask, of each site alone, keeps a vector hidden that arrives after the others
have revealed what removes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.secure_sum.identity import SIGNATURE_BYTES
from common.secure_sum.terms import SumTerms, hash_terms
from common.types import BadInput

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE = bytes(12)
"""Safe because each key encrypts one message: it is derived for one attempt, roster and direction."""


@dataclass(frozen=True)
class SignedKeys:
    """The public keys of one site for one attempt.

    Attributes:
        mask_key: X25519 key for pairwise masks; its private part is shared among the sites.
        share_key: X25519 key that encrypts shares; its private part never leaves the site.
        signature: Ed25519 signature by the site's identity key.
    """

    mask_key: bytes
    share_key: bytes
    signature: bytes

    @classmethod
    def parse(cls, text: str) -> SignedKeys:
        """Returns the keys in a text of hex digits.

        Raises:
            BadInput: it is none, or of another length.
        """
        try:
            raw = bytes.fromhex(text)
        except ValueError as error:
            raise BadInput("expected keys as hex digits, got something else") from error
        if len(raw) != 2 * KEY_BYTES + SIGNATURE_BYTES:
            raise BadInput("expected two keys and a signature, got another length")
        return cls(raw[:KEY_BYTES], raw[KEY_BYTES : 2 * KEY_BYTES], raw[2 * KEY_BYTES :])

    def format(self) -> str:
        """Returns the keys as hex digits."""
        return (self.mask_key + self.share_key + self.signature).hex()


def derive_key(secret: bytes, info: bytes) -> bytes:
    """Returns a key for one purpose from a secret, by HKDF-SHA256."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def derive_private_key(secret: bytes) -> X25519PrivateKey:
    """Returns the X25519 key pair of a private key of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret)


def make_stream(key: bytes) -> Callable[[int], bytes]:
    """Returns a function that returns so many next bytes of the ChaCha20 stream of a key."""
    # A nonce of zeros is safe because a key is used for one stream only.
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: encryptor.update(bytes(count))


def agree(private: X25519PrivateKey, public: bytes, info: bytes) -> bytes:
    """Returns the key that two sites share for one purpose.

    Args:
        private: key of one.
        public: public key of the other.
        info: everything that the key is bound to.

    Raises:
        BadInput: the public key is none.
    """
    try:
        return derive_key(private.exchange(X25519PublicKey.from_public_bytes(public)), info)
    except ValueError as error:
        raise BadInput("expected an X25519 key, got a value that is none") from error


# --- what keys are bound to ------------------------------------------------------------------------------------------


def hash_roster(terms: SumTerms, keys: Mapping[str, str]) -> bytes:
    """Returns 32 bytes that name an attempt and the signed keys of all who take part."""
    return hash_terms(terms, "roster", dict(keys))


def hash_view(terms: SumTerms, keys: Mapping[str, str], senders: Collection[str], heads: str) -> bytes:
    """Returns 32 bytes that name everything that a site has seen of an attempt before it masks its vector.

    Args:
        terms: the attempt.
        keys: name -> signed keys of all who take part.
        senders: names of the sites whose shares arrived.
        heads: digest of the parameters that were sent.
    """
    return hash_terms(terms, "view", dict(keys), sorted(senders), heads)


# --- shares ----------------------------------------------------------------------------------------------------------


def encrypt_share(private: X25519PrivateKey, public: bytes, info: bytes, share: bytes) -> bytes:
    """Returns a share that only one site can read, and only from the one that sent it.

    Args:
        private: share key of the sender.
        public: public share key of the receiver.
        info: roster, sender and receiver.
        share: the share.
    """
    return ChaCha20Poly1305(agree(private, public, info)).encrypt(_NONCE, share, info)


def decrypt_share(private: X25519PrivateKey, public: bytes, info: bytes, encrypted: bytes) -> bytes:
    """Returns the share that `encrypt_share` encrypted.

    Args:
        private: share key of the receiver.
        public: public share key of the sender.
        info: roster, sender and receiver.
        encrypted: the encrypted share.

    Raises:
        BadInput: it was not encrypted by the sender, for this receiver, in this attempt.
    """
    try:
        return ChaCha20Poly1305(agree(private, public, info)).decrypt(_NONCE, encrypted, info)
    except InvalidTag as error:
        raise BadInput("expected a share that its sender encrypted for this attempt, got something else") from error


# --- masks -----------------------------------------------------------------------------------------------------------


def expand_mask(key: bytes, length: int) -> NDArray[np.uint64]:
    """Returns the first `length` values of a key's mask, uniform modulo 2**64."""
    return np.frombuffer(make_stream(key)(8 * length), dtype="<u8")


def make_self_mask(secret: bytes, view: bytes, name: str, length: int) -> NDArray[np.uint64]:
    """Returns the mask that a site adds alone.

    Args:
        secret: the site's secret, of 32 bytes.
        view: what `hash_view` returned.
        name: the site.
        length: number of values.
    """
    return expand_mask(derive_key(secret, b"self mask" + view + name.encode()), length)


def make_pair_mask(
    private: X25519PrivateKey, public: bytes, view: bytes, *, name: str, other: str, length: int
) -> NDArray[np.uint64]:
    """Returns the mask that one of two sites adds; the other one's is its negative.

    Args:
        private: mask key of the first site.
        public: public mask key of the second.
        view: what `hash_view` returned.
        name: the first site.
        other: the second.
        length: number of values.
    """
    pair = "/".join(sorted((name, other)))  # No name holds a slash.
    mask = expand_mask(agree(private, public, b"pair mask" + view + pair.encode()), length)
    return mask if name < other else np.negative(mask)
