"""Replies as they come in: one bad reply is rejected with its reason and the round goes on.

What is checked: the sender was asked; the payload is well formed; tasks, names and shapes are those that were sent;
every value is finite; norms are within what the run's plan can reach; the plan is as private as the run asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import Message

from common import messages
from common.errors import list_some
from common.events import AcceptedUpdate
from common.flower import ErrorCode
from common.model.moments import MOST_STORED_NOISE
from common.privacy.update_norm import FAILURE, MAX_TRUE_PER_PUBLIC, check_descent_plan
from common.run import RunConfig
from common.types import (
    DECLINED,
    NOISE_MULTIPLIERS,
    BadInput,
    DeclineReason,
    Delta,
    Heads,
    Plan,
    explain_rejection,
)
from server.rounds.aggregators import Weighted

_Reply = TypeVar("_Reply")
NOT_APPROVED = f"{DECLINED}{DeclineReason.NOT_APPROVED.value}"
FAILED = f"{DECLINED}{DeclineReason.INTERNAL.value}"
NOT_PREPARED = f"{DECLINED}{DeclineReason.NOT_PREPARED.value}"
NO_REPLY = "no reply before the time-out"
NOT_REACHED = "not reached"
AWAY = "not connected"
UNREADABLE = "a reply that cannot be read"
NOT_ASKED = "a reply nobody asked for"
_FLOWER_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: NO_REPLY,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: NO_REPLY,
    ErrorCode.NODE_UNAVAILABLE: AWAY,
}
"""Errors by which Flower itself says that no reply came."""
MAY_CHANGE = (NOT_APPROVED, NO_REPLY, NOT_REACHED, AWAY)
"""Reasons that may go away: the site's staff has not decided yet, or the site was not there."""


@dataclass(frozen=True)
class Rejected:
    """A reply that is not used or did not come, and why.

    Attributes:
        node_id: Flower's number of the node whose reply it is.
        reason: one clause; of a fixed list where a site declined or did not answer.
        site: the name under which the site itself answered, where it did.
    """

    node_id: int
    reason: str
    site: str = ""

    def name(self, names: Mapping[int, str]) -> str:
        """Returns the site's name for a report: as it is known, as it called itself, or its node's number."""
        return names.get(self.node_id) or self.site or f"node {self.node_id}"


@dataclass(frozen=True)
class RoundUpdates:
    """The updates of a round that can be aggregated.

    Attributes:
        accepted: site -> facts of its update.
        by_group: head or trunk -> updates to aggregate; of a secure sum one, for all of its sites.
        counts: head or trunk -> number of sites whose updates these are.
    """

    accepted: Mapping[str, AcceptedUpdate]
    by_group: Mapping[str, Sequence[Weighted]]
    counts: Mapping[str, int]


def describe_reasons(rejected: Iterable[Rejected], names: Mapping[int, str]) -> str:
    """Returns the sites' names with the reason why their replies are missing, once for all that have the same."""
    sites: dict[str, list[str]] = {}
    for item in sorted(rejected, key=lambda item: item.name(names)):
        sites.setdefault(item.reason, []).append(item.name(names))
    return "; ".join(f"{list_some(alike)}: {explain_rejection(reason)}" for reason, alike in sites.items())


class _SiteDeclined(BadInput):
    def __init__(self, declined: messages.Declined) -> None:
        super().__init__(f"{DECLINED}{declined.refusal.value}")
        self.site = declined.site


def read_reply(node_id: int, message: Message, expected: type[_Reply]) -> _Reply | Rejected:
    """Returns a well-formed reply, or why it is none.

    Args:
        node_id: node that was asked. Errors made by Flower itself name another sender.
        message: the message that answers it.
        expected: type of a usable reply; a site that declines is rejected with "declined: ...".
    """
    if message.has_error():
        # Flower's text may quote a site's exception: only its number is kept.
        code = message.error.code
        return Rejected(node_id, _FLOWER_ERRORS.get(code, f"error {code}"))
    try:
        return _decode_reply(message, expected)
    except _SiteDeclined as error:
        return Rejected(node_id, str(error), error.site)
    except BadInput as error:
        return Rejected(node_id, str(error))


def _decode_reply(message: Message, expected: type[_Reply]) -> _Reply:
    try:
        return messages.decode(message.content, expected)
    except BadInput as problem:
        try:
            declined = messages.decode(message.content, messages.Declined)
        except BadInput:
            raise problem from None
    raise _SiteDeclined(declined)


