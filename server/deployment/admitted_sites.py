"""Who may join: the sites' public keys, by name. A removed key stays on the list, as removed, for ever.

Invariant: at most one key of a name is admitted at a time, and no key is admitted twice, whatever commands run beside
each other.
"""

from __future__ import annotations

import base64
import datetime
import fcntl
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
from common.files import write_atomic
from common.run import Name
from common.types import BadInput
from server.deployment.federation import Federation

_MAX_KEY_BYTES = 16_384
_NAME = TypeAdapter(Name)


@dataclass(frozen=True)
class Entry:
    """One site's key.

    Attributes:
        site: the site's name.
        key: its public key, one line of OpenSSH text without a comment.
        admitted: when, UTC.
        removed: when, UTC; None while it is admitted.
    """

    site: str
    key: str
    admitted: str
    removed: str | None = None

    def pem(self) -> bytes:
        """The key as the engine wants it."""
        key = serialization.load_ssh_public_key(self.key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def fingerprint(self) -> str:
        """What `ssh-keygen -lf` prints of the key: for comparing by telephone."""
        digest = hashlib.sha256(base64.b64decode(self.key.split()[1])).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def entries(federation: Federation) -> list[Entry]:
    """Every key that was ever admitted, oldest first.

    Raises:
        BadInput: the registry's file is not one.
    """
    path = federation.folder / "sites.json"
    try:
        return [Entry(**item) for item in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: expected the registry of sites{instead(error)}") from error


def admitted(federation: Federation) -> dict[str, Entry]:
    """The sites that may join now, by name."""
    return {entry.site: entry for entry in entries(federation) if entry.removed is None}


def write_empty(federation: Federation) -> None:
    """A registry without sites."""
    _write(federation, [])


def admit(federation: Federation, site: str, key_file: Path) -> Entry:
    """Put a site's key on the list.

    Raises:
        BadInput: no valid name, not a P-384 public key, or a name or key that is there already.
    """
    check_name(site)
    key = read_public_key(key_file)
    with _changing(federation) as known:
        for entry in known:
            if entry.key == key and entry.removed is not None:
                raise BadInput(
                    f"{key_file}: this key was removed on {entry.removed[:10]} (site {entry.site}) and stays revoked; "
                    "ask the site for a new one"
                )
            if entry.key == key:
                raise BadInput(
                    f"{key_file}: this key is admitted already, for site {entry.site}; each site has its own"
                )
            if entry.site == site and entry.removed is None:
                raise BadInput(
                    f"site {site} is admitted already, with another key; `python -m server remove` "
                    "revokes that one for ever"
                )
        _check_comment(key_file, site)
        new = Entry(site, key, _now())
        _write(federation, [*known, new])
    return new


def _check_comment(key_file: Path, site: str) -> None:
    """`client init` writes a site's name behind its key: one admitted under another could only be revoked, for ever."""
    named = " ".join(key_file.read_text(encoding="utf-8", errors="replace").split()[2:])
    try:
        _NAME.validate_python(named)
    except ValidationError:
        return  # A comment of another program, or none.
    if named != site:
        raise BadInput(f"{key_file}: expected the key of {site}, got one made for {named!r}; ask the sites")


def check_name(site: str) -> None:
    """Raises BadInput where a site cannot be called so."""
    try:
        _NAME.validate_python(site)
    except ValidationError as error:
        raise BadInput(
            f"expected a site's name of lower-case letters, digits, - and _, at most 64, got {site!r}"
        ) from error


def remove(federation: Federation, site: str) -> Entry:
    """Revoke a site's key.

    Raises:
        BadInput: no such site is admitted.
    """
    with _changing(federation) as known:
        current = {entry.site: entry for entry in known if entry.removed is None}
        if site not in current:
            raise BadInput(f"expected one of the admitted sites ({', '.join(sorted(current)) or 'none'}), "
                           f"got {site!r}{nearest(site, current)}")  # fmt: skip
        gone = replace(current[site], removed=_now())
        _write(federation, [gone if entry == current[site] else entry for entry in known])
    return gone


def read_public_key(path: Path) -> str:
    """One line of OpenSSH text, without its comment.

    Raises:
        BadInput: not an EC P-384 public key in OpenSSH format; a private key is named as such.
    """
    wanted = "expected a site's EC P-384 public key in OpenSSH format (the .pub file of `python -m client init`)"
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
def locked(federation: Federation) -> Iterator[None]:
    """Nobody else changes the registry or makes it true in the engine."""
    with (federation.state / "registry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _changing(federation: Federation) -> Iterator[list[Entry]]:
    with locked(federation):
        yield entries(federation)


def _write(federation: Federation, known: list[Entry]) -> None:
    text = json.dumps([asdict(entry) for entry in known], indent=2)
    write_atomic(federation.folder / "sites.json", text.encode())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
