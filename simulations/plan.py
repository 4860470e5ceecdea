"""The plan of a simulation: what its run would cost each of its sites."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from client.protocol.plan import RunPlan, plan_run
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.partition import build_sites


def plan_simulation(config: SimulationConfig) -> list[RunPlan]:
    """Returns a plan for each site; no features are computed and nothing is spent.

    Raises:
        BadInput: the simulation is not valid.
    """
    check_simulation(config)
    with TemporaryDirectory() as folder:
        sites = build_sites(config, Path(folder) / "sites", non_private=config.run.requested_privacy is None)
        return [plan_run(site, config.run, len(sites)) for site in sites]
