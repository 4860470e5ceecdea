"""Runs of a federation: prepared as a folder, submitted to the daemon, found again.

Invariant: one run at a time, because sites spend a budget on each.
"""

from __future__ import annotations

from pathlib import Path

from common.events import RunEnded, RunStarted, read_run_journal, select_events
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load, write_yaml
from server.deployment.app_bundle import RUN_FOLDER, make_bundle
from server.deployment.federation import Federation
from server.deployment.preparation import Prepared, prepare_again, write_prepared
from server.reports.results import new_run_folder
from server.superlink.control import Control


def create_run_folder(federation: Federation, run: RunConfig, prepared: Prepared) -> Path:
    """Creates a run's folder with all that it needs.

    Args:
        federation: the run's federation.
        run: the run, with absolute paths.
        prepared: what was prepared for it.
    """
    folder = new_run_folder(federation.runs, run.name)
    write_prepared(folder, prepared)
    write_yaml(folder / "config.yaml", run)
    return folder


def submit_run(control: Control, folder: Path) -> int:
    """Submits a run's folder to the SuperLink and returns Flower's number of the run.

    Raises:
        BadInput: another run is under way.
        RunFailed: the SuperLink does not take it.
    """
    busy = control.find_current_run()
    if busy is not None:
        raise BadInput(
            f"run {Path(busy.folder).name} is under way; wait for it, or end it with `headwater coordinator stop --run`"
        )
    return control.submit(make_bundle(), {RUN_FOLDER: str(folder)})


def find_interrupted_run(federation: Federation, run_id: str | None) -> Path:
    """Returns the folder of a run that did not end: the named one, or the newest of all.

    An older one is continued only by its name: sites would spend on what nobody asked for again.

    Raises:
        BadInput: there is none, or it has ended.
    """
    folders = sorted((path.parent for path in federation.runs.glob("*/config.yaml")), key=_created_at, reverse=True)
    if run_id is not None:
        folders = [folder for folder in folders if folder.name == run_id]
        if not folders:
            raise BadInput(f"expected the id of a run under {federation.runs}, got {run_id!r}")
    for folder in folders[:1]:
        ended = select_events(read_run_journal(folder / "journal.jsonl"), RunEnded)
        # A complete run whose final heads did not reach every site is continued by its name: they are sent again.
        if not ended or (run_id is not None and ended[-1].missing):
            return folder
    newest = folders[0].name if folders else "none"
    raise BadInput(
        f"expected a run that was interrupted, got {newest}, which is complete; an older one has to be named"
    )


def prepare_interrupted_run(federation: Federation, folder: Path) -> None:
    """Prepares a run that is to be continued, where an older release began it or what it stands on is damaged.

    Raises:
        BadInput: it cannot be continued.
    """
    starts = select_events(read_run_journal(folder / "journal.jsonl"), RunStarted)
    digests = {name: facts.digest for name, facts in starts[-1].backbones.items()} if starts else {}
    prepare_again(federation, folder, load(RunConfig, folder / "config.yaml"), digests)


def _created_at(folder: Path) -> float:
    return (folder / "config.yaml").stat().st_mtime
