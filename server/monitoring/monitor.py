"""A coordinator's metrics and status page, made from its files and its SuperLink; nothing is changed by looking."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import final

from common.bundle import compute_code_digest
from common.events import DaemonEvent, JournalView, RunEvent
from common.files import stamp_file
from common.process.pages import Page, Pages
from common.types import HeadwaterError
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.certificates import read_validity
from server.deployment.federation import Federation
from server.monitoring.counts import RunCounts
from server.monitoring.metrics import write_coordinator_metrics
from server.monitoring.page import write_coordinator_page
from server.monitoring.state import CoordinatorState, Rejections
from server.superlink.control import Control, NodeState
from server.superlink.queue import FederationRun, describe_run

_CONTROL_S = 3.0


@final
class Monitor:
    """Looks at a coordinator from within its daemon, one look at a time."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._lock = threading.Lock()
        self._runs: dict[str, JournalView[RunCounts]] = {}
        self._listed: dict[str, tuple[tuple[tuple[int, ...], ...], FederationRun]] = {}
        self._rejections = JournalView(federation.state / "link.jsonl", DaemonEvent, Rejections, Rejections.add)
        self._code_digest = compute_code_digest()

    def list_pages(self) -> Pages:
        """Returns what the health port serves."""
        return {"/": self._write_page, "/metrics": self._write_metrics}

    def look(self) -> CoordinatorState:
        """Returns the state now."""
        federation = self._federation
        nodes: dict[str, NodeState | None] = dict.fromkeys(sorted(load_admitted_sites(federation)))
        current, answering = None, True
        try:
            with Control(federation, timeout_s=_CONTROL_S) as control:
                known = {node.key: node for node in control.list_nodes()}
                for site, entry in load_admitted_sites(federation).items():
                    nodes[site] = known.get(entry.pem())
                busy = control.find_current_run()
                current = Path(busy.folder).name if busy else None
        except HeadwaterError:
            answering = False
        listed = self._list_runs(current)
        return CoordinatorState(
            time=time.time(),
            federation=federation,
            version=version("headwater"),
            code_digest=self._code_digest,
            certificate=read_validity(federation.tls / "server.crt"),
            free_bytes=shutil.disk_usage(federation.folder).free,
            nodes=nodes,
            answering=answering,
            current=current,
            runs=self._read_runs(listed),
            listed=listed,
            ever=[view.read() for view in self._runs.values()],
            rejections=self._rejections.read(),
        )

    def _list_runs(self, current: str | None) -> dict[str, FederationRun]:
        """Returns where each run stands, in the order of the queue; a journal is read again only when it has changed.

        That of the run under way grows with each round and is followed as numbers alone (`_read_runs`).
        """
        found = {}
        for config in self._federation.runs.glob("*/config.yaml"):
            folder = config.parent
            files = [folder / "order.json", *([folder / "journal.jsonl"] if folder.name != current else [])]
            stamps = tuple(stamp_file(path) if path.exists() else () for path in files)
            known = self._listed.get(folder.name)
            found[folder.name] = known if known and known[0] == stamps else (stamps, describe_run(folder))
        self._listed = dict(sorted(found.items(), key=lambda item: item[1][1].order.submitted_at))
        return {name: run for name, (_, run) in self._listed.items()}

    def _read_runs(self, names: Iterable[str]) -> dict[str, RunCounts]:
        """Returns the numbers of each run."""
        for name in names:
            if name not in self._runs:
                journal = self._federation.runs / name / "journal.jsonl"
                self._runs[name] = JournalView(journal, RunEvent, RunCounts, RunCounts.add)
        return {name: self._runs[name].read() for name in names}

    def _write_page(self) -> Page:
        with self._lock:
            return write_coordinator_page(self.look())

    def _write_metrics(self) -> Page:
        with self._lock:
            return write_coordinator_metrics(self.look())
