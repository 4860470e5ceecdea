"""`init`: makes a new site's folder with keys and a site file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.connection.folder import SITE_FILE, add_coordinator, make_folder, renew_key, take_kit
from client.connection.keys import compute_fingerprint
from client.connection.kit import read_kit
from client.ledger.place import find_default_ledger_dir, list_populations
from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import FILL_IN, find_marks

_MAX_SHOWN = 5


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the site")],
    kit: Annotated[Path | None, typer.Option(help="The coordinator's startup kit")] = None,
    name: Annotated[str | None, typer.Option(help="The site's name, where no kit says it")] = None,
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", help="With --kit: add a further coordinator under this name")
    ] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="A new key for a site that lost its own")] = False,
) -> None:
    """Makes a new site's folder: keys, and a site file in which every setting is explained.

    The coordinator's staff need the public key to make a kit. Run the verb again with --kit when they have sent one.

    Example: headwater site init hospital-a --name hospital-a
    """
    with reported_errors():
        if coordinator is not None:
            if kit is None:
                raise BadInput("--coordinator: expected the coordinator's kit beside it, got none; write --kit KIT.zip")
            received = read_kit(kit)
            add_coordinator(folder, received, coordinator)
            public = folder / "keys" / f"{received.settings.site}.pub"
        elif new_key:
            public = renew_key(folder)
        elif kit is not None and (folder / SITE_FILE).exists():
            received = read_kit(kit)
            take_kit(folder, received)
            public = folder / "keys" / f"{received.settings.site}.pub"
        else:
            public = make_folder(folder, None if kit is None else read_kit(kit), name)
        site_file = folder / SITE_FILE
        lines = find_marks(site_file.read_text(encoding="utf-8"))
        where = f"replace {FILL_IN} in lines {', '.join(map(str, lines))}" if lines else "complete"
        typer.echo(f"site file   {site_file}: {where}")
        typer.echo(f"private key {public.with_suffix('')}: stays here")
        typer.echo(f"public key  {public}: send it to the coordinator's staff")
        typer.echo(f"fingerprint {compute_fingerprint(public)}: compare it with theirs by telephone")
        if kit is None and not new_key:
            typer.echo(f"kit         when it has come: headwater site init {folder} --kit KIT.zip")
        others = list_populations(find_default_ledger_dir())
        if others and lines and not new_key:
            shown = ", ".join(others[:_MAX_SHOWN]) + (", ..." if len(others) > _MAX_SHOWN else "")
            typer.echo(f"registry    this machine has ledgers of {shown}: for the same patients name it as `registry`")
        typer.echo(f"then        headwater site check {site_file}")
