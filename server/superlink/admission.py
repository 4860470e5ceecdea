"""Who passes the public gate: the registry as its file says now, and who was refused, in the journal."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import final

from common.events import FileJournal
from server.deployment.admitted_sites import admitted
from server.deployment.federation import Federation
from server.superlink.request_filter import App, Limits, PublicGate, Refused

_QUIET_S = 60.0
_MAX_MUTED = 10_000
_MAX_IN_FLIGHT = 1 << 30


def public_gate(engine: App, federation: Federation) -> PublicGate:
    """The gate to the network for a federation's admitted sites."""
    config = federation.config
    upload = config.max_upload_mib << 20
    limits = Limits(upload, max(_MAX_IN_FLIGHT, upload), config.idle_timeout_s, 10 * config.idle_timeout_s)
    refusals = Refusals(FileJournal(federation.state / "link.jsonl"))
    return PublicGate(engine, site_of=AdmittedKeys(federation).site_of, limits=limits, on_refusal=refusals)


@final
class AdmittedKeys:
    """The registry's admitted keys, as its file says now: a removed key is refused from the next request on."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._stamp = -1
        self._sites: dict[bytes, str] = {}

    def site_of(self, key: bytes) -> str | None:
        """Name of the site with a public key (PEM)."""
        stamp = (self._federation.folder / "sites.json").stat().st_mtime_ns
        if stamp != self._stamp:
            self._sites = {entry.pem(): site for site, entry in admitted(self._federation).items()}
            self._stamp = stamp
        return self._sites.get(key)


@final
class Refusals:
    """Refusals in the journal: who and what, each kind once a minute, so that a flood does not fill the disk."""

    def __init__(self, journal: FileJournal) -> None:
        self._journal = journal
        self._muted: dict[tuple[str, str], float] = {}

    def __call__(self, refused: Refused) -> None:
        """Write one down."""
        now = time.monotonic()
        key = (refused.site or refused.peer, refused.reason)
        if self._muted.get(key, 0.0) > now:
            return
        if len(self._muted) >= _MAX_MUTED:
            self._muted.clear()
        self._muted[key] = now + _QUIET_S
        self._journal.write("refused", **asdict(refused))
