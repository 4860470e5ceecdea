"""The digest of the code that a site reviews, of an installation and of the app bundle that a run claims to consist of.

A site runs its own installation and never the bundle; what it compares is client/ and common/, the code that can
reach a record. Two digests are equal exactly if every file name and every byte of these two rooms are equal, so that
"the same digest" means "the code that was reviewed here". A bundle's server/ may differ: it runs at the coordinator
alone, so a change there asks no site for a new review.

A bundle is a zip that the coordinator's Flower hands to every site. It is read in memory, within bounds, and nothing of
it is unpacked or imported.

Guarantees:
- A bundle that `compute_bundle_digest` accepts holds .py files of client/, common/ and server/, pyproject.toml and
  Flower's listing, each once, and nothing else.
- Its pyproject.toml starts the coordinator's and the site's app of these rooms and no other component.
- At most MAX_BUNDLE_BYTES are inflated, whatever the zip says about itself.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from common.files import read_zip
from common.types import BadInput

REVIEWED_ROOMS = ("client", "common")
"""The rooms whose code a site runs and its digest covers."""
ROOMS = (*REVIEWED_ROOMS, "server")
"""The rooms whose code a bundle holds."""
SETTINGS = "pyproject.toml"
LISTING = ".info/CONTENT"
"""Flower's own list of a bundle's files: a text, never run, and no part of the digest."""
COMPONENTS = {"serverapp": "server.app:app", "clientapp": "client.app:app"}
MAX_BUNDLE_BYTES = 16 << 20
MAX_FILES = 4096
_CODE = re.compile(rf"({'|'.join(ROOMS)})(/[A-Za-z_][A-Za-z0-9_]*)*/[A-Za-z_][A-Za-z0-9_]*\.py")


def find_installation() -> Path:
    """Returns the folder that holds the installed rooms."""
    return Path(__file__).resolve().parents[1]


def compute_code_digest(root: Path | None = None) -> str:
    """Returns the digest of the installed code that a site reviews: the .py files of client/ and common/.

    Args:
        root: the folder that holds the rooms; by default this installation's.
    """
    base = root or find_installation()
    paths = [path for room in REVIEWED_ROOMS for path in (base / room).rglob("*.py")]
    return hash_files({path.relative_to(base).as_posix(): path.read_bytes() for path in paths})


def compute_bundle_digest(content: bytes) -> str:
    """Returns the same digest of the code in a bundle.

    Raises:
        BadInput: The bundle is too large, is no readable zip, names other files or a file twice, or starts other
            components.
    """
    files = read_zip(
        content,
        "app bundle",
        is_allowed=lambda name: name in (SETTINGS, LISTING) or _CODE.fullmatch(name) is not None,
        allowed=f"{SETTINGS} and .py files of {', '.join(ROOMS)}",
        max_bytes=MAX_BUNDLE_BYTES,
        max_files=MAX_FILES,
    )
    if SETTINGS not in files:
        raise BadInput(f"app bundle: expected {SETTINGS}, got none")
    _check_components(files[SETTINGS])
    return hash_files({name: code for name, code in files.items() if name.split("/")[0] in REVIEWED_ROOMS})


def hash_files(files: Mapping[str, bytes]) -> str:
    """Returns 64 hex digits over names and bytes, independent of their order and unambiguous about where each ends."""
    sha = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)
    return sha.hexdigest()


def _check_components(settings: bytes) -> None:
    try:
        components = tomllib.loads(settings.decode())["tool"]["flwr"]["app"]["components"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # Of which not all are tomllib's own.
        raise BadInput(
            f"app bundle: expected {SETTINGS} with the app's components, got {type(error).__name__}"
        ) from error
    if components != COMPONENTS:
        raise BadInput(f"app bundle: expected the components {COMPONENTS}, got others")
