"""The folder of a site's ledgers: one for all site files of a machine's user, unless a file names another.

Invariant: a population has one ledger. Earlier versions kept ledgers in `<state_dir>/ledgers`; one that lies there is
used where it lies, and nothing is opened where a second one would be.
"""

from __future__ import annotations

import os
from pathlib import Path

from client.config import SiteConfig
from client.ledger.ledger import get_marker
from common.types import BadInput


def locate_ledgers(config: SiteConfig) -> Path:
    """Returns the folder of all ledgers in which that of a site's population lies, or is to be created.

    Raises:
        BadInput: there are two ledgers of the population, or one that `ledger_dir` leaves behind.
    """
    old, registry = locate_old_ledgers(config), config.registry
    chosen = config.ledger_dir or find_default_ledger_dir()
    if chosen == old or not has_ledger(old, registry):
        return chosen
    if has_ledger(chosen, registry):
        raise BadInput(
            f"registry {registry}: expected one ledger, got two, in {old} and in {chosen}; move one elsewhere, both "
            f"{registry} and {get_marker(Path(registry))}, and if it holds charges lower budget.epsilon by their cost"
        )
    if config.ledger_dir is None:
        return old
    raise BadInput(
        f"ledger_dir: the ledger of registry {registry} lies in {old}; write `ledger_dir: {old}`, or stop all of this "
        f"machine's sites and move that folder, hidden files too, to {chosen}"
    )


def locate_old_ledgers(config: SiteConfig) -> Path:
    """Returns the folder in which earlier versions kept a site's ledgers."""
    return config.state_dir / "ledgers"


def find_default_ledger_dir() -> Path:
    """Returns the one folder of ledgers of this machine's user.

    Raises:
        BadInput: the user has no home folder.
    """
    stated = Path(os.environ.get("XDG_DATA_HOME", ""))
    try:
        # As the XDG specification has it: a relative path is ignored.
        data = stated if stated.is_absolute() else Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise BadInput("ledger_dir: expected a folder, because this machine's user has no home folder") from error
    return (data / "headwater" / "ledgers").resolve()


def list_populations(folder: Path) -> list[str]:
    """Returns the populations that have a ledger in a folder of ledgers, in alphabetical order."""
    # A population's own id holds no dot; drafts, markers and damaged ledgers have one in their names.
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and "." not in path.name)


def has_ledger(folder: Path, population: str) -> bool:
    """Returns whether a population's ledger is in a folder of ledgers, or was: its marker stays when it is lost."""
    place = folder / population
    return get_marker(place).exists() or place.exists()
