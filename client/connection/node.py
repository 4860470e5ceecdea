"""A site's long-running process: it joins, polls for messages, has them answered and stays joined.

Guarantees:
- No message of a run is answered before that run's app bundle was fetched and its client/ and common/ found equal to
  this installation's own reviewed code; what runs is the installation, never the bundle. A different bundle is
  declined and journalled with both digests.
- All messages that wait are claimed before one is answered. Of equal requests only the last is answered, and of the
  rounds of a run only the newest: a request that a later one has overtaken is declined without its content and at no
  charge.
- An answer for which records may have been read leaves when a whole number of `reply_every_s` has passed since its
  request came, whatever became of it: a reply, a word that declines, or the end of the process that worked on it.
- Whatever happens to an answer (a crash, a broken connection, Ctrl-C), the ledger keeps what was reserved.
- A failure that no further try mends ends the process with one sentence; others are tried again, ever more slowly, up
  to a limit.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, final

from client.config import Coordinator, SiteConfig
from client.connection.fleet import (
    Claim,
    ConnectionLost,
    ConnectionRefused,
    Delivery,
    Fleet,
    InvalidAnswer,
    KeyInUse,
    Outgoing,
    RunInactive,
    UploadTooLarge,
)
from client.connection.keys import read_key
from client.connection.worker import COORDINATOR_VARIABLE, Abandoned, Worker, WorkerDied, make_declined_reply
from client.protocol.approvals import Approvals
from common import messages
from common.bundle import compute_bundle_digest, compute_code_digest
from common.errors import explain_os_error
from common.events import (
    BackboneUnusable,
    EncodingContinues,
    FileJournal,
    RecordsPurged,
    ReplyResent,
    ReplySent,
    RequestDeclined,
    RunJoined,
    SiteEvent,
    read_site_journal,
    select_events,
)
from common.files import lock_file, private_folder, write_atomic
from common.process.lines import Show
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
"""Seconds for which the short poll interval lasts after a message."""
WORKER_IDLE_S = 300.0
"""A worker that was idle for so long is ended, which frees its memory."""
HEARTBEAT_EVERY_S = 20.0
AWAY_S = 1.0
"""Time for which a site that was started again is away: the coordinator looks at who is there several times in it."""
MAX_DELAY_S = 60.0
MAX_CLAIMED = 64
"""Messages that are claimed before one of them is answered; each is without its content, and so at most 4 MiB."""
_UNTIMED = (messages.JOIN, messages.PART, messages.FINISH)
"""Requests for which no record is read. Every other waits, also of a kind that no handler takes."""


def make_private_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a site's processes: no telemetry, no installation, files in a coordinator's folder."""
    return {**os.environ, **PRIVATE_ENVIRONMENT, "FLWR_HOME": str(private_folder(folder) / "flwr")}


@dataclass
class StopRequest:
    """The staff's wish to stop: asked once, after the answer under way; asked twice, at once."""

    event: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    deadline: float = float("inf")

    def ask(self, grace_s: float) -> None:
        """Asks to stop: at once when asked again, or when the grace time is over."""
        self.asked += 1
        self.deadline = min(self.deadline, time.monotonic() + grace_s)
        self.event.set()

    def is_due(self) -> bool:
        """Returns whether an answer under way is to be abandoned."""
        return self.asked > 1 or time.monotonic() > self.deadline


@contextlib.contextmanager
def lock_site(folder: Path) -> Iterator[None]:
    """Holds the lock of a coordinator's folder: two processes would answer the same requests.

    Raises:
        BadInput: another process holds it.
    """
    serving = BadInput(f"state_dir: another `headwater site start` already serves {folder}")
    with lock_file(private_folder(folder) / "joined.lock", timeout_s=0.0, held=serving):
        yield


def generate_delays() -> Iterator[float]:
    """Yields the seconds to wait before each further try: doubling up to a minute, times a random number in [0.5, 1].

    Random, because all sites lose a coordinator at the same moment.
    """
    delay = 1.0
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, MAX_DELAY_S)


def list_repeated(claims: Sequence[Claim]) -> list[Claim]:
    """Returns the claims of which an equal request came later: a coordinator asks again while it hears nothing."""
    last = {_identify_request(claim): position for position, claim in enumerate(claims)}
    return [claim for position, claim in enumerate(claims) if last[_identify_request(claim)] != position]


