"""A federation folder: all files that a coordinator owns, readable by their owner only.

    federation.yaml   settings, for people to change          runs/    one folder for each run
    run.yaml          an example run file                     state/   the SuperLink's database, logs, locks, secrets
    sites.json        who is admitted, by public key          tls/     the federation's own authority, the server's key

Nothing in it belongs to a site: sites get what `headwater coordinator kit` packs, and that holds nothing secret.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from common.errors import instead
from common.files import private_folder, write_atomic
from common.plugins import Frozen
from common.process.address import AddressText, BindAddressText, HostText, Port
from common.run import Name
from common.types import BadInput
from common.yaml import load

ROOM_BYTES = 8 << 20
"""Free bytes without which nothing is started: the SuperLink's database does not survive a disk that is full."""


class FederationConfig(Frozen):
    """The settings in federation.yaml.

    Attributes:
        name: name of the federation.
        address: host and port under which sites reach the coordinator.
        also: further names and addresses in the server's certificate.
        bind: address that the coordinator listens on; it may differ from `address` behind a router or proxy.
        control_port: loopback port on which this machine's commands and the run's process reach the SuperLink.
        health_port: loopback port of the gRPC health service, the status page and the metrics.
        max_upload_mib: bound of one upload of an admitted site, in MiB.
        max_connections: largest number of open connections.
        idle_timeout_s: longest time that a connection may keep the coordinator waiting, in seconds.
        keep_runs_days: days after which the folder of a run that ended is removed; without it none ever is.
    """

    name: Name
    address: AddressText
    also: list[HostText] = []
    bind: BindAddressText
    control_port: Port
    health_port: Port
    max_upload_mib: Annotated[int, Field(ge=1, le=1024)] = 64
    max_connections: Annotated[int, Field(ge=2, le=10_000)] = 256
    idle_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    keep_runs_days: Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _ports_differ(self) -> FederationConfig:
        ports = [self.bind.port, self.control_port, self.health_port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"expected three different ports in bind, control_port and health_port, got {ports}")
        return self

    def hosts(self) -> list[str]:
        """Returns every public name and address, each once."""
        return list(dict.fromkeys([self.address.host, *self.also]))


@dataclass(frozen=True)
class Federation:
    """A federation folder that exists, and its settings.

    Attributes:
        folder: absolute path of the folder.
        config: settings in its federation.yaml.
    """

    folder: Path
    config: FederationConfig

    @property
    def tls(self) -> Path:
        """Folder of certificates and their keys."""
        return self.folder / "tls"

    @property
    def runs(self) -> Path:
        """Folder that holds one folder for each run."""
        return self.folder / "runs"

    @property
    def state(self) -> Path:
        """Folder of the SuperLink's database, logs, locks and secrets."""
        return self.folder / "state"

    @property
    def log(self) -> Path:
        """Output of the daemon."""
        return self.state / "link.log"

    def read_control_secret(self) -> str:
        """Returns the secret that a control request on the loopback listener must carry.

        Raises:
            BadInput: its file cannot be read.
        """
        return _read_secret(self.state / "control.key")

    @property
    def executor_secret_file(self) -> Path:
        """File with the secret of the process that starts a run's code."""
        return self.state / "executor.key"


def open_federation(folder: Path) -> Federation:
    """Returns the federation in a folder.

    Raises:
        BadInput: there is none, its settings are wrong, or the folder cannot be written.
    """
    path = folder / "federation.yaml"
    if not path.is_file():
        raise BadInput(f"{folder}: expected a federation folder, which `headwater coordinator init` makes, got none")
    federation = Federation(folder.resolve(), load(FederationConfig, path))
    for place in (federation.folder, federation.state, federation.runs):
        if not os.access(place, os.W_OK | os.X_OK):
            raise BadInput(f"{place}: expected a folder that this user can write, got one that is missing or read-only")
    return federation


def create_federation(folder: Path, config: FederationConfig) -> Federation:
    """Makes a federation folder without certificates or sites.

    Raises:
        BadInput: the folder is not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{folder}: expected a new or empty folder, got one with files in it; nothing was changed")
        federation = Federation(private_folder(folder).resolve(), config)
        for place in (federation.tls, federation.runs, federation.state):
            private_folder(place)
        for secret in ("control.key", "executor.key"):
            write_atomic(federation.state / secret, secrets.token_hex(32).encode())
        write_atomic(folder / "federation.yaml", _settings_text(config).encode())
        write_atomic(folder / "run.yaml", EXAMPLE_RUN.encode())
    except OSError as error:
        raise BadInput(f"{folder}: expected a folder that this user can write, got {type(error).__name__}") from error
    return federation


def _read_secret(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected the secret that `init` wrote{instead(error)}") from error


def _settings_text(config: FederationConfig) -> str:
    also = ", ".join(f'"{host}"' for host in config.also)
    return f"""\
# A federation's settings: the coordinator's own file. After a change, restart the coordinator (`stop`, then `start`);
# after a change of `address` or `also`, also `headwater coordinator renew` and new kits for the sites.

name: {config.name}
address: "{config.address}"    # where sites reach the coordinator: the one port that has to be open to them
also: [{also}]    # further names and addresses of the same machine, for its certificate
bind: "{config.bind}"    # where the coordinator listens; it may differ from `address` behind a router or proxy
control_port: {config.control_port}    # on loopback only: this machine's commands and the run's own process
health_port: {config.health_port}    # on loopback only: gRPC health, status page, metrics

max_upload_mib: {config.max_upload_mib}    # bound of one upload of an admitted site
max_connections: {config.max_connections}    # how many connections are open at once
idle_timeout_s: {config.idle_timeout_s:g}    # how long a connection may keep the coordinator waiting
# keep_runs_days: 365    # runs that ended so long ago are removed with their heads; without this line none ever is
"""


EXAMPLE_RUN = """\
# A run file: what the coordinator asks of every site. `headwater coordinator start DIR RUN.yaml` runs it.

name: chest
seed: 1
backbone:
  kind: torchvision
  model: mobilenet_v2
  weights: ./mobilenet_v2.safetensors     # a file beside this one, or a torchvision name such as IMAGENET1K_V2
  preprocess: {resize: 256, crop: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
  projection: {dim: 128, shift: batch_norm, normalize: true}
tasks:
  finding: {kind: classification, labels: [normal, pneumonia]}
solver: {kind: auto}    # chooses rounds, clip norm, steps and aggregation from public numbers
privacy: {unit: patient, delta: 1.0e-5, target_epsilon: 3.0}   # or noise_multiplier; the other follows
cohort:
  min_sites: 2                # fewer than these ready at the deadline: the run ends, and nothing was spent
  min_replies_per_task: 2     # a task is updated by at least as many sites
  join_timeout_s: 600         # how long the coordinator waits for sites to join
  timeout_s: 600              # how long a round waits for a site's reply
"""
