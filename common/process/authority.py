"""The signature with which one authority of a federation vouches for its successor, made and checked in one place.

A kit comes by mail and is not trusted, and an authority's certificate is no secret. So a site that trusts one authority
takes a further one only where the first has signed for it.
"""

from __future__ import annotations

import base64
import binascii

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

_PURPOSE = b"headwater: sites that trust this authority may trust the following one\n"
_ALGORITHM = ec.ECDSA(hashes.SHA384())


def vouch(key: ec.EllipticCurvePrivateKey, successor: x509.Certificate) -> bytes:
    """Returns an authority's signature of its successor's certificate."""
    return key.sign(_PURPOSE + successor.public_bytes(Encoding.DER), _ALGORITHM)


def is_vouched(authority: x509.Certificate, successor: x509.Certificate, signature: str) -> bool:
    """Returns whether an authority vouches for a successor.

    Args:
        authority: an authority that is trusted.
        successor: the authority that may become trusted.
        signature: base64 of the signature; it need not be one.
    """
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(
            base64.b64decode(signature, validate=True), _PURPOSE + successor.public_bytes(Encoding.DER), _ALGORITHM
        )
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True
