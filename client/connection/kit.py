"""A coordinator's startup kit: its address, the authority to trust, the offered runs. No secret, no code.

It comes by mail or download and is not trusted: its size is bounded, only known names are read, nothing is unpacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from common.errors import instead
from common.files import read_zip
from common.offers import parse_offer
from common.plugins import Frozen
from common.process.address import AddressText
from common.run import Name, RunConfig
from common.types import BadInput
from common.yaml import parse_text

MAX_KIT_BYTES = 4 << 20
_MAX_FILES = 256
_OFFER = re.compile(r"offers/([a-z0-9][a-z0-9_-]{0,63})\.json")


class KitSettings(Frozen):
    """The settings in kit.yaml.

    Attributes:
        federation: name of the federation.
        site: name under which the coordinator admits this site.
        address: host and port of the coordinator.
    """

    federation: Name
    site: Name
    address: AddressText


@dataclass(frozen=True)
class Kit:
    """The content of a kit.

    Attributes:
        settings: settings in its kit.yaml.
        ca: certificate of the federation's authority, PEM.
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
        x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise BadInput(f"{path}: expected a PEM certificate in ca.crt, got something else") from error
