"""Flower's SuperLink as one app object, and Flower's SuperExec as a child process, set up for one federation."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import private_folder
from common.flower import import_superlink
from common.process.lines import JsonFormatter, is_json
from common.types import BadInput
from server.deployment.federation import Federation

if TYPE_CHECKING:
    from fastapi import FastAPI

_TEXT = logging.Formatter("%(asctime)s  %(levelname)s %(message)s", "%H:%M:%S")

TASK_POLL_S = 0.25
"""Seconds between two looks for a run to start; Flower's own value is a second."""


def build_environment(federation: Federation) -> dict[str, str]:
    """Returns the environment of Flower's processes: no telemetry, no installation, files in the folder."""
    bin_folder = str(Path(sys.executable).parent)
    local = "127.0.0.1,localhost"
    return {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(private_folder(federation.state / "flwr")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        # The run's process talks to loopback; a proxy of the machine must not be asked for that.
        "NO_PROXY": local,
        "no_proxy": local,
    }


def check_database(federation: Federation) -> None:
    """Checks that the SuperLink's database, where there is one, is whole.

    Raises:
        BadInput: it is damaged.
    """
    path = federation.state / "superlink.db"
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path)) as database:
            whole = database.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.Error:
        whole = False
    if not whole:
        raise BadInput(
            f"{path}: expected the SuperLink's database, got a damaged file; remove it and its -wal and -shm files: "
            "sites are registered anew, and a run can be resumed"
        )


def configure_flower_log() -> None:
    """Has Flower's code in this process write its log in the chosen form, with times and without colours."""
    log = logging.getLogger("flwr")
    log.propagate = False  # It has a handler of its own.
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if is_json() else _TEXT)
    # The queue looks at the runs about once a second: a line for each look would bury all others.
    handler.addFilter(lambda record: not record.getMessage().startswith("ControlServicer.List"))
    log.handlers = [handler]


def create_superlink(federation: Federation) -> FastAPI:
    """Returns the SuperLink's app: it authenticates nodes, has its database in the folder and starts no run."""
    superlink = import_superlink()
    configure_flower_log()
    settings = superlink.settings(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=federation.config.control_port,
        insecure=True,  # Flower's setting of its one listener; TLS is ours.
        certificates=None,
        superexec_auth_secret=federation.executor_secret_file.read_bytes(),
        authn_plugin=superlink.no_authentication(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(federation.state / "superlink.db"),
        # `process`: the SuperLink starts nothing itself and asks whoever fetches a run for the secret.
        isolation="process",
        runtime_dependency_install=False,
    )
    return superlink.create_app(settings, superlink.lifespan)


def start_superexec(federation: Federation) -> subprocess.Popen[bytes]:
    """Starts Flower's SuperExec, which starts a run's process; it ends when this process does, however that ends."""
    command = [
        str(Path(sys.executable).parent / "flower-superexec"),
        "--insecure",
        "--runtime-api-address",
        f"127.0.0.1:{federation.config.control_port}",
        "--superexec-auth-secret-file",
        str(federation.executor_secret_file),
        "--parent-pid",
        str(os.getpid()),
    ]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)
