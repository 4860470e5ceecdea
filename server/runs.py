"""Runs of a federation: prepared as a folder, handed to the running link, found again.

Invariant: one run at a time, because sites spend a budget on each; and nothing is handed over that is wrong in a way
this machine can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.backbones import open_pretrained
from common.config import RunConfig, load, write_yaml
from common.heads import initial_heads
from common.journal import read
from common.plugins import Spec, resolve
from common.tasks import open_task
from common.types import BadInput
from server.aggregators import open_aggregator
from server.app_bundle import RUN_FOLDER, make_bundle
from server.control import Control, RunState
from server.federation import Federation
from server.registry import admitted
from server.results import new_run_folder


def checked_run(federation: Federation, path: Path, overrides: Sequence[str]) -> RunConfig:
    """A run file's run with absolute paths, where this coordinator can carry it out.

    Raises:
        BadInput: no site is admitted, or a setting is wrong or asks for more sites than are admitted.
    """
    run = load(RunConfig, path, overrides)
    sites = admitted(federation)
    if not sites:
        raise BadInput(f"{federation.folder}: no site is admitted; `python -m server admit` each with its public key")
    needed = max(run.cohort.min_sites, run.cohort.min_replies_per_task)
    if needed > len(sites):
        raise BadInput(f"cohort: expected at most the {len(sites)} admitted site(s) to be needed, got {needed}")
    backbone = open_pretrained(run.backbone, "backbone")
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in run.tasks.items()}
    initial_heads(tasks, dict.fromkeys(tasks, backbone.feature_dim), run.seed)
    open_aggregator(run.aggregation, "aggregation")
    settings = resolve("common.backbones", run.backbone, "backbone").model_dump(mode="json", by_alias=True)
    return run.model_copy(update={"backbone": Spec(**settings)})


def new_folder(federation: Federation, run: RunConfig) -> Path:
    """A run's folder with its resolved settings."""
    folder = new_run_folder(federation.runs, run.name)
    write_yaml(folder / "config.yaml", run)
    return folder


def submit(control: Control, folder: Path) -> int:
    """Hand a run's folder to the engine; the engine's number for it.

    Raises:
        BadInput: another run is under way.
        RunFailed: the engine does not take it.
    """
    busy = current(control)
    if busy is not None:
        raise BadInput(
            f"run {Path(busy.folder).name} is under way; wait for it, or end it with `python -m server stop --run`"
        )
    return control.submit(make_bundle(), {RUN_FOLDER: str(folder)})


def current(control: Control) -> RunState | None:
    """The run that is under way."""
    return next((run for run in control.runs() if not run.finished), None)


def interrupted(federation: Federation, run_id: str | None) -> Path:
    """Folder of a run that did not come to its end: the named one, or the newest.

    Raises:
        BadInput: there is none, or the named one has ended.
    """
    folders = sorted((path.parent for path in federation.runs.glob("*/config.yaml")), key=_started, reverse=True)
    if run_id is not None:
        folders = [folder for folder in folders if folder.name == run_id]
        if not folders:
            raise BadInput(f"expected the id of a run under {federation.runs}, got {run_id!r}")
    for folder in folders:
        if not any(fact["event"] == "run_ended" for fact in read(folder / "journal.jsonl")):
            return folder
    raise BadInput(f"{run_id or federation.runs}: expected a run that was interrupted, got none that is not complete")


def _started(folder: Path) -> float:
    return (folder / "config.yaml").stat().st_mtime
