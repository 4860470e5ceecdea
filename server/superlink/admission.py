"""The public filter of a federation: keys of the admitted sites as their file says now, and a log of rejections."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from typing import final

from common.events import FileJournal, RequestRejected
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.federation import Federation
from server.superlink.request_filter import App, PublicFilter, RejectedRequest, RequestLimits

_QUIET_S = 60.0
_MAX_MUTED = 10_000
_MAX_IN_FLIGHT = 1 << 30


def create_public_filter(superlink: App, federation: Federation) -> PublicFilter:
    """Returns the filter between the network and the SuperLink, for a federation's admitted sites."""
    config = federation.config
    upload = config.max_upload_mib << 20
    limits = RequestLimits(upload, max(_MAX_IN_FLIGHT, upload), config.idle_timeout_s, 10 * config.idle_timeout_s)
    log = RejectionLog(FileJournal(federation.state / "link.jsonl"))
    return PublicFilter(superlink, find_site=AdmittedKeys(federation).find_site, limits=limits, on_rejection=log)


@final
class AdmittedKeys:
    """Keys of the admitted sites, as their file says now: a removed key is rejected from the next request on."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._stamp = -1
        self._sites: dict[bytes, str] = {}

    def find_site(self, key: bytes) -> str | None:
        """Returns the name of the admitted site with a public key (PEM); None for an unknown key."""
        stamp = (self._federation.folder / "sites.json").stat().st_mtime_ns
        if stamp != self._stamp:
            self._sites = {entry.pem(): site for site, entry in load_admitted_sites(self._federation).items()}
            self._stamp = stamp
        return self._sites.get(key)


@final
class RejectionLog:
    """Rejected requests in the journal, each kind once a minute, so that a flood does not fill the disk."""

    def __init__(self, journal: FileJournal) -> None:
        self._journal = journal
        self._muted: dict[tuple[str, str], float] = {}

    def __call__(self, rejected: RejectedRequest) -> None:
        """Writes a rejected request to the journal."""
        now = time.monotonic()
        key = (rejected.site or rejected.peer, rejected.reason)
        if self._muted.get(key, 0.0) > now:
            return
        if len(self._muted) >= _MAX_MUTED:
            self._muted.clear()
        self._muted[key] = now + _QUIET_S
        with suppress(OSError):  # A full disk below the list of rejections stops nobody.
            self._journal.write(RequestRejected(**asdict(rejected)))
