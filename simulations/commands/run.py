"""`run`: runs a simulation."""

from __future__ import annotations

from common.process.console import reported_errors, shown_progress
from common.yaml import load
from simulations.commands.parts.options import Anyway, Json, Out, Set, SimulationFile
from simulations.commands.parts.results import print_results
from simulations.config import SimulationConfig
from simulations.experiment import run as run_config


def run(config: SimulationFile, set_: Set = None, out: Out = None, anyway: Anyway = False, json_: Json = False) -> None:
    """Runs a simulation and shows what each task and site got; one that no task can profit from is refused.

    Example: headwater simulate run demo.yaml --set run.privacy.target_epsilon=3
    """
    with reported_errors():
        with shown_progress() as observe:
            summary = run_config(config, out=out, overrides=set_ or [], observe=observe, anyway=anyway)
        print_results(summary, load(SimulationConfig, config, set_ or []), json_)
