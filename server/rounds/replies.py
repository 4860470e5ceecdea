"""Replies as they come in: one bad reply is set aside with its reason and the round goes on.

What is checked: the sender was asked; the payload is well formed; tasks, names and shapes are those that were sent;
every value is finite; the norm is bounded; the plan is as private as the run asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import Message

from common import messages
from common.run import RunConfig
from common.types import BadInput, DeclineReason, Delta, Heads, Plan

_Reply = TypeVar("_Reply")
NOT_APPROVED = f"declined: {DeclineReason.NOT_APPROVED.value}"
NO_REPLY = "no reply before the time-out"
NOT_REACHED = "not reached"
UNREADABLE = "a reply that cannot be read"
MAY_CHANGE = (NOT_APPROVED, NO_REPLY, NOT_REACHED)
"""Reasons that may go away: the site's staff has not decided yet, or the site was not there."""


_ENGINE = {
    3: "it was removed or left before it took the message (error 3)",
    4: "its reply did not arrive (error 4)",
    5: "it left, or was not heard of any more (error 5)",
}
"""What the engine's error numbers mean (flwr.common.constant.ErrorCode of Flower 1.41)."""


@dataclass(frozen=True)
class SetAside:
    """A site whose reply is not used, and why."""

    node_id: int
    reason: str
    site: str = ""


def read_replies(
    asked: Mapping[str, int], replies: Iterable[Message], expected: type[_Reply]
) -> tuple[dict[int, tuple[_Reply, int]], list[SetAside]]:
    """Well-formed replies by node, with their size in bytes; and everything else, with a reason.

    Args:
        asked: message id -> node that was asked. Errors made by the engine itself name another sender, so the message
            they answer decides whose reply they are.
        replies: messages in any order.
        expected: the payload hoped for; a refusal is set aside as "declined: ...".
    """
    good: dict[int, tuple[_Reply, int]] = {}
    aside: list[SetAside] = []
    answered: set[int] = set()
    for message in replies:
        node = asked.get(message.metadata.reply_to_message_id)
        if node is None or node in answered:
            aside.append(SetAside(node or message.metadata.src_node_id, "a reply nobody asked for"))
            continue
        answered.add(node)
        if message.has_error():
            # The engine's text may quote a site's exception: only its number is kept.
            aside.append(SetAside(node, _ENGINE.get(message.error.code, f"error {message.error.code}")))
            continue
        try:
            good[node] = (_read(message, expected), messages.encoded_size(message.content))
        except _Refused as error:
            aside.append(SetAside(node, str(error), error.site))
        except BadInput as error:
            aside.append(SetAside(node, str(error)))
    aside += [SetAside(node, NO_REPLY) for node in asked.values() if node not in answered]
    return good, aside


def _read(message: Message, expected: type[_Reply]) -> _Reply:
    try:
        return messages.decode(message.content, expected)
    except BadInput as problem:
        try:
            declined = messages.decode(message.content, messages.Declined)
        except BadInput:
            raise problem from None
    raise _Refused(declined)


class _Refused(BadInput):
    def __init__(self, declined: messages.Declined) -> None:
        super().__init__(f"declined: {declined.refusal.value}")
        self.site = declined.site


def check_plan(plan: Plan, run: RunConfig) -> None:
    """Refuse a contribution that was not made as the run asks.

    Raises:
        BadInput: a private run answered without noise or the other way round, or with another unit.
    """
    asked = run.requested_privacy
    if plan.private != (asked is not None) or (asked is not None and plan.unit != asked.unit):
        raise BadInput("expected a plan with the run's privacy and unit, got another one")


def check_delta(delta: Delta, sent: Heads, max_norm: float) -> None:
    """Refuse a contribution that does not fit what was sent.

    Raises:
        BadInput: a missing or extra task or parameter, a wrong shape, a value that is not finite, or too large a norm.
    """
    if set(delta.heads) != set(sent):
        raise BadInput(f"expected tasks {', '.join(sorted(sent))}, got another set")
    square = 0.0
    for task, params in sent.items():
        got = delta.heads[task]
        if set(got) != set(params):
            raise BadInput(f"{task}: expected parameters {', '.join(sorted(params))}, got another set")
        for name, old in params.items():
            if got[name].shape != old.shape:
                raise BadInput(f"{task}.{name}: expected shape {old.shape}, got {got[name].shape}")
            if not np.isfinite(got[name]).all():
                raise BadInput(f"{task}.{name}: expected finite values")
            square += float(np.square(got[name], dtype=np.float64).sum())
    if math.sqrt(square) > max_norm:
        raise BadInput(f"expected an update of norm at most {max_norm:g}, got {math.sqrt(square):.3g}")
