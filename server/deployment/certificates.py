"""The federation's own certificate authority and the server certificate that it signs.

Sites trust this authority and no other, so TLS refuses a proxy that intercepts, and another coordinator. Keys are
EC P-384. The authority's key lies in the folder, readable by its owner only. Only `renew` reads it: with a copy kept
elsewhere it may be removed.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import instead
from common.files import write_atomic
from common.process.authority import vouch
from common.types import BadInput

CA_DAYS = 3650
SERVER_DAYS = 397
"""Longer-lived server certificates are refused by some TLS libraries."""
_DAY = datetime.timedelta(days=1)
SECOND = "second"
"""Name of the files of the authority that does not sign while two of them are trusted."""
_VOUCH = "authority.vouch"


@dataclass(frozen=True)
class Validity:
    """The validity of a certificate.

    Attributes:
        until: end of its validity, UTC.
        hosts: names and addresses that it is valid for.
    """

    until: datetime.datetime
    hosts: tuple[str, ...]

    @property
    def days_left(self) -> int:
        """Whole days until the end; negative when it has expired."""
        return (self.until - datetime.datetime.now(datetime.UTC)).days


def write_authority(folder: Path, name: str, *, days: int = CA_DAYS) -> None:
    """Writes a new authority: `ca.crt` and `ca.key`.

    Args:
        folder: folder that receives both files.
        name: the federation's name.
        days: validity, in days.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} federation authority")])
    usage = _key_usage(digital_signature=False, key_cert_sign=True)
    certificate = (
        _create_builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_pair(folder / "ca", key, certificate)


def add_authority(folder: Path, name: str) -> None:
    """Writes a second authority, for which the present one vouches; nothing changes for sites before they have it.

    Args:
        folder: folder of the authority.
        name: the federation's name.

    Raises:
        BadInput: there are two already, or the present authority's key is not there.
    """
    if has_two_authorities(folder):
        raise BadInput(
            f"{folder}: two authorities are trusted already; go on with `headwater coordinator renew --ca --switch`, "
            "or end it with `--ca --retire`"
        )
    key = _read_authority_key(folder)
    draft = folder / "draft"
    draft.mkdir(mode=0o700, exist_ok=True)
    write_authority(draft, name)
    certificate = x509.load_pem_x509_certificate((draft / "ca.crt").read_bytes())
    write_atomic(folder / _VOUCH, base64.b64encode(vouch(key, certificate)))
    for suffix in (".key", ".crt"):  # The certificate last: its presence means that there are two.
        os.replace(draft / f"ca{suffix}", folder / f"{SECOND}{suffix}")
    draft.rmdir()


def switch_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Lets the second authority sign the server's certificate from now on, and keeps the first as the second.

    Args:
        folder: folder of both authorities.
        hosts: names and addresses of the certificate, the main one first.

    Raises:
        BadInput: there is no second authority, or a key is not there.
    """
    _check_two_authorities(folder)
    _read_authority_key(folder, SECOND)
    for suffix in (".key", ".crt"):
        first, second, kept = (folder / f"{stem}{suffix}" for stem in ("ca", SECOND, "former"))
        # Renamed, never copied over: whatever interrupts this, both authorities' files are still here.
        if first.exists():  # Its key may be kept elsewhere.
            os.replace(first, kept)
        os.replace(second, first)
        if kept.exists():
            os.replace(kept, second)
    write_server(folder, hosts)


def replace_authority(folder: Path, name: str) -> None:
    """Writes a new authority in the place of all that there were; no site trusts it before it has a new kit.

    Args:
        folder: folder of the authority.
        name: the federation's name.
    """
    for gone in (f"{SECOND}.crt", f"{SECOND}.key", _VOUCH):
        (folder / gone).unlink(missing_ok=True)
    write_authority(folder, name)


def retire_authority(folder: Path) -> None:
    """Leaves the authority that does not sign out of the kits; its files stay in `retired`.

    Raises:
        BadInput: there is no second authority.
    """
    _check_two_authorities(folder)
    retired = folder / "retired"
    retired.mkdir(mode=0o700, exist_ok=True)
    for suffix in (".crt", ".key"):
        if (path := folder / f"{SECOND}{suffix}").exists():
            os.replace(path, retired / f"{SECOND}{suffix}")


def has_two_authorities(folder: Path) -> bool:
    """Returns whether sites are to trust a second authority beside the one that signs."""
    return (folder / f"{SECOND}.crt").exists()


def read_trusted(folder: Path) -> bytes:
    """Returns the certificates of all authorities that sites are to trust, PEM, the signing one first."""
    second = folder / f"{SECOND}.crt"
    return (folder / "ca.crt").read_bytes() + (second.read_bytes() if second.exists() else b"")


def read_vouch(folder: Path) -> str | None:
    """Returns the older authority's signature of the newer one, base64; None where there never was a newer one."""
    path = folder / _VOUCH
    return path.read_text(encoding="ascii") if path.exists() else None


def _check_two_authorities(folder: Path) -> None:
    if not has_two_authorities(folder):
        raise BadInput(f"{folder}: expected a second authority; `headwater coordinator renew --ca` makes one")


def _read_authority_key(folder: Path, stem: str = "ca") -> ec.EllipticCurvePrivateKey:
    path = folder / f"{stem}.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: expected the authority's key{instead(error)}; put your copy of it back. Where it is lost or may "
            "be in other hands, `renew --ca --at-once` makes a new authority, which each site has to confirm in person"
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def write_server(folder: Path, hosts: Sequence[str], *, days: int = SERVER_DAYS) -> None:
    """Writes a new server certificate, signed by the folder's authority: `server.crt` and `server.key`.

    Args:
        folder: folder of the authority, which receives both files.
        hosts: names and addresses of the certificate, the main one first.
        days: validity, in days.

    Raises:
        BadInput: the authority's key or certificate is missing or unreadable.
    """
    try:
        authority = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (OSError, ValueError, TypeError, x509.InvalidVersion) as error:
        raise BadInput(
            f"{folder}: expected the authority's ca.key and ca.crt{instead(error)}; "
            "put your copy of them back, or make a new authority with `renew --ca --at-once`"
        ) from error
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _create_builder(subject, issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True, key_cert_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(authority, hashes.SHA384())
    )
    _write_pair(folder / "server", key, certificate)


def read_validity(path: Path) -> Validity:
    """Returns the validity of the certificate in a file.

    Raises:
        BadInput: the file holds no certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise BadInput(f"{path}: expected a certificate{instead(error)}") from error
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(name.value) for name in names)
    except x509.ExtensionNotFound:
        hosts = ()
    return Validity(certificate.not_valid_after_utc, hosts)


def check_server(folder: Path, hosts: Sequence[str]) -> Validity:
    """Returns the validity of the server certificate, where it can be used.

    Raises:
        BadInput: it has expired, or its authority has, or it does not name every public host.
    """
    for name, remedy in (("ca.crt", "renew --ca --at-once"), ("server.crt", "renew")):
        found = read_validity(folder / name)
        if found.until <= datetime.datetime.now(datetime.UTC):
            raise BadInput(
                f"{folder / name}: this certificate expired on {found.until:%Y-%m-%d}; `headwater coordinator {remedy}`"
            )
    missing = [host for host in hosts if str(_general_name(host).value) not in found.hosts]
    if missing:
        raise BadInput(
            f"{folder / 'server.crt'}: expected a certificate for {', '.join(missing)}, which federation.yaml names, "
            f"got one for {', '.join(found.hosts)}; `headwater coordinator renew`"
        )
    return found


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _create_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A day back: a site's clock may be behind.
        .not_valid_before(min(now - _DAY, now + days * _DAY - _DAY))
        .not_valid_after(now + days * _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, digital_signature: bool, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The key first: a reader that finds the new certificate finds its key.
    write_atomic(stem.with_suffix(".key"), private)
    write_atomic(stem.with_suffix(".crt"), certificate.public_bytes(serialization.Encoding.PEM))
