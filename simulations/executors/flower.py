"""The `flower` executor: the same code of coordinator and sites on Flower's simulation engine, as Ray actors."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

from flwr.app import ConfigRecordValues, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.types import RunFailed
from simulations.config import Executor

_Result = TypeVar("_Result")


def run_on_flower(app: ClientApp, num_sites: int, executor: Executor, coordinate: Callable[[Grid], _Result]) -> _Result:
    """Runs a coordinator against sites that are Ray actors, and returns the coordinator's result.

    Args:
        app: the sites' ClientApp.
        num_sites: number of sites.
        executor: resources of each site, and the address of a Ray cluster.
        coordinate: the coordinator; it receives the grid that reaches the sites.

    Raises:
        RunFailed: Flower's simulation engine ended without a result.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from flwr.simulation import run_simulation  # Imports Ray: only this executor pays for it.

    results: list[_Result] = []
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        try:
            results.append(coordinate(grid))
        except BaseException as error:
            failures.append(error)  # The engine would replace it by one of its own.
            raise

    backend: dict[str, dict[str, ConfigRecordValues]] = {
        "client_resources": {"num_cpus": executor.cpus_per_site, "num_gpus": executor.gpus_per_site},
        "init_args": {"address": executor.ray_address} if executor.ray_address else {"include_dashboard": False},
    }
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Flower's own deprecation notices.
            run_simulation(
                server_app=server_app,
                client_app=app,
                num_supernodes=num_sites,
                backend_config=backend,
            )
    except RuntimeError as error:
        if not failures:
            raise RunFailed(f"the simulation engine ended: {type(error).__name__}") from error
    if failures:
        raise failures[0]
    if not results:
        raise RunFailed("the simulation engine ended without a result")
    return results[0]
