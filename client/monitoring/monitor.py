"""A site's metrics and status page, made from its files in the process that is joined; nothing is opened or charged."""

from __future__ import annotations

import datetime
import shutil
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import final

from cryptography import x509

from client.config import Coordinator, SiteConfig
from client.ledger.history import History
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.monitoring.metrics import write_site_metrics
from client.monitoring.page import write_site_page
from client.monitoring.state import Presence, SiteCounts, SiteState
from client.protocol.approvals import Approvals, check_offer
from client.protocol.balance import history_of
from common.bundle import compute_code_digest
from common.events import JournalView, SiteEvent
from common.process.pages import Page, Pages
from common.types import HeadwaterError


@final
class SiteMonitor:
    """Looks at a site from within its process, one look at a time."""

    def __init__(self, config: SiteConfig, coordinator: Coordinator, site_file: Path, presence: Presence) -> None:
        """Reads nothing yet.

        Args:
            config: settings of the site file, for one coordinator.
            coordinator: that coordinator.
            site_file: path of the site file.
            presence: the connection, as the process that holds it notes it.
        """
        self._config, self._coordinator, self._site_file = config, coordinator, site_file
        self._presence = presence
        self._lock = threading.Lock()
        journal = config.coordinator_dir / "site.jsonl"
        self._counts = JournalView(journal, SiteEvent, SiteCounts, SiteCounts.add)
        self._code_digest = compute_code_digest()

    def list_pages(self) -> Pages:
        """Returns what the health port serves."""
        return {"/": self._write_page, "/metrics": self._write_metrics}

    def look(self) -> SiteState:
        """Returns the state now."""
        config = self._config
        history, problem = None, ""
        try:
            history = self._read_history()
        except (HeadwaterError, OSError) as error:
            problem = str(error) if isinstance(error, HeadwaterError) else type(error).__name__
        waiting = Approvals(config.coordinator_dir).waiting()
        return SiteState(
            time=time.time(),
            config=config,
            coordinator=self._coordinator,
            site_file=self._site_file,
            version=version("headwater"),
            code_digest=self._code_digest,
            presence=self._presence,
            counts=self._counts.read(),
            history=history,
            ledger_problem=problem,
            waiting=tuple(check_offer(offer).name for offer in waiting),
            authority_days_left=_count_days_left(self._coordinator.ca),
            free_bytes=shutil.disk_usage(config.state_dir).free,
        )

    def _read_history(self) -> History:
        ledger = Ledger.find(locate_ledgers(self._config), self._config.registry)
        # Where there is none, whether that can be is asked as before a charge.
        return history_of(self._config) if ledger is None else ledger.history()

    def _write_page(self) -> Page:
        with self._lock:
            return write_site_page(self.look())

    def _write_metrics(self) -> Page:
        with self._lock:
            return write_site_metrics(self.look())


def _count_days_left(authorities: Path) -> int | None:
    try:
        found = x509.load_pem_x509_certificates(authorities.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion):
        return None
    end = max(each.not_valid_after_utc for each in found)
    return (end - datetime.datetime.now(datetime.UTC)).days
