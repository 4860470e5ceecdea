"""Keeps the SuperLink's nodes equal to the admitted sites, and the names of the sites by node id.

Flower knows a site by its node id; `state/roster.json` holds node id -> name for the run's own process and follows
every change, so that a run that waits for sites knows the name of one that is admitted meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from common.errors import instead
from common.files import write_atomic
from common.types import BadInput
from server.deployment.admitted_sites import load_admitted_sites, lock_admitted_sites
from server.deployment.federation import Federation
from server.superlink.control import Control


def synchronise_nodes(control: Control, federation: Federation) -> None:
    """Registers the admitted sites with the SuperLink, unregisters all others, and writes the names by node id.

    Raises:
        RunFailed: the daemon does not answer.
    """
    with lock_admitted_sites(federation):
        wanted = {entry.pem(): site for site, entry in load_admitted_sites(federation).items()}
        names: dict[int, str] = {}
        for node in control.list_nodes():
            if node.key in wanted:
                names[node.node_id] = wanted.pop(node.key)
            else:
                control.unregister(node.node_id)
        for key, site in wanted.items():
            names[control.register(key, site)] = site
        text = json.dumps({str(node): site for node, site in names.items()}, indent=2)
        write_atomic(federation.state / "roster.json", text.encode())


@final
class NodeIds(Mapping[int, str]):
    """Node id -> site name, as the file says now.

    The name of a site that was removed can still be looked up, because a report may be about it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = -1
        self._names: dict[int, str] = {}
        self._ever: dict[int, str] = {}

    def _read(self) -> dict[int, str]:
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._names = {int(node): str(site) for node, site in json.loads(self._path.read_bytes()).items()}
                self._ever |= self._names
                self._stamp = stamp
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{self._path}: expected site names by node id{instead(error)}") from error
        return self._names

    def __getitem__(self, node_id: int) -> str:
        self._read()
        return self._ever[node_id]

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._read()

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._read()))

    def __len__(self) -> int:
        return len(self._read())
