"""A site's identity in secure sums: an Ed25519 key pair, with which it signs its keys of each round.

The private key is readable by its owner only and never leaves the site. The public key, 64 hex digits, is what the
other sites write into the roster of their site files; they get it from the site's staff and not from the coordinator,
who could put sites of its own in their place.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from common.errors import instead
from common.types import BadInput

SIGNATURE_BYTES = 64
_OTHERS = 0o077


def write_identity(path: Path) -> Ed25519PrivateKey:
    """Writes a new identity key to a file and returns it.

    Raises:
        BadInput: there is a file already; a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    try:
        # Exclusive, and with its mode from the first moment: no window in which others could read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise BadInput(f"{path}: it exists already, and a key is never overwritten") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def read_identity(path: Path) -> Ed25519PrivateKey:
    """Returns the identity key in a file.

    Raises:
        BadInput: the file is missing or readable by others, or holds no Ed25519 key without a passphrase.
    """
    try:
        mode, raw = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise BadInput(f"expected this site's identity key in {path}{instead(error)}") from error
    if mode & _OTHERS:
        raise BadInput(f"{path} can be read by others than its owner; chmod 600 it")
    try:
        key = load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: expected a private key without a passphrase, got something else") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path}: expected an Ed25519 key, got another kind")
    return key


def format_public_key(key: Ed25519PrivateKey) -> str:
    """Returns the public key as 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def is_signed(public_key: str, signature: bytes, message: bytes) -> bool:
    """Returns true if a signature of a message was made with the private key of a public one.

    Args:
        public_key: 64 hex digits.
        signature: the signature.
        message: what was signed.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
