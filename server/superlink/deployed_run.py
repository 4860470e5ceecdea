"""Runs a deployed run from its folder, which holds all that the run needs and all that it produces.

The folder lies in the federation's: `config.yaml` (the run, resolved), `backbones.json`, `journal.jsonl`, a checkpoint,
first of the new heads, then after each round; at the end `summary.json` and `model/`. A run whose process died is the
same folder, run again: it continues after its last whole round.

Invariant: this process never loads torch, which alone would take most of its memory (`server.deployment.preparation`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import httpx
from flwr.serverapp import Grid

from common.errors import explain_os_error
from common.events import FileJournal, RunFailure, RunInterruption
from common.files import check_room, lock_file
from common.process.parent import end_with_parent
from common.run import Name, RunConfig
from common.types import Heads, HeadwaterError, RunFailed, RunInterrupted
from common.yaml import load
from server.choice.outcome import write_choice
from server.choice.votes import run_choice
from server.deployment.federation import ROOM_BYTES
from server.deployment.preparation import StoredBackbone, load_backbones
from server.reports.results import write_environment, write_results
from server.reports.summary import DEPLOYMENT
from server.rounds.checkpoint import Checkpoint, load_checkpoint
from server.rounds.loop import run_federation
from server.superlink.node_ids import NodeIds
from server.superlink.queue import is_wanted_anyway

_WAIT_S = 60.0


def run_deployed(grid: Grid, folder: Path) -> None:
    """Runs or continues the run of a folder.

    Raises:
        HeadwaterError: the run ended without a usable result; its journal says why too.
    """
    # Flower's own process goes on without its SuperLink, for ever.
    end_with_parent()
    # Waits, because the process of an earlier daemon may still be ending.
    busy = RunFailed(f"{folder}: another process still works on this run")
    try:
        with lock_file(folder / "run.lock", timeout_s=_WAIT_S, held=busy):
            _run_and_report(grid, folder)
    except OSError as error:
        raise _interrupt(error, folder) from None


def _run_and_report(grid: Grid, folder: Path) -> None:
    run = load(RunConfig, folder / "config.yaml")
    write_environment(folder / "environment.json", {"run": run.seed})
    journal = FileJournal(folder / "journal.jsonl")
    backbones: dict[Name, StoredBackbone] = {}
    resume: Checkpoint | None = None
    heads: Heads = {}
    moments: Heads = {}
    try:
        resume = load_checkpoint(folder / "checkpoint.safetensors")
        backbones = load_backbones(folder.parents[1] / "state", folder)
        state = folder.parents[1] / "state"
        node_ids, witnesses = NodeIds(state / "roster.json"), state / "witnesses.json"
        if run.choice is not None:
            run_choice(
                grid,
                run,
                backbones,
                run_id=folder.name,
                folder=folder,
                journal=journal,
                executor=DEPLOYMENT,
                node_ids=node_ids,
                witnesses=witnesses,
            )
        else:
            outcome = run_federation(
                grid,
                run,
                backbones,
                run_id=folder.name,
                folder=folder,
                journal=journal,
                executor=DEPLOYMENT,
                resume=resume,
                node_ids=node_ids,
                witnesses=witnesses,
                anyway=is_wanted_anyway(folder),
            )
            heads, moments = outcome.heads, outcome.moments
    except (HeadwaterError, OSError, httpx.HTTPError) as error:
        raised = error if isinstance(error, HeadwaterError) else _interrupt(error, folder)
        # With whole rounds behind it, a run that finds too few sites is as resumable as one that loses them.
        begun = isinstance(raised, RunFailed) and resume is not None and resume.rounds_done > 0
        ending = RunInterruption if begun or isinstance(raised, RunInterrupted) else RunFailure
        # On a full disk nothing can be written; the daemon goes on with the run once there is room.
        with suppress(OSError):
            journal.write(ending(reason=str(raised)))
            write_results(folder, run, backbones, {})
        raise raised from None
    if run.choice is not None:
        write_choice(folder, run, backbones)
    write_results(folder, run, backbones, heads, moments)


def _interrupt(error: OSError | httpx.HTTPError, folder: Path) -> RunInterrupted:
    """Returns why a run cannot go on for now: what the machine refused, and what to do."""
    if not isinstance(error, OSError):
        # The SuperLink, whose database needs room as well, says only that it failed.
        try:
            check_room(folder, ROOM_BYTES)
        except OSError as lack:
            error = lack
    if isinstance(error, OSError):
        explained = explain_os_error(error)
        return RunInterrupted(explained if error.filename else f"{folder}: {explained}")
    return RunInterrupted(
        f"the coordinator's daemon did not take or give a message ({type(error).__name__}): see state/link.log, and "
        "the free space of the disk"
    )