def _identify_request(claim: Claim) -> tuple[Any, ...]:
    """Returns what equal requests have in common: run, kind, round, and the digests of what they consist of."""
    metadata = claim.envelope.metadata
    content = tuple(child.object_id for child in claim.tree.children)
    return metadata.run_id, metadata.message_type, metadata.group_id, content


def is_overtaken(claim: Claim, claims: Sequence[Claim]) -> bool:
    """Returns whether nobody will use the answer: a later request of the same run is among the claims."""
    place = _find_place(claim.envelope)
    return (
        place is not None
        and claim.envelope.metadata.message_type != messages.FINISH
        and any(
            (later := _find_place(other.envelope)) is not None
            and other.envelope.metadata.run_id == claim.envelope.metadata.run_id
            and later > place
            for other in claims
        )
    )


def _find_place(envelope: Any) -> tuple[float, bool] | None:
    """Returns the place of a round's request in the course of its run; None for a request of no round."""
    kind, group = envelope.metadata.message_type, envelope.metadata.group_id
    if kind == messages.FINISH:
        return math.inf, False
    if kind in (messages.TRAIN, messages.EVALUATE) and group.isdecimal() and len(group) < 10:
        return int(group), kind == messages.EVALUATE
    return None


def compute_wait(elapsed_s: float, every_s: float) -> float:
    """Returns the seconds from now until a whole number of intervals has passed; 0 where there are none.

    Args:
        elapsed_s: seconds since the first interval began.
        every_s: length of an interval.
    """
    return every_s - elapsed_s % every_s if every_s > 0.0 else 0.0