def check_plan(plan: Plan, run: RunConfig) -> None:
    """Checks that an update was made with the run's privacy and unit, and with the numbers of the run file.

    Raises:
        BadInput: a private run answered without noise or the other way round, with another unit or with other numbers.
    """
    asked = run.requested_privacy
    if plan.private != (asked is not None) or (asked is not None and plan.unit != asked.unit):
        raise BadInput("expected a plan with the run's privacy and unit, got another one")
    check_descent_plan(plan, run)


def check_delta(delta: Delta, sent: Heads, max_norm: float, group_norms: Mapping[str, float] | None = None) -> None:
    """Checks that an update fits what was sent.

    Args:
        delta: the site's update.
        sent: heads and trunks that the site was sent.
        max_norm: largest allowed L2 norm of the whole update.
        group_norms: head or trunk -> largest L2 norm of its change; None for no such bound.

    Raises:
        BadInput: a missing or extra task or parameter, a wrong shape, a value that is not finite, or too large a norm.
    """
    if set(delta.heads) != set(sent):
        raise BadInput(f"expected tasks {', '.join(sorted(sent))}, got another set")
    squares = dict.fromkeys(sent, 0.0)
    for task, params in sent.items():
        got = delta.heads[task]
        if set(got) != set(params):
            raise BadInput(f"{task}: expected parameters {', '.join(sorted(params))}, got another set")
        for name, old in params.items():
            if got[name].shape != old.shape:
                raise BadInput(f"{task}.{name}: expected shape {old.shape}, got {got[name].shape}")
            if not np.isfinite(got[name]).all():
                raise BadInput(f"{task}.{name}: expected finite values")
            squares[task] += float(np.square(got[name], dtype=np.float64).sum())
        largest = math.inf if group_norms is None else group_norms[task]
        if math.sqrt(squares[task]) > largest:
            raise BadInput(
                f"{task}: expected a change of norm at most {largest:.3g}, which is all that the run's steps, rates, "
                f"clip norm and noise make possible, got {math.sqrt(squares[task]):.3g}"
            )
    norm = math.sqrt(sum(squares.values()))
    if norm > max_norm:
        raise BadInput(f"expected an update of norm at most {max_norm:g} (`max_delta_norm`), got {norm:.3g}")


def check_moments(
    reply: messages.MomentsReply,
    lengths: Mapping[str, int],
    units: Mapping[str, float],
    deviations: Mapping[str, float],
) -> None:
    """Checks that sums fit what was asked, and are no longer than the declared units and their noise make them.

    Args:
        reply: the site's sums.
        lengths: part -> number of its values.
        units: part -> declared number of units at the site.
        deviations: part -> deviation of the noise that the run asks for; 0 without privacy.

    Raises:
        BadInput: a missing or extra sum, a wrong shape, a value that is not finite, too large a norm, or noise that no
            run adds.
    """
    if set(reply.sums) != set(lengths) or set(reply.deviations) != set(lengths):
        raise BadInput(f"expected sums of {', '.join(sorted(lengths))}, got another set")
    for part, length in lengths.items():
        got = reply.sums[part]
        if set(got) != {"sum"} or got["sum"].shape != (length,):
            raise BadInput(f"{part}: expected a sum of {length} values, got another shape")
        if not np.isfinite(got["sum"]).all():
            raise BadInput(f"{part}: expected finite values")
        # Else a site that states much noise may send what it likes, and all others' sums would count for nothing.
        most = deviations[part] * MOST_STORED_NOISE * (1.0 + 2.0**-20)
        least = NOISE_MULTIPLIERS.low if deviations[part] else 0.0
        if not least <= reply.deviations[part] <= most:
            raise BadInput(
                f"{part}: expected noise of deviation {least:g} to {most:.3g}, got {reply.deviations[part]:.3g}"
            )
        tail = math.sqrt(length) + math.sqrt(2.0 * math.log(1.0 / FAILURE))
        bound = (MAX_TRUE_PER_PUBLIC * units[part] + reply.deviations[part] * tail) * (1.0 + 2.0**-20)
        norm = float(np.linalg.norm(got["sum"].astype(np.float64)))
        if norm > bound:
            raise BadInput(
                f"{part}: expected a sum of norm at most {bound:.3g}, which is all that {units[part]:g} declared units "
                f"and the noise make possible, got {norm:.3g}"
            )
