"""The sites that may join, by name and public key. A removed key stays on the list, as removed, for ever.

Invariant: at most one key of a name is admitted at a time, and no key is admitted twice, whatever commands run beside
each other.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import TypeAdapter, ValidationError

from common.errors import instead, nearest
from common.files import lock_file, write_atomic
from common.run import Name
from common.types import BadInput
from server.deployment.federation import Federation

_MAX_KEY_BYTES = 16_384
_NAME = TypeAdapter(Name)


@dataclass(frozen=True)
class AdmittedSite:
    """One site's key, which is admitted or was.

    Attributes:
        site: the site's name.
        key: its public key, one line of OpenSSH text without a comment.
        admitted: time of admission, ISO 8601, UTC.
        removed: time of removal, ISO 8601, UTC; None while the site is admitted.
    """

    site: str
    key: str
    admitted: str
    removed: str | None = None

    def pem(self) -> bytes:
        """Returns the key in PEM, as the SuperLink takes it."""
        key = serialization.load_ssh_public_key(self.key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def fingerprint(self) -> str:
        """Returns the digest that `ssh-keygen -lf` prints of the key, by which two people compare it by telephone."""
        digest = hashlib.sha256(base64.b64decode(self.key.split()[1])).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def load_all_sites(federation: Federation) -> list[AdmittedSite]:
    """Returns every site key that was ever admitted, oldest first.

    Raises:
        BadInput: the file cannot be read or is no list of sites.
    """
    path = federation.folder / "sites.json"
    try:
        return [AdmittedSite(**item) for item in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: expected the list of admitted sites{instead(error)}") from error


def load_admitted_sites(federation: Federation) -> dict[str, AdmittedSite]:
    """Returns the sites that may join now, by name."""
    return {each.site: each for each in load_all_sites(federation) if each.removed is None}


def write_no_sites(federation: Federation) -> None:
    """Writes the list of admitted sites of a new federation: none."""
    _write(federation, [])


def admit_site(federation: Federation, site: str, key_file: Path) -> AdmittedSite:
    """Admits a site by its public key.

    Args:
        federation: the federation that the site may join.
        site: the site's name.
        key_file: the site's public key in OpenSSH format.

    Returns:
        The new line of the list.

    Raises:
        BadInput: the name is not valid, the file holds no P-384 public key, or name or key are on the list already.
    """
    check_name(site)
    key = read_public_key(key_file)
    with lock_admitted_sites(federation):
        known = load_all_sites(federation)
        for each in known:
            if each.key == key and each.removed is not None:
                raise BadInput(
                    f"{key_file}: this key was removed on {each.removed[:10]} (site {each.site}) and stays revoked; "
                    "ask the site for a new one"
                )
            if each.key == key:
                raise BadInput(f"{key_file}: this key is admitted already, for site {each.site}; each site has its own")
            if each.site == site and each.removed is None:
                raise BadInput(
                    f"site {site} is admitted already, with another key; `headwater coordinator remove` "
                    "revokes that one for ever"
                )
        _check_comment(key_file, site)
        new = AdmittedSite(site, key, _utc_now())
        _write(federation, [*known, new])
    return new


def _check_comment(key_file: Path, site: str) -> None:
    """Checks that the site's name behind the key, which `client init` writes, is the one it is admitted under.

    A key that is admitted under another name could only be revoked, for ever.
    """
    named = " ".join(key_file.read_text(encoding="utf-8", errors="replace").split()[2:])
    try:
        _NAME.validate_python(named)
    except ValidationError:
        return  # A comment of another program, or none.
    if named != site:
        raise BadInput(f"{key_file}: expected the key of {site}, got one made for {named!r}; ask the sites")


def check_name(site: str) -> None:
    """Checks that a site can have this name.

    Raises:
        BadInput: it cannot.
    """
    try:
        _NAME.validate_python(site)
    except ValidationError as error:
        raise BadInput(
            f"expected a site's name of lower-case letters, digits, - and _, at most 64, got {site!r}"
        ) from error


def remove_site(federation: Federation, site: str) -> AdmittedSite:
    """Revokes a site's key, for ever, and returns its line of the list.

    Raises:
        BadInput: no such site is admitted.
    """
    with lock_admitted_sites(federation):
        known = load_all_sites(federation)
        current = {each.site: each for each in known if each.removed is None}
        if site not in current:
            raise BadInput(f"expected one of the admitted sites ({', '.join(sorted(current)) or 'none'}), "
                           f"got {site!r}{nearest(site, current)}")  # fmt: skip
        removed = replace(current[site], removed=_utc_now())
        _write(federation, [removed if each == current[site] else each for each in known])
    return removed


def read_public_key(path: Path) -> str:
    """Returns a public key file's key as one line of OpenSSH text, without its comment.

    Raises:
        BadInput: not an EC P-384 public key in OpenSSH format; a private key is named as such.
    """
    wanted = "expected a site's EC P-384 public key in OpenSSH format (the .pub file of `headwater site init`)"
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise BadInput(f"{path}: {wanted}{instead(error)}") from error
    if b"PRIVATE KEY" in raw:
        raise BadInput(
            f"{path}: {wanted}, got a PRIVATE key: it should never have left the site, which must make a new pair"
        )
    try:
        key = serialization.load_ssh_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: {wanted}, got something else") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadInput(f"{path}: {wanted}, got a key of another kind")
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text.decode("ascii").strip()


@contextmanager
def lock_admitted_sites(federation: Federation) -> Iterator[None]:
    """Keeps other processes from changing the list of admitted sites or registering it with the SuperLink."""
    with lock_file(federation.state / "registry.lock"):
        yield


def _write(federation: Federation, known: list[AdmittedSite]) -> None:
    text = json.dumps([asdict(each) for each in known], indent=2)
    write_atomic(federation.folder / "sites.json", text.encode())


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
