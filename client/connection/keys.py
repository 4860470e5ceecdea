"""A site's identity: an EC P-384 key pair in OpenSSH format. The private key is readable by its owner only.

The coordinator gets the public key and nothing else. The private key never leaves the site: whoever holds it can act as
the site.
"""

from __future__ import annotations

import base64
import os
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from common.errors import instead
from common.types import BadInput

_OTHERS = 0o077


def write_key_pair(path: Path, comment: str) -> Path:
    """Writes a new private key to `path` and its public key beside it, and returns the public key's file.

    Raises:
        BadInput: there is a key already; it is never overwritten.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {comment}\n".encode()
    public_path = path.with_name(f"{path.name}.pub")
    _create_file(path, private, 0o600)
    _create_file(public_path, public, 0o644)
    return public_path


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Returns the private key in a file.

    Raises:
        BadInput: the file is missing or readable by others, or holds no EC P-384 key without a passphrase.
    """
    try:
        mode = path.stat().st_mode
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"coordinator.key: expected this site's private key in {path}{instead(error)}; "
            "`headwater site init DIR --new-key` makes one"
        ) from error
    if mode & _OTHERS:
        raise BadInput(f"coordinator.key: {path} can be read by others than its owner; chmod 600 it")
    try:
        key = load_ssh_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(
            f"coordinator.key: expected an OpenSSH private key without a passphrase in {path}, got something else"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadInput(f"coordinator.key: expected an EC P-384 key in {path}, got another kind")
    return key


def compute_fingerprint(public: Path) -> str:
    """Returns a public key's digest as `ssh-keygen -l` prints it, by which two people compare the key by telephone."""
    blob = base64.b64decode(public.read_text(encoding="ascii").split()[1])
    return f"SHA256:{base64.b64encode(sha256(blob).digest()).decode().rstrip('=')}"


def _create_file(path: Path, content: bytes, mode: int) -> None:
    try:
        # Exclusive, and with its mode from the first moment: no window in which others could read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise BadInput(f"{path}: it exists already, and a key is never overwritten") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
