"""`identity`: makes this site's identity key for secure sums, and prints its public part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.secure_sum.identity import format_public_key, read_identity, write_identity


def identity(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file of the private key; made where there is none")],
) -> None:
    """Makes a site's identity key for secure sums where there is none, and prints the public key.

    The other sites write the public key into the roster of their site files. Give it to their staff yourself: a
    coordinator that passes it on could put another one in its place.

    Example: headwater site identity keys/identity
    """
    with reported_errors():
        key = read_identity(path) if path.exists() else write_identity(path)
        typer.echo(f"private key {path}: stays here; `secure_sum.identity` of the site file")
        typer.echo(f"public key  {format_public_key(key)}: into `secure_sum.roster` of every site's file")
