"""Messages of a few sites, where all sites are at hand: what they answer must be what was computed for them.

In the first round and in every `executor.encoded_every`-th, and at every other release, `executor.encoded_sites` sites
(drawn anew, one of each kind of site at least) are asked as by the other executors: through Flower's bytes, computing
by themselves, under the coordinator's checks. The sizes of their messages stand in the journal for those of all sites
of their kind, until the next are encoded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from client.protocol.site import Measurement
from common import messages
from common.events import AcceptedUpdate
from common.privacy.accounting import Mechanism
from common.types import BadInput, Delta, Heads, LedgerWitness, Plan, RunFailed
from server.rounds.inquiry import Waiting
from server.rounds.loop import build_request, make_update_check
from server.rounds.messenger import Answers, Messenger, Participant, Request, map_names
from server.rounds.replies import Rejected, describe_reasons
from simulations.executors.alike import Gathering
from simulations.executors.in_process import FIRST_NODE_ID
from simulations.executors.shard import Asked, Shard
from simulations.executors.shards import Shards

_Reply = TypeVar("_Reply")
_AnswerableRequest = messages.TrainRequest | messages.EvaluateRequest | messages.MomentsRequest


@final
class Encoded:
    """The messages of some sites that are encoded beside the request under way."""

    def __init__(
        self, gathering: Gathering, plan: Plan, kind_S: NDArray[np.int64], locate: Callable[[int], int]
    ) -> None:
        """Takes the sites of a run.

        Args:
            gathering: the sites.
            plan: of the run's rounds.
            kind_S: int64, the kind of each site.
            locate: returns the number of a site's shard.
        """
        self.plan, self.kind_S, self.locate = plan, kind_S, locate
        self._executor, self._precision = gathering.executor, gathering.run.delta_precision
        self.sizes: dict[int, tuple[int, int]] = {}
        """Kind of site -> bytes of a round's request and of its reply, when they were encoded last."""
        self._asked: Asked | None = None
        self._witness: LedgerWitness | None = None

    @property
    def round(self) -> int:
        """The number of the round under way."""
        assert self._asked is not None
        return self._asked.round

    def begin(self, asked: Asked, witness: LedgerWitness) -> None:
        """Takes the request under way: what the shards were asked, and the ledger with its charge."""
        self._asked, self._witness = asked, witness

    def choose(self, seed: int, numbers: Sequence[int]) -> list[int]:
        """Returns the sites whose messages are encoded, ascending.

        Args:
            seed: the run's seed.
            numbers: the sites that answer.
        """
        assert self._asked is not None
        drawn = random.Random(f"{seed}/{self._asked.release}/encoded")
        chosen = drawn.sample(numbers, min(self._executor.encoded_sites, len(numbers)))
        kinds = self.kind_S[np.array(numbers, np.int64)]
        others = np.setdiff1d(kinds, self.kind_S[np.array(chosen, np.int64)]).tolist()
        return sorted({*chosen, *(numbers[int(np.argmax(kinds == kind))] for kind in others)})

    def is_due(self, numbers: NDArray[np.int64]) -> bool:
        """Returns true if messages are encoded in this round: it is their turn, or some of these have no size yet."""
        is_known = set(self.kind_S[numbers].tolist()) <= set(self.sizes)
        return not is_known or (self.round - 1) % self._executor.encoded_every == 0

    def make_reply(self, number: int, released: Heads) -> messages.Reply:
        """Returns a site's reply.

        Args:
            number: the site.
            released: what it releases.
        """
        assert self._asked is not None
        what = self._asked.plans[int(self.kind_S[number])]
        if isinstance(what, Mechanism):
            return messages.EvaluateReply(released, what.noise_multiplier, self._witness)
        if isinstance(what, Measurement):
            assert what.plan is not None
            deviation = what.plan.noise_multiplier * (what.plan.clip_norm or 0.0)
            deviations = {name: deviation / factor if what.plan.private else 0.0 for name, factor in what.parts.items()}
            return messages.MomentsReply(released, deviations, self._witness)
        return messages.TrainReply(Delta(released), self.plan, self._precision, self._witness)

    def answer(self, message: Message, number: int, shards: Shards) -> Message:
        """Returns a site's answer to the request under way, computed for this site alone.

        Args:
            message: the request.
            number: the site.
            shards: the shards of all sites.
        """
        assert self._asked is not None
        kinds: dict[type, Any] = {
            Mechanism: messages.EvaluateRequest,
            Measurement: messages.MomentsRequest,
            Plan: messages.TrainRequest,
        }
        expected = kinds[type(self._asked.plans[int(self.kind_S[number])])]
        request: _AnswerableRequest = messages.decode(message.content, expected)
        assert request.round == self._asked.round
        released = shards.ask_one(self.locate(number), Shard.answer, (number, request.heads))
        records: RecordDict = messages.encode(self.make_reply(number, released))
        return Message(records, reply_to=message)


def list_accepted(
    encoded: Encoded,
    messenger: Messenger,
    by_site: Mapping[int, Participant],
    heads: Heads,
    used: NDArray[np.int64],
    shards: Shards,
) -> dict[str, AcceptedUpdate]:
    """Returns the facts of all updates that are used; where it is due, a few sites are asked for theirs by messages.

    Args:
        encoded: the request under way.
        messenger: connection to the sites, with the run and its journal.
        by_site: number of a site -> the site, of the cohort.
        heads: heads before the round.
        used: int64, the sites whose updates are used, ascending.
        shards: the shards of all sites.

    Raises:
        RunFailed: a site's answer differs from what was computed for it.
    """
    if encoded.is_due(used):
        chosen = encoded.choose(messenger.run.seed, used.tolist())
        _compare_updates(encoded, messenger, [by_site[number] for number in chosen], heads, shards)
    facts: dict[tuple[int, int], AcceptedUpdate] = {}
    accepted = {}
    for number, kind in zip(used.tolist(), encoded.kind_S[used].tolist(), strict=True):
        participant = by_site[number]
        key = kind, id(participant.parameter_groups)
        if key not in facts:
            bytes_down, bytes_up = encoded.sizes[kind]
            facts[key] = AcceptedUpdate(
                bytes_down=bytes_down,
                bytes_up=bytes_up,
                plan=encoded.plan,
                weights=dict(participant.parameter_groups),
            )
        accepted[participant.site] = facts[key]
    return accepted


