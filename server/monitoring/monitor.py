"""A coordinator's metrics and status page, made from its files and its SuperLink; nothing is changed by looking."""

from __future__ import annotations

import shutil
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import final

from common.bundle import compute_code_digest
from common.events import DaemonEvent, JournalView, RunEvent
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

_CONTROL_S = 3.0


@final
class Monitor:
    """Looks at a coordinator from within its daemon, one look at a time."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._lock = threading.Lock()
        self._runs: dict[str, JournalView[RunCounts]] = {}
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
            runs=self._read_runs(),
            ever=[view.read() for view in self._runs.values()],
            rejections=self._rejections.read(),
        )

    def _read_runs(self) -> dict[str, RunCounts]:
        """Returns the numbers of each run, oldest first."""
        folders = [path.parent for path in self._federation.runs.glob("*/config.yaml")]
        for folder in folders:
            if folder.name not in self._runs:
                journal = folder / "journal.jsonl"
                self._runs[folder.name] = JournalView(journal, RunEvent, RunCounts, RunCounts.add)
        folders.sort(key=lambda folder: (folder / "config.yaml").stat().st_mtime)
        return {folder.name: self._runs[folder.name].read() for folder in folders}

    def _write_page(self) -> Page:
        with self._lock:
            return write_coordinator_page(self.look())

    def _write_metrics(self) -> Page:
        with self._lock:
            return write_coordinator_metrics(self.look())