@final
class Node:
    """One site, joined to its coordinator."""

    def __init__(
        self,
        config: SiteConfig,
        site_file: Path,
        *,
        show: Show,
        online: Callable[[bool], None],
        leaving: StopRequest,
        retry_for_s: float,
    ) -> None:
        """Reads the site's key and certificates; contacts nothing yet.

        Args:
            config: The settings of the site file, for one coordinator.
            site_file: The path of the same file, for the worker.
            show: Shows one line about each thing that happens.
            online: A function that is called with true after each answer of the coordinator to a joined site, and with
                false when the connection is lost.
            leaving: The staff's wish to stop.
            retry_for_s: The seconds for which a coordinator that cannot be reached is tried.

        Raises:
            BadInput: No coordinator is named, or the key or the authority's certificate cannot be used.
        """
        named = config.list_coordinators().get(config.coordinator_name)
        if named is None:
            raise BadInput("coordinator: expected address, ca and key of the coordinator to join, got nothing")
        self._config, self._site_file = config, site_file
        self._coordinator: Coordinator = named
        self._show, self._online, self._leaving = show, online, leaving
        self._retry_for_s = retry_for_s
        self._fleet = Fleet(self._coordinator, read_key(self._coordinator.key), stopping=leaving.event, report=show)
        self._journal = FileJournal(private_folder(config.coordinator_dir) / JOURNAL)
        self._num_seen = len(read_site_journal(self._journal.path))
        self._own_digest = compute_code_digest()
        self._differences: dict[int, str | None] = {}
        self._too_large: dict[int, str] = {}
        self._worker: Worker | None = None
        self._node = 0
        self._is_busy = False
        self._has_joined = False
        self._last_request = ""
        self._reset_tries()

    def run(self) -> None:
        """Serves until the staff wants to stop.

        Raises:
            ConnectionRefused: No further try helps, or the time for further tries is over.
        """
        self._show(f"code digest {self._own_digest}", event="started", fields={"code_digest": self._own_digest})
        self._reset_tries()
        try:
            threading.Thread(target=self._send_heartbeats, daemon=True).start()
            self._serve()
        finally:
            self._online(False)
            self._leaving.event.set()
            self._close_worker()
            if self._node:
                with contextlib.suppress(ConnectionLost, ConnectionRefused, RunInactive):
                    self._fleet.deactivate(self._node)
                    self._show("left", event="left")
            self._fleet.close()

    # --- joining ---------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Goes online; a site that is online already stays so."""
        self._node = self._activate()
        self._online(True)
        self._show(f"joined {self._coordinator.address} as {self._config.name} (node {self._node})", event="connected")
        if waiting := Approvals(self._config.coordinator_dir).waiting():
            line = f"{len(waiting)} offer(s) wait for approval: headwater site approve {self._site_file}"
            self._show(line, event="offers_waiting", level="warning")

    def _reset_tries(self) -> None:
        self._delays, self._give_up = generate_delays(), time.monotonic() + self._retry_for_s

    def _wait_for_next_try(self, error: ConnectionLost) -> None:
        """Says what was seen and waits, longer each time until a request for messages has succeeded again.

        Raises:
            ConnectionRefused: No further try helps, or the time for further tries is over.
        """
        reason, delay = self._fleet.explain_loss(error), next(self._delays)
        if time.monotonic() + delay > self._give_up:
            sentence = f"gave up after {self._retry_for_s:g} s: {reason}"
            if self._has_joined:
                sentence += (
                    "; run `headwater site start` again when that is mended: what was charged stays charged, and a "
                    "reply that was computed is kept and sent at no further cost when the coordinator asks again"
                )
            raise ConnectionRefused(sentence) from error
        self._show(f"not joined: {reason}; next try in {delay:.0f} s", event="not_connected", level="warning")
        self._leaving.event.wait(delay)

    def _activate(self) -> int:
        path = self._config.coordinator_dir / NODE_ID
        saved = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        # A damaged file is as good as none: the coordinator knows the node by its key.
        if saved.isascii() and saved.isdigit():
            node = int(saved)
            # A site that crashed a moment ago still counts as online, and activating it again would be refused.
            try:
                if self._fleet.send_heartbeat(node):
                    if self._has_joined:
                        return node
                    # A process before this one may have died with a message, and the coordinator hands none out twice.
                    # A site that was away and is back is asked again at once; of one that seems to have been there all
                    # the time the coordinator only sees that it is silent.
                    self._fleet.deactivate(node)
                    self._leaving.event.wait(AWAY_S)
            except ConnectionRefused:
                # A number of another coordinator or a torn one is as good as none; the one that this process joined as
                # is right, and so its key is not known any more.
                if self._has_joined:
                    raise
        try:
            node = self._fleet.activate()
        except KeyInUse as error:
            if not path.is_file():
                raise
            # It was connected before: what tells its number is damaged, or its key was removed since.
            raise ConnectionLost(
                "this site still counts as connected, for about a minute after a crash; if that goes on, its key was "
                "removed, or another process is connected with it"
            ) from error
        try:
            write_atomic(path, str(node).encode())
        except OSError as error:
            # After a crash the coordinator may take the site for one that is online, for a minute.
            self._show(f"the node's number cannot be kept: {explain_os_error(error)}")
        return node

    def _send_heartbeats(self) -> None:
        """Keeps the site online; says so when that fails while an answer is under way and nothing else would."""
        lost_at: float | None = None
        while not self._leaving.event.wait(HEARTBEAT_EVERY_S):
            if not self._node:
                continue
            try:
                self._fleet.send_heartbeat(self._node)
            except (ConnectionLost, ConnectionRefused, RunInactive) as error:
                # What is wrong is found by the next request for messages, which can say it and end the process.
                if lost_at is None and self._is_busy:
                    lost_at = time.monotonic()
                    self._show(f"the coordinator cannot be reached ({error}); the answer under way goes on")
                continue
            if self._is_busy:
                self._online(True)
            if lost_at is not None:
                self._show(f"the coordinator is reached again after {time.monotonic() - lost_at:.0f} s")
                lost_at = None

    # --- serving ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        last = time.monotonic() - BUSY_FOR_S
        claims: list[Claim] = []
        joined = False
        while not self._leaving.event.is_set():
            try:
                if not joined:
                    self._join()
                    joined = self._has_joined = True
                while len(claims) < MAX_CLAIMED and (claim := self._fleet.claim_message(self._node)) is not None:
                    claims.append(claim)
                self._reset_tries()
                self._online(True)
                self._drop_repeated(claims)
                self._decline_overtaken(claims)
                delivery = self._fetch_first(claims)
            except RunInactive:
                self._leaving.event.wait(BUSY_POLL_S)  # Between the hand-out and the last object.
                continue
            except ConnectionLost as error:
                if joined:
                    self._online(False)
                    self._show("the connection is lost", event="disconnected", level="warning")
                joined = False
                self._wait_for_next_try(error)
                continue
            if delivery is not None:
                self._is_busy = True
                self._handle(delivery)
                self._is_busy = False
                last = time.monotonic()
                continue
            quiet_s = time.monotonic() - last
            if quiet_s > WORKER_IDLE_S:
                self._close_worker()
            self._leaving.event.wait(BUSY_POLL_S if quiet_s < BUSY_FOR_S else IDLE_POLL_S)

    def _fetch_first(self, claims: list[Claim]) -> Delivery | None:
        """Takes the first claim from the list and returns its message; keeps it there while the connection is lost."""
        if not claims:
            return None
        claim = claims.pop(0)
        try:
            return self._fleet.fetch_content(self._node, claim)
        except ConnectionLost as error:
            if not isinstance(error, InvalidAnswer):
                claims.insert(0, claim)  # Flower hands no message out twice.
            raise

    def _drop_repeated(self, claims: list[Claim]) -> None:
        """Takes the claims that are repeated later from the list; the answer to the last is the answer to all."""
        repeated = list_repeated(claims)
        claims[:] = [claim for claim in claims if all(claim is not each for each in repeated)]
        for claim in repeated:
            with contextlib.suppress(RunInactive, ConnectionLost):
                self._fleet.confirm_receipt(self._node, claim)

    def _decline_overtaken(self, claims: list[Claim]) -> None:
        """Declines the claims that a later one of the same run has overtaken, and takes them from the list."""
        overtaken = [claim for claim in claims if is_overtaken(claim, claims)]
        claims[:] = [claim for claim in claims if claim not in overtaken]
        for claim in overtaken:
            asked, group = claim.envelope.metadata.message_type, claim.envelope.metadata.group_id
            detail = f"{asked} of round {group}: a later request of the run is here; nothing was read or charged"
            self._note(RequestDeclined(message_type=asked, reason=DeclineReason.OVERTAKEN.value, detail=detail))
            declined = make_declined_reply(claim.envelope, DeclineReason.OVERTAKEN, self._config.name)
            with contextlib.suppress(RunInactive, ConnectionLost):  # Nobody waits for it any more.
                self._fleet.confirm_receipt(self._node, claim)
                self._fleet.push_reply(self._node, declined)
            self._show_outcome(0.0)

    def _handle(self, delivery: Delivery) -> None:
        started = time.monotonic()
        envelope = delivery.envelope
        asked = envelope.metadata.message_type
        group = envelope.metadata.group_id
        self._show_request(f"asked: {asked.removeprefix('query.')}{f', round {group}' if group.isdecimal() else ''}")
        try:
            outgoing = self._make_reply(delivery)
        except RunInactive:
            self._show("the run is over; nothing was done")
            return
        except ConnectionLost as error:
            self._show(f"the run's bundle cannot be had ({error}); nothing was done")
            return
        seconds = time.monotonic() - started
        if asked not in _UNTIMED:
            outgoing = self._hold_back(delivery, outgoing, started)
        try:
            self._fleet.push_reply(self._node, outgoing)
        except RunInactive:
            self._show("the run is over; the reply was not wanted any more")
        except UploadTooLarge as error:
            self._decline_too_large(delivery, str(error))
        except ConnectionLost as error:
            self._show(
                f"the reply could not be delivered ({error}); it is stored and costs nothing when asked for again"
            )
        self._show_outcome(seconds)

    def _decline_too_large(self, delivery: Delivery, detail: str) -> None:
        """Says in place of a reply that it cannot be sent; further rounds of the run are declined before a charge."""
        self._too_large[delivery.envelope.metadata.run_id] = detail
        self._write_too_large(delivery, f"{detail}; what was answered is stored and costs nothing when asked for again")
        declined = make_declined_reply(delivery.envelope, DeclineReason.TOO_LARGE, self._config.name)
        with contextlib.suppress(RunInactive, ConnectionLost, UploadTooLarge):
            self._fleet.push_reply(self._node, declined)

    def _write_too_large(self, delivery: Delivery, detail: str) -> None:
        asked = delivery.envelope.metadata.message_type
        self._journal.write(RequestDeclined(message_type=asked, reason=DeclineReason.TOO_LARGE.value, detail=detail))

    def _hold_back(self, delivery: Delivery, outgoing: Outgoing, started: float) -> Outgoing:
        """Returns the reply when its time has come; a word that declines where the staff does not wait for that."""
        until = time.monotonic() + compute_wait(time.monotonic() - started, self._config.reply_every_s)
        while (left_s := until - time.monotonic()) > 0.0:
            if self._leaving.is_due():
                # As for an answer under way: that one was ready is nothing the coordinator learns.
                return make_declined_reply(delivery.envelope, DeclineReason.INTERNAL, self._config.name)
            time.sleep(min(left_s, 0.5))
        return outgoing

    def _make_reply(self, delivery: Delivery) -> Outgoing:
        difference = self._check_bundle(delivery.envelope.metadata.run_id)
        if difference is not None:
            self._note(RequestDeclined(reason=DeclineReason.VERSION.value, detail=difference))
            return make_declined_reply(delivery.envelope, DeclineReason.VERSION, self._config.name)
        metadata = delivery.envelope.metadata
        if metadata.message_type in (messages.TRAIN, messages.MASKED) and metadata.run_id in self._too_large:
            self._write_too_large(delivery, f"{self._too_large[metadata.run_id]}; nothing was read or charged")
            return make_declined_reply(delivery.envelope, DeclineReason.TOO_LARGE, self._config.name)
        if self._worker is not None and self._worker.has_ended:
            # With nothing in hand: nothing of this message is charged yet, and another process can answer it.
            self._show("the process that answers had ended while it was idle; another one is started", level="warning")
            self._close_worker()
        if self._worker is None:
            environment = make_private_environment(self._config.coordinator_dir)
            if self._config.list_coordinators():
                environment[COORDINATOR_VARIABLE] = self._config.coordinator_name
            self._worker = Worker(self._site_file, environment)
        try:
            return self._worker.answer(delivery, self._leaving.is_due)
        except WorkerDied as died:
            detail = f"the process that answers ended with {died}; what it had reserved stays reserved"
        except Abandoned:
            detail = "abandoned by the site's staff; what was reserved stays reserved"
        self._close_worker()
        self._note(RequestDeclined(reason=DeclineReason.INTERNAL.value, detail=detail))
        return make_declined_reply(delivery.envelope, DeclineReason.INTERNAL, self._config.name)

    def _check_bundle(self, run: int) -> str | None:
        """Returns why a run's messages are not answered; None where its bundle brings this installation's own code."""
        if run not in self._differences:
            self._differences[run] = self._explain_difference(self._fleet.fetch_bundle(self._node, run))
        return self._differences[run]

    def _explain_difference(self, bundle: bytes) -> str | None:
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

    def _note(self, event: RequestDeclined) -> None:
        """Writes to the journal; where its disk is full, what happened is shown and the site stays joined."""
        try:
            self._journal.write(event)
        except OSError as error:
            self._show(f"{_describe_event(event)}; not in the journal: {explain_os_error(error)}")

    # --- output ----------------------------------------------------------------------------------------------------

    def _show_request(self, line: str) -> None:
        """Shows what is asked, unless it is the same as before: a run that waits for approval is offered for days."""
        if line != self._last_request:
            self._show(line, event="asked")
        self._last_request = line

    def _show_outcome(self, seconds: float) -> None:
        """Shows the events that the site's journal gained with an answer, and the budget that a release left."""
        events = read_site_journal(self._journal.path)[self._num_seen :]
        self._num_seen += len(events)
        for event in events:
            if isinstance(event, EncodingContinues):
                continue  # The process that encodes has shown it.
            self._show(
                f"{_describe_event(event)}  [{seconds:.1f} s]",
                event=event.event_name,
                level="warning" if isinstance(event, RequestDeclined) else "info",
                fields=event.model_dump(mode="json", exclude={"time"}),
            )
        if select_events(events, ReplySent) and self._worker is not None:
            with contextlib.suppress(WorkerDied):
                account = self._worker.fetch_balance()
                left = {name: account[name] for name in ("left_epsilon", "budget_epsilon")}
                self._show(
                    f"budget: epsilon {left['left_epsilon']:g} of {left['budget_epsilon']:g} left",
                    event="budget",
                    fields=left,
                )


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
        case RunJoined() if event.first_round > 1:
            return f"joined run {event.run_id} from round {event.first_round} of {event.rounds}"
        case BackboneUnusable() | RecordsPurged():
            return event.event_name
        case _:
            return f"run {event.run_id}: {event.event_name}"
