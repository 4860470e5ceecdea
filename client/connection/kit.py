"""A coordinator's startup kit: its address, the authority to trust, the offered runs. No secret, no code.

It comes by mail or download and is not trusted: its size is bounded, only known names are read, nothing is unpacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from pydantic import Field

from common.errors import instead
from common.files import read_zip
from common.offers import parse_offer
from common.plugins import Frozen
from common.process.address import AddressText
from common.process.authority import is_vouched
from common.run import Name, RunConfig
from common.types import BadInput
from common.yaml import parse_text

MAX_KIT_BYTES = 4 << 20
_MAX_FILES = 256
_MAX_AUTHORITIES = 4
_OFFER = re.compile(r"offers/([a-z0-9][a-z0-9_-]{0,63})\.json")


class KitSettings(Frozen):
    """The settings in kit.yaml.

    Attributes:
        federation: name of the federation.
        site: name under which the coordinator admits this site.
        address: host and port of the coordinator.
        authority_vouch: signature with which an older authority of the federation vouches for a newer one.
    """

    federation: Name
    site: Name
    address: AddressText
    authority_vouch: Annotated[str, Field(max_length=400)] | None = None


@dataclass(frozen=True)
class Kit:
    """The content of a kit.

    Attributes:
        settings: settings in its kit.yaml.
        ca: certificates of the federation's authorities, PEM; two while one replaces the other.
        offers: run name -> the run's offer, JSON bytes.
    """

    settings: KitSettings
    ca: bytes
    offers: Mapping[str, bytes]

    def runs(self) -> list[RunConfig]:
        """Returns the offered runs."""
        return [parse_offered_run(content, name) for name, content in self.offers.items()]


def parse_offered_run(content: bytes, where: str) -> RunConfig:
    """Returns the run in an offer's JSON text.

    Raises:
        BadInput: it is no offer; the message begins with `where`.
    """
    offer = parse_offer(content, where)
    try:
        return offer.run_config()
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def read_kit(path: Path) -> Kit:
    """Returns the content of a kit's zip archive.

    Raises:
        BadInput: it is unreadable or too large, holds an unknown or repeated name, or a file in it is invalid.
    """
    files = _read_files(path)
    for name in ("kit.yaml", "ca.crt"):
        if name not in files:
            raise BadInput(f"{path}: expected {name} in the kit, got none")
    _check_ca(path, files["ca.crt"])
    offers = {match[1]: files[name] for name in files if (match := _OFFER.fullmatch(name))}
    for run, content in offers.items():
        parse_offered_run(content, f"{path}: offers/{run}.json")
    return Kit(parse_text(KitSettings, files["kit.yaml"], f"{path}: kit.yaml"), files["ca.crt"], offers)


def _read_files(path: Path) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KIT_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: expected a kit (a zip){instead(error)}") from error
    return read_zip(
        content,
        str(path),
        is_allowed=lambda name: name in ("kit.yaml", "ca.crt") or _OFFER.fullmatch(name) is not None,
        allowed="kit.yaml, ca.crt and offers/RUN.json in the kit",
        max_bytes=MAX_KIT_BYTES,
        max_files=_MAX_FILES,
    )


def _check_ca(path: Path, content: bytes) -> None:
    try:
        count = len(x509.load_pem_x509_certificates(content))
    except (ValueError, x509.InvalidVersion) as error:  # The latter is no ValueError.
        raise BadInput(f"{path}: expected a PEM certificate in ca.crt, got something else") from error
    if count > _MAX_AUTHORITIES:
        raise BadInput(f"{path}: expected at most {_MAX_AUTHORITIES} certificates in ca.crt, got {count}")


def check_authorities(ca: Path, kit: Kit) -> None:
    """Checks that a site that trusts the authorities in a file may trust those of a kit.

    A kit is not trusted and certificates are no secret: each authority of the kit has to be trusted already, or one
    that is trusted vouches for it.

    Raises:
        BadInput: that is not so for one of them, or the file holds no certificate.
    """
    if not ca.exists():
        return
    try:
        trusted = x509.load_pem_x509_certificates(ca.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise BadInput(f"{ca}: expected a PEM certificate{instead(error)}; remove it to take the kit's") from error
    signature = kit.settings.authority_vouch or ""
    for each in x509.load_pem_x509_certificates(kit.ca):
        if each not in trusted and not any(is_vouched(one, each, signature) for one in trusted):
            raise BadInput(
                f"{ca}: the kit names another authority than the one this site trusts, and that one does not vouch for "
                "it; ask the coordinator's staff in person, and remove the file if that is right"
            )
