"""Charged answers: each request is charged once, and the identical request gets the stored bytes.

The order is the promise: the identical request gets the stored bytes; what can fail is opened first, so that a failure
costs nothing; the ledger is charged durably before anything is computed from a record; the reply is stored before it is
sent, so that noise is never drawn twice for one request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from client.data.prepare import open_units
from client.data.records import Side
from client.data.units import Units
from client.ledger.events import Purpose
from client.ledger.ledger import Ledger, Reservation
from client.ledger.older_copy import check_reply, check_witness
from client.protocol.replies import Replies, ReplyDamaged
from client.protocol.site import (
    FINAL_HEADS,
    Joined,
    Site,
    SiteDeclined,
    load_kept_modules,
    open_on_stored,
)
from common import messages
from common.events import ReplyResent, ReplySent
from common.files import check_room
from common.privacy.lattice import check_unit_count
from common.tasks import Task, select_round
from common.types import (
    BadInput,
    BudgetExhausted,
    DeclineReason,
)

if TYPE_CHECKING:
    import torch

_ROOM_BYTES = 256 << 10
"""Room on a disk for the lines of a charge, of the journal and of a small reply."""

MAX_CHARGES = 3
"""Charges of one round: the first, and again after a crash."""


Charged = (
    messages.MomentsRequest
    | messages.VoteRequest
    | messages.TrainRequest
    | messages.MaskedRequest
    | messages.EvaluateRequest
)
"""A request whose answer is charged."""


def answer_once(
    site: Site,
    joined: Joined,
    request: Charged,
    what: Purpose,
    answer: Callable[[str, Ledger], tuple[messages.Reply, Reservation, int]],
) -> RecordDict:
    """The stored reply to this very request; else a new one, stored before it is sent.

    Args:
        site: who answers.
        joined: the run.
        request: what is asked.
        what: for the journal.
        answer: given the request's digest and the ledger, charges and computes: the reply, its charge, and the number
            of releases.
    """
    digest, started = messages.request_digest(request), time.monotonic()
    try:
        with Replies.exclusive(joined.folder) as replies:
            stored = replies.find(digest)
            if stored is not None:
                site.journal.write(
                    ReplyResent(run_id=joined.run_id, round=request.round, purpose=what, size_bytes=len(stored))
                )
                return messages.from_bytes(stored)
            with site.hold_ledger() as ledger:
                check_witness(ledger, request.witness)
                newest = replies.find_newest()
                if newest is not None:
                    check_reply(ledger, newest)
                charged = site.config.name_charge(joined.run_id)
                _check_not_overtaken(ledger, joined, charged, request.round)
                _check_asked_once(ledger, charged, request, what, digest)
            _check_room(ledger, joined, request)
            reply, reservation, num_releases = answer(digest, ledger)
            records = messages.encode(reply)
            data = messages.to_bytes(records)
            replies.store(digest, data)
            ledger.commit(reservation)
    except BudgetExhausted as error:
        raise SiteDeclined(DeclineReason.BUDGET, str(error)) from error
    except ReplyDamaged as error:
        raise SiteDeclined(DeclineReason.INTERNAL, str(error)) from error
    site.journal.write(
        ReplySent(
            run_id=joined.run_id,
            round=request.round,
            purpose=what,
            num_releases=num_releases,
            size_bytes=len(data),
            seconds=round(time.monotonic() - started, 3),
        )
    )
    return records


def _check_not_overtaken(ledger: Ledger, joined: Joined, charged: str, round_: int) -> None:
    """A run goes forward: nobody uses an answer of a round before one that was charged, or after the final heads.

    Raises:
        SiteDeclined: a later round of the run was charged, or the run's final heads are here.
    """
    newest = max((charge.round for charge in ledger.charges() if charge.run == charged), default=0)
    if (joined.folder / FINAL_HEADS).exists():
        overtaken_by = "the run's final heads are here"
    elif newest > round_:
        overtaken_by = f"round {newest} was charged already"
    else:
        return
    raise SiteDeclined(DeclineReason.OVERTAKEN, f"round {round_}: {overtaken_by}; nothing was read or charged")


def _check_room(ledger: Ledger, joined: Joined, request: Charged) -> None:
    """Checks that the disks hold a charge and a reply before there are any: else a full one would cost a charge.

    Raises:
        OSError: a disk is full.
    """
    # A reply holds at most about as much as the request: the same parameters.
    num_bytes = sum(array.nbytes for group in request.heads.values() for array in group.values())
    check_room(ledger.folder, _ROOM_BYTES)
    check_room(joined.folder, 2 * num_bytes + _ROOM_BYTES)


def _check_asked_once(ledger: Ledger, charged: str, request: Charged, what: Purpose, digest: str) -> None:
    """A round is answered to one request: else a coordinator could ask it over and over, up to the whole budget.

    Charges that were cut off, by a crash or an error, may be made again a few times. So may a secure sum, in a new
    attempt with other masks and other noise; but in one attempt one vector leaves: of two under the same masks the
    difference would be plain.

    Raises:
        SiteDeclined: another request of this round was answered, or it was charged too often.
    """
    # By round first: a ledger has many charges of a run, and few of one round.
    of_round = [charge for charge in ledger.charges() if charge.round == request.round]
    charges = [charge for charge in of_round if (charge.run, charge.purpose) == (charged, what)]
    if isinstance(request, messages.MaskedRequest):
        if any(charge.committed and charge.request == digest for charge in charges):
            raise SiteDeclined(DeclineReason.BAD_REQUEST, "this attempt's vector left already, and is not stored here")
    elif any(charge.committed and charge.request != digest for charge in charges):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "this round was answered already, to another request")
    if len(charges) >= MAX_CHARGES:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, f"this round was charged {MAX_CHARGES} times already")


@dataclass(frozen=True)
class Opened:
    """Everything that a request needs, opened before it is charged: what must fail costs nothing.

    Attributes:
        tasks: the site's tasks of the run, by name.
        modules: the parameters that were sent, as modules on the site's device.
        units: the site's units, on the same device.
    """

    tasks: Mapping[str, Task]
    modules: Mapping[str, torch.nn.Module]
    units: Units


def open_request(
    site: Site,
    joined: Joined,
    request: messages.TrainRequest | messages.MaskedRequest | messages.EvaluateRequest,
    side: Side,
) -> Opened:
    """Opens the tasks, parameters and units of a request to a site that has joined and prepared the run.

    Args:
        site: the site.
        joined: the run.
        request: a round's request.
        side: side of the site's units that it asks about.

    Raises:
        SiteDeclined: the round or the heads are not the run's, or what was prepared for it is gone or damaged.
        BadInput: the site file names a device that is not there.
    """
    tasks = open_on_stored(site, joined)
    if not joined.first_round <= request.round <= joined.run.rounds:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the round is outside the run, or before the site joined it")
    if set(request.heads) != set(joined.sizes(site.config)):
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "the heads are not those of this site's tasks")
    modules = load_kept_modules(site, joined, tasks, request.heads)
    in_round = select_round(tasks, request.round, joined.run.rounds)
    return Opened(in_round, modules, open_side(joined, tasks, side, site.device()))


def open_side(joined: Joined, tasks: Collection[str], side: Side, device: torch.device) -> Units:
    """Opens one side of a site's units as it prepared them for a run.

    Args:
        joined: the run.
        tasks: names under which they were prepared.
        side: the side.
        device: device to open them on.

    Raises:
        SiteDeclined: they are gone or damaged.
    """
    try:
        units = open_units(joined.folder / "data", side, list(tasks), device)
        check_unit_count(units.num_units)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.NOT_PREPARED, str(error)) from error
    return units
