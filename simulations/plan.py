"""The plan of a simulation: what its run would cost each of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from client.protocol.plan import RunPlan, plan_run
from common.model.guessing import Totals, explain_hopeless
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput
from simulations.check import check_simulation
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.executors.gathered import sum_totals
from simulations.partition import build_sites


def refuse_hopeless(totals: Mapping[str, Totals], run: RunConfig) -> None:
    """Raises BadInput where no task of a run can be better than guessing with these public numbers."""
    tasks = {name: open_task(spec, f"{RUN_PREFIX}tasks.{name}") for name, spec in run.tasks.items()}
    reason = explain_hopeless(run, tasks, totals)
    if reason is not None:
        raise BadInput(f"{reason}; `--anyway` runs it")


def plan_simulation(config: SimulationConfig) -> list[RunPlan]:
    """Returns a plan for each site; no features are computed and nothing is spent.

    Raises:
        BadInput: the simulation is not valid.
    """
    check_simulation(config)
    with TemporaryDirectory() as folder:
        built = build_sites(config, Path(folder) / "sites", non_private=config.run.requested_privacy is None)
        sites = config.list_training_sites(built)
        totals = sum_totals(sites, config.run)
        return [plan_run(site, config.run, len(sites), totals) for site in sites]
