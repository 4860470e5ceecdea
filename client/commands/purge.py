"""`purge`: leaves patients or records out for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.parts.options import SiteFile
from client.config import SiteConfig
from client.protocol.purge import Purged
from client.protocol.purge import purge as purge_site
from client.protocol.site import Site
from common.errors import instead
from common.privacy.noise import os_entropy
from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import load


def purge(
    site: SiteFile,
    patient: Annotated[
        list[str] | None, typer.Option(help="A patient id or record key (repeatable; stays in the shell's history)")
    ] = None,
    list_: Annotated[Path | None, typer.Option("--list", help="A file with one id or key a line")] = None,
) -> None:
    """Excludes patients or records for ever and removes everything computed from records. No id is printed.

    Example: headwater site purge site.yaml --list withdrawn.txt
    """
    with reported_errors():
        config = load(SiteConfig, site)
        ids = [*(patient or []), *(_read_lines(list_) if list_ else [])]
        if not ids:
            raise BadInput("purge: expected at least one id in --patient or --list, got none")
        done = purge_site(Site(config, os_entropy), ids)
        _print_purged(done)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--list {path}: expected a text file{instead(error)}") from error
    return [line for line in text.splitlines() if line.strip()]


def _print_purged(done: Purged) -> None:
    typer.echo(f"excluded: {done.num_excluded} id(s), {done.num_new} of them new")
    typer.echo(f"left out: {done.num_records} record(s) of the site's present sources")
    typer.echo(f"removed: {done.num_features} cached source(s), the prepared arrays of {done.num_runs} run(s)")
    typer.echo("what was spent stays spent; a run under way has to be prepared again")
    if done.num_records == 0:
        typer.echo("warning: no record of the present sources has such an id or key", err=True)
