"""The registry made true in the engine: admitted keys are its nodes, removed ones are not.

The engine names a site by a number; `state/roster.json` holds number -> name for the run's own process, and follows
every change, so that a site that is admitted during a roll call can still be counted by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from common.errors import instead
from common.files import write_atomic
from common.types import BadInput
from server.deployment.admitted_sites import admitted, locked
from server.deployment.federation import Federation
from server.superlink.control import Control


def synchronise_nodes(control: Control, federation: Federation) -> None:
    """Register who is admitted, unregister who is not, and write down who is which number.

    Raises:
        RunFailed: the engine does not answer.
    """
    with locked(federation):
        wanted = {entry.pem(): site for site, entry in admitted(federation).items()}
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

    The name of a site that was removed can still be looked up: whoever holds its number in hand may report about it.
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
        except (OSError, ValueError, AttributeError) as error:
            raise BadInput(f"{self._path}: expected the roster of admitted sites{instead(error)}") from error
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
