"""`resume`: continues an interrupted simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.yaml import load
from server.reports.trackers import open_trackers
from simulations.commands.parts.options import Json, TrackerDir, TrackerKind
from simulations.commands.parts.results import print_results
from simulations.commands.parts.shown import shown_run
from simulations.config import SimulationConfig
from simulations.experiment import resume as resume_run


def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of an interrupted run")],
    tracker: TrackerKind = None,
    tracker_dir: TrackerDir = None,
    json_: Json = False,
) -> None:
    """Continues an interrupted run from its last complete round.

    Example: headwater simulate resume runs/demo-20260102-030405-abcd
    """
    with reported_errors():
        trackers = open_trackers(tracker or [])
        with shown_run(trackers, tracker_dir) as shown:
            summary = resume_run(folder, observe=shown.observe, watch=shown.watch)
        print_results(summary, load(SimulationConfig, folder / "config.yaml"), json_)
