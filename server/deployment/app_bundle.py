"""The app bundle of a run: the installed code of three rooms and a settings file, and nothing else.

It is made from an explicit list in memory, not from a folder, so that no data, key or note beside the code can slip in;
the same installation makes the same bundle. Flower runs the coordinator's part from it; sites compare its code with
their own reviewed installation and run that.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.bundle import COMPONENTS, ROOMS, find_installation
from common.flower import Fab, build_bundle
from common.types import BadInput

MAX_BYTES = 10_000_000
RUN_FOLDER = "run-folder"
"""The one setting of a deployed run: its folder, which holds everything else."""


def collect_bundle_files(root: Path | None = None) -> dict[str, bytes]:
    """Returns the names and contents of the files in a bundle.

    Args:
        root: the folder that holds the rooms; by default this installation's.
    """
    base = root or find_installation()
    code = {
        path.relative_to(base).as_posix(): path.read_bytes() for room in ROOMS for path in (base / room).rglob("*.py")
    }
    return {"pyproject.toml": _render_settings().encode(), **dict(sorted(code.items()))}


def make_bundle(root: Path | None = None) -> Fab:
    """Returns the app bundle of an installation.

    Args:
        root: the folder that holds the rooms; by default this installation's.

    Raises:
        BadInput: Flower does not accept it, or it is larger than a bundle may be.
    """
    try:
        content = build_bundle(collect_bundle_files(root))
    except ValueError as error:
        raise BadInput(f"app bundle: {error}") from error
    if len(content) > MAX_BYTES:
        raise BadInput(f"app bundle: expected at most {MAX_BYTES} bytes, got {len(content)}")
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def _render_settings() -> str:
    """Returns the bundle's pyproject.toml, made here because an installation from a wheel has none."""
    components = "\n".join(f'{name} = "{target}"' for name, target in COMPONENTS.items())
    include = ", ".join(f'"{room}/**/*.py"' for room in ROOMS)
    try:
        release = version("headwater")
    except PackageNotFoundError:
        release = "0.0.0"
    return f"""\
[project]
name = "headwater"
version = "{release}"
description = "Headwater, the coordinator's and the sites' app"
dependencies = []

[tool.flwr.app]
publisher = "headwater"
fab-include = [{include}]

[tool.flwr.app.components]
{components}

[tool.flwr.app.config]
{RUN_FOLDER} = ""
"""
