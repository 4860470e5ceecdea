"""`install-service`: writes a site's systemd unit."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import Annotated

import typer

from client.commands.parts.options import SiteFile
from client.config import SiteConfig
from client.ledger.place import find_default_ledger_dir, locate_ledgers
from common.process.console import reported_errors
from common.process.service import Service
from common.process.service import install_service as write_service
from common.yaml import load


def install_service(
    site: SiteFile,
    user: Annotated[bool, typer.Option("--user", help="For this user's own systemd instead of the system's")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; by default where systemd looks for it")] = None,
) -> None:
    """Writes a systemd unit that starts the site with the machine; enables and starts nothing.

    A unit of the system runs as the owner of the site file and can write to state, cache and ledgers only. Run this as
    root, or with `--user` for a unit of your own.

    Example: headwater site install-service hospital-a/site.yaml --user
    """
    with reported_errors():
        config, owner = load(SiteConfig, site), site.stat().st_uid
        # The unit must find the ledgers that the staff's commands use: systemd does not read a shell's variables.
        data = _find_data_home(owner)
        os.environ["XDG_DATA_HOME"] = str(data)
        folders = (config.state_dir, config.cache_dir, locate_ledgers(config))
        service = Service(
            side="site",
            name=config.name,
            command=(sys.executable, "-m", "client", "start", str(site.resolve())),
            owner=owner,
            writable=tuple(dict.fromkeys(folder for folder in folders if folder is not None)),
            restart_s=60,
            stop_s=90,  # More than the 60 s that `start` gives an answer under way.
            environment={} if config.ledger_dir else {"XDG_DATA_HOME": str(data)},
        )
        for line in write_service(service, user=user, out=out):
            typer.echo(line)


def _find_data_home(owner: int) -> Path:
    """Returns the folder of a user's data, in which the ledgers lie that no site file places elsewhere."""
    if owner == os.getuid():
        return find_default_ledger_dir().parents[1]
    return Path(pwd.getpwuid(owner).pw_dir) / ".local" / "share"
