"""`start`: starts a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.types import HeadwaterError
from server.commands.parts.daemon import follow_run, start_daemon
from server.commands.parts.options import Folder, Set
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.deployment.run_checks import check_run
from server.superlink.control import Control
from server.superlink.queue import create_run_folder, submit_run


def start(
    folder: Folder,
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's file")],
    set_: Set = None,
) -> None:
    """Starts a run, and the coordinator where it does not run yet; shows progress and the result.

    Exit code 0: every task reached its quorum; 1: the run failed; 2: bad input. Ctrl-C ends
    the display and the run continues.

    Example: headwater coordinator start fed fed/run.yaml --set rounds=3
    """
    with reported_errors():
        federation = open_federation(folder)
        checked, prepared = check_run(federation, run, set_ or [])
        start_daemon(federation)
        with Control(federation) as control:
            path = create_run_folder(federation, checked, prepared)
            submitted = path, _submit(control, path)
            write_command(federation, "start", f"run {path.name}")
            follow_run(federation, control, submitted, skip=0)


def _submit(control: Control, path: Path) -> int:
    """Returns Flower's id of a new run."""
    try:
        return submit_run(control, path)
    except HeadwaterError:
        shutil.rmtree(path)  # Nothing ran in it.
        raise
