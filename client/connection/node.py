"""A site's long-running side: join, look for messages, have them answered, stay joined.

Guarantees:
- No message of a run is answered before that run's app bundle was fetched and found equal to this installation's own
  reviewed code; what runs is the installation, never the bundle. A different bundle is declined and journalled with
  both digests.
- Whatever happens to an answer (a crash, a broken connection, Ctrl-C), the ledger keeps what was reserved.
- A failure that no further try mends ends the process with one sentence; others are tried again, ever more slowly, up
  to a limit.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import final

from client.config import Coordinator, SiteConfig
from client.connection.diagnose import (
    create_trusting_context,
    explain_connection_failure,
    explain_tls_failure,
    is_tls_error,
    open_tls,
)
from client.connection.fleet import ConnectionLost, Delivery, Fleet, JoinRefused, Outgoing, RunOver
from client.connection.keys import read_key
from client.connection.worker import Abandoned, Worker, WorkerDied, declined
from common.bundle import compute_bundle_digest, compute_code_digest
from common.events import (
    BackboneUnusable,
    FileJournal,
    RecordsPurged,
    ReplyResent,
    ReplySent,
    RequestDeclined,
    SiteEvent,
    read_site_journal,
    select_events,
)
from common.files import lock_file, private_folder, write_atomic
from common.types import BadInput, DeclineReason

JOURNAL = "site.jsonl"
NODE_ID = "node_id"
PRIVATE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
BUSY_POLL_S, IDLE_POLL_S = 0.1, 2.0
BUSY_FOR_S = 30.0
"""After a message, how long the next one is looked for eagerly."""
WORKER_IDLE_S = 300.0
"""Then its memory is given back."""
HEARTBEAT_EVERY_S = 20.0
MAX_DELAY_S = 60.0

Show = Callable[[str], None]


def private_environment(state_dir: Path) -> dict[str, str]:
    """The environment of a site's processes: nothing reports home, nothing is installed, Flower's files stay here."""
    return {**os.environ, **PRIVATE_ENVIRONMENT, "FLWR_HOME": str(private_folder(state_dir) / "flwr")}


@dataclass
class Leaving:
    """Whether the staff wants to leave: once asked, after the answer under way; twice, at once."""

    event: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    deadline: float = float("inf")

    def ask(self, grace_s: float) -> None:
        """Leave; at once when asked again, or when the grace is over."""
        self.asked += 1
        self.deadline = min(self.deadline, time.monotonic() + grace_s)
        self.event.set()

    def now(self) -> bool:
        """Whether an answer under way is to be abandoned."""
        return self.asked > 1 or time.monotonic() > self.deadline


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """Holds the site's lock: two processes would answer the same requests.

    Raises:
        BadInput: another process holds it.
    """
    serving = BadInput(f"state_dir: another `python -m client start` already serves {state_dir}")
    with lock_file(private_folder(state_dir) / "joined.lock", timeout_s=0.0, held=serving):
        yield


def delays() -> Iterator[float]:
    """Waiting times before each further try: doubling up to a minute, each a random part of it off.

    Jitter, because all sites lose a coordinator at the same moment.
    """
    delay = 1.0
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, MAX_DELAY_S)


@final
class Node:
    """One site at its coordinator."""

    def __init__(
        self,
        config: SiteConfig,
        site_file: Path,
        *,
        show: Show,
        online: Callable[[bool], None],
        leaving: Leaving,
        patience_s: float,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            config: the site's file, read.
            site_file: the same, for the worker.
            show: is told in one line what happens.
            online: is told whether the site is joined.
            leaving: whether to leave.
            patience_s: how long a coordinator that is away is tried.

        Raises:
            BadInput: no coordinator is named, or the key or the authority's certificate cannot be used.
        """
        if config.coordinator is None:
            raise BadInput("coordinator: expected address, ca and key of the coordinator to join, got nothing")
        self._config, self._site_file = config, site_file
        self._coordinator: Coordinator = config.coordinator
        self._show, self._online, self._leaving = show, online, leaving
        self._patience_s = patience_s
        create_trusting_context(self._coordinator.ca)
        self._fleet = Fleet(self._coordinator, read_key(self._coordinator.key), stopping=leaving.event)
        self._journal = FileJournal(private_folder(config.state_dir) / JOURNAL)
        self._num_seen = len(read_site_journal(self._journal.path))
        self._own_digest = compute_code_digest()
        self._verdicts: dict[int, str | None] = {}
        self._worker: Worker | None = None
        self._node = 0

    def run(self) -> None:
        """Serve until the staff wants to leave.

        Raises:
            JoinRefused: no further try helps, or patience is at its end.
        """
        self._show(f"code digest {self._own_digest}")
        heart = threading.Thread(target=self._heartbeats, daemon=True)
        try:
            self._join()
            heart.start()
            self._serve()
        finally:
            self._online(False)
            self._leaving.event.set()
            self._close_worker()
            if self._node:
                with contextlib.suppress(ConnectionLost, JoinRefused, RunOver):
                    self._fleet.deactivate(self._node)
                    self._show("left")
            self._fleet.close()

    # --- joining ---------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Be online, trying as long as patience lasts."""
        until = time.monotonic() + self._patience_s
        for delay in delays():
            try:
                self._node = self._admitted()
                break
            except ConnectionLost as error:
                reason = self._reason(error)
                if time.monotonic() + delay > until:
                    raise JoinRefused(f"gave up after {self._patience_s:g} s: {reason}") from error
                self._show(f"not joined: {reason}; next try in {delay:.0f} s")
                if self._leaving.event.wait(delay):
                    return
        self._online(True)
        self._show(f"joined {self._coordinator.address} as {self._config.name} (node {self._node})")

    def _admitted(self) -> int:
        path = self._config.state_dir / NODE_ID
        saved = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        # A damaged file is as good as none: the coordinator knows the node by its key.
        if saved.isascii() and saved.isdigit():
            node = int(saved)
            # A site that crashed a moment ago still counts as online, and activating it again would be refused.
            with contextlib.suppress(JoinRefused):
                if self._fleet.heartbeat(node):
                    return node
        node = self._fleet.activate()
        write_atomic(path, str(node).encode())
        return node

    def _reason(self, error: ConnectionLost) -> str:
        """What a person can do about a lost connection; a failure that no try mends is raised."""
        try:
            open_tls(self._coordinator, create_trusting_context(self._coordinator.ca)).close()
        except OSError as cause:
            if is_tls_error(cause):
                raise JoinRefused(explain_tls_failure(self._coordinator)) from cause
            return explain_connection_failure(self._coordinator, cause)
        return f"{self._coordinator.address} is there but does not answer properly ({error})"

    def _heartbeats(self) -> None:
        while not self._leaving.event.wait(HEARTBEAT_EVERY_S):
            # What is wrong is found by the next pull, which can say it.
            with contextlib.suppress(ConnectionLost, JoinRefused, RunOver):
                self._fleet.heartbeat(self._node)

    # --- serving ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        last = time.monotonic() - BUSY_FOR_S
        while not self._leaving.event.is_set():
            try:
                delivery = self._fleet.pull(self._node)
            except RunOver:
                self._leaving.event.wait(BUSY_POLL_S)  # Between the hand-out and the last object.
                continue
            except ConnectionLost:
                self._online(False)
                self._show("the connection is lost")
                self._join()
                continue
            if delivery is not None:
                self._handle(delivery)
                last = time.monotonic()
                continue
            quiet_s = time.monotonic() - last
            if quiet_s > WORKER_IDLE_S:
                self._close_worker()
            self._leaving.event.wait(BUSY_POLL_S if quiet_s < BUSY_FOR_S else IDLE_POLL_S)

    def _handle(self, delivery: Delivery) -> None:
        started = time.monotonic()
        envelope = delivery.envelope
        asked = envelope.metadata.message_type
        group = envelope.metadata.group_id
        self._show(f"asked: {asked}{f', round {group}' if group.isdecimal() else ''}")
        try:
            outgoing = self._reply(delivery)
        except RunOver:
            self._show("the run is over; nothing was done")
            return
        except ConnectionLost as error:
            self._show(f"the run's bundle cannot be had ({error}); nothing was done")
            return
        seconds = time.monotonic() - started
        try:
            self._fleet.push(self._node, outgoing, seconds)
        except RunOver:
            self._show("the run is over; the reply was not wanted any more")
        except ConnectionLost as error:
            self._show(
                f"the reply could not be delivered ({error}); it is stored and costs nothing when asked for again"
            )
        self._tell(seconds)

    def _reply(self, delivery: Delivery) -> Outgoing:
        verdict = self._verdict(delivery.envelope.metadata.run_id)
        if verdict is not None:
            self._journal.write(RequestDeclined(reason=DeclineReason.VERSION.value, detail=verdict))
            return declined(delivery, DeclineReason.VERSION, self._config.name)
        if self._worker is None:
            self._worker = Worker(self._site_file, private_environment(self._config.state_dir))
        try:
            return self._worker.answer(delivery, self._leaving.now)
        except WorkerDied as died:
            detail = f"the process that answers ended with {died}; what it had reserved stays reserved"
        except Abandoned:
            detail = "abandoned by the site's staff; what was reserved stays reserved"
        self._close_worker()
        self._journal.write(RequestDeclined(reason=DeclineReason.INTERNAL.value, detail=detail))
        return declined(delivery, DeclineReason.INTERNAL, self._config.name)

    def _verdict(self, run: int) -> str | None:
        """Why a run's bundle is not run here; None where it is this installation's own code."""
        if run not in self._verdicts:
            bundle = self._fleet.bundle(self._node, run, self._fleet.bundle_hash(self._node, run))
            self._verdicts[run] = self._judged(bundle)
        return self._verdicts[run]

    def _judged(self, bundle: bytes) -> str | None:
        try:
            offered = compute_bundle_digest(bundle)
        except BadInput as error:
            digest = sha256(bundle).hexdigest()
            return (
                f"{error}; the reviewed digest is {self._own_digest}, the file's own SHA-256 {digest}; "
                "nothing of it was run"
            )
        if offered == self._own_digest:
            return None
        return f"app bundle: expected the reviewed digest {self._own_digest}, got {offered}; nothing of it was run"

    def _close_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # --- telling ---------------------------------------------------------------------------------------------------

    def _tell(self, seconds: float) -> None:
        """What the answer came to, from the site's own journal, and what a release left of the budget."""
        events = read_site_journal(self._journal.path)[self._num_seen :]
        self._num_seen += len(events)
        for event in events:
            self._show(f"{_describe_event(event)}  [{seconds:.1f} s]")
        if select_events(events, ReplySent) and self._worker is not None:
            with contextlib.suppress(WorkerDied):
                account = self._worker.balance()
                self._show(f"budget: epsilon {account['left_epsilon']:g} of {account['budget_epsilon']:g} left")


def _describe_event(event: SiteEvent) -> str:
    """Returns an event of the site's journal as one line for a person."""
    match event:
        case RequestDeclined():
            return f"declined ({event.reason}): {event.detail}"
        case ReplySent():
            return f"run {event.run_id} round {event.round}: sent {event.purpose}, {event.size_bytes} bytes"
        case ReplyResent():
            return (
                f"run {event.run_id} round {event.round}: sent the stored reply again, {event.size_bytes} bytes, at no "
                "cost"
            )
        case BackboneUnusable() | RecordsPurged():
            return event.event_name
        case _:
            return f"run {event.run_id}: {event.event_name}"