def _compare_updates(
    encoded: Encoded, messenger: Messenger, some: Sequence[Participant], heads: Heads, shards: Shards
) -> None:
    """Asks some sites for their updates by messages, compares them, and keeps the messages' sizes.

    Args:
        encoded: the request under way.
        messenger: connection to the sites, with the run and its journal.
        some: the sites; their updates are used.
        heads: heads before the round.
        shards: the shards of all sites.
    """
    divided: dict[int, list[int]] = {}
    for each in some:
        number = each.node_id - FIRST_NODE_ID
        divided.setdefault(encoded.locate(number), []).append(number)
    expected = {
        FIRST_NODE_ID + number: update
        for shard, own in divided.items()
        for number, update in shards.ask_one(shard, Shard.list_updates, own).items()
    }
    requests: dict[int, messages.Request] = {
        each.node_id: build_request(messenger.run_id, heads, each.parameter_groups, encoded.round) for each in some
    }
    answers = messenger.send(
        Request(
            messages.TRAIN,
            requests,
            messages.TrainReply,
            Waiting(messenger.run.cohort.timeout_s, asks_again=False),
            round=encoded.round,
            names=map_names(some),
            check=make_update_check(messenger, some, heads),
        )
    )
    got = {node: reply.delta.heads for node, (reply, _) in answers.accepted.items()}
    _refuse_differences(encoded.round, answers, got, expected, map_names(some))
    for node, (_, size) in answers.accepted.items():
        encoded.sizes[int(encoded.kind_S[node - FIRST_NODE_ID])] = answers.bytes_sent[node], size


def compare_answers(
    encoded: Encoded,
    messenger: Messenger,
    request: Request[_Reply],
    found: Mapping[int, Heads],
    rejected: Sequence[Rejected],
) -> Answers[_Reply]:
    """Asks a few sites for another release by messages, compares it, and returns the answers of all.

    Args:
        encoded: the request under way.
        messenger: connection to the sites, with the run and its journal.
        request: what all sites are asked.
        found: site -> what was computed for it.
        rejected: the sites that were charged nothing.

    Raises:
        RunFailed: a site's answer differs from what was computed for it.
    """
    chosen = encoded.choose(messenger.run.seed, sorted(found)) if found else []
    payloads = {FIRST_NODE_ID + number: request.payloads[FIRST_NODE_ID + number] for number in chosen}
    # The coordinator's check of these comes below, as for all others.
    waiting = Waiting(messenger.run.cohort.timeout_s, asks_again=False)
    few = replace(request, payloads=payloads, waiting=waiting, check=lambda node, reply: None)
    answers = messenger.send(few) if chosen else Answers[_Reply]({}, [], {})
    expected = {FIRST_NODE_ID + number: found[number] for number in chosen}
    got = {node: _list_sums(reply) for node, (reply, _) in answers.accepted.items()}
    _refuse_differences(request.round, answers, got, expected, request.names)
    node_of = {int(encoded.kind_S[number]): FIRST_NODE_ID + number for number in chosen}
    accepted, refused = {}, list(rejected)
    for number, released in sorted(found.items()):
        node, reply = FIRST_NODE_ID + number, encoded.make_reply(number, released)
        assert isinstance(reply, request.expected)
        try:
            request.check(node, reply)
        except BadInput as error:
            refused.append(Rejected(node, str(error)))
            continue
        accepted[node] = reply, answers.accepted[node_of[int(encoded.kind_S[number])]][1]
    sizes = {node: answers.bytes_sent[node_of[int(encoded.kind_S[node - FIRST_NODE_ID])]] for node in accepted}
    return Answers(accepted, refused, sizes, dict.fromkeys(accepted, request.round))


def _list_sums(reply: object) -> Heads:
    assert isinstance(reply, messages.EvaluateReply | messages.MomentsReply)
    return reply.sums


def _refuse_differences(
    round_: int,
    answers: Answers[_Reply],
    got: Mapping[int, Heads],
    expected: Mapping[int, Heads],
    names: Mapping[int, str],
) -> None:
    """Raises RunFailed where a site answered by messages something else than was computed for it.

    Args:
        round_: number of the round.
        answers: the answers.
        got: node -> what it released by messages.
        expected: node -> what was computed for it.
        names: node -> name of its site.
    """
    different = [
        Rejected(node, f"{name}: expected what was computed for this site, got another {key}")
        for node, released in got.items()
        for name, key in sorted({*_list_arrays(released), *_list_arrays(expected[node])})
        if _get_bytes(released, name, key) != _get_bytes(expected[node], name, key)
    ]
    if answers.rejected or different:
        raise RunFailed(
            f"round {round_}: what a site answers by messages is not what was computed for it "
            f"({describe_reasons([*answers.rejected, *different], names)}); take `executor.kind: in_process`, and "
            "report it"
        )


def _list_arrays(released: Heads) -> list[tuple[str, str]]:
    return [(name, key) for name, own in released.items() for key in own]


def _get_bytes(released: Heads, name: str, key: str) -> bytes | None:
    """Returns an array's bytes; None where it is not released."""
    values = released.get(name, {}).get(key)
    return None if values is None else values.tobytes()
