"""`digest`: prints the digest of the installed code."""

from __future__ import annotations

import typer

from common.bundle import compute_code_digest


def digest() -> None:
    """Prints the digest of the code installed here; runs of any other code are declined.

    Example: headwater site digest
    """
    typer.echo(compute_code_digest())
