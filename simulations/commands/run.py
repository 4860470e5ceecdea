"""`run`: runs a simulation."""

from __future__ import annotations

from common.process.console import reported_errors
from common.yaml import load
from server.reports.trackers import open_trackers
from simulations.commands.parts.options import Anyway, Json, Out, Set, SimulationFile, TrackerDir, TrackerKind
from simulations.commands.parts.results import print_results
from simulations.commands.parts.shown import shown_run
from simulations.config import SimulationConfig
from simulations.experiment import run as run_config


def run(
    config: SimulationFile,
    set_: Set = None,
    out: Out = None,
    anyway: Anyway = False,
    tracker: TrackerKind = None,
    tracker_dir: TrackerDir = None,
    json_: Json = False,
) -> None:
    """Runs a simulation and shows what each task and site got; one that no task can profit from is refused.

    Example: headwater simulate run demo.yaml --set run.privacy.target_epsilon=3 --tracker tensorboard
    """
    with reported_errors():
        trackers = open_trackers(tracker or [])
        with shown_run(trackers, tracker_dir) as shown:
            summary = run_config(
                config, out=out, overrides=set_ or [], observe=shown.observe, watch=shown.watch, anyway=anyway
            )
        print_results(summary, load(SimulationConfig, config, set_ or []), json_)
