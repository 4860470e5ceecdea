"""Sites that come after the roll call: each is offered the rest of the run, beside its rounds.

Nothing here waits. Each such site has one message under way; its answer is looked for while a round's replies are
awaited and between two rounds. So a site that has to encode for an hour holds nobody up: it takes part from the first
round that begins after it is ready. An offer names that round, for which the site plans its noise.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from common import messages
from common.events import BackboneSent, SiteJoined
from common.offers import SentBackbone, list_digests, make_offer
from common.types import BadInput
from server.rounds.join import PART_TRIES, RollCall, count_parts, find_join_problem, make_part, show_witness
from server.rounds.messenger import Messenger, Participant
from server.rounds.replies import AWAY, NO_REPLY, Rejected

_LOOK_EVERY_S = 2.0
"""Time between two looks at who is connected while a round is under way."""
_ASK_AGAIN_S = 5.0
"""Time before a site that may change its answer is asked again."""
_FIRST_INTERVAL_S, _LONGEST_INTERVAL_S = 5.0, 120.0
"""Times before a message to which nothing came is sent again: the first, and the longest after doubling."""
_BYTES_PER_S = 2**18


@dataclass(frozen=True)
class _Question:
    """A message that a site is sent next, and the type of the reply that is due."""

    kind: str
    stage: str
    payload: messages.Request
    expected: type[Any]


@dataclass(frozen=True)
class _Ready:
    """A site that is ready to take part, and its declarations."""

    participant: Participant
    reply: messages.JoinReply


_Steps = Generator[_Question, Any, _Ready | Rejected]
"""The questions to one site, one after the other; each answer is sent into it."""


@dataclass
class _Newcomer:
    """A site on its way into the run.

    Attributes:
        steps: what it is asked.
        question: what it was asked last.
        message_ids: the messages that carry it.
        ask_again_at: monotonic time at which the next of them is due.
        interval_s: seconds between the last of them and the next.
    """

    steps: _Steps
    question: _Question
    message_ids: list[str] = field(default_factory=list)
    ask_again_at: float = 0.0
    interval_s: float = 0.0

    def put(self, question: _Question) -> None:
        """Takes the next question, of which no message was sent yet."""
        self.question, self.message_ids, self.ask_again_at = question, [], 0.0
        # A part of a backbone takes a while to arrive.
        size = len(question.payload.data) if isinstance(question.payload, messages.PartRequest) else 0
        self.interval_s = _FIRST_INTERVAL_S + size / _BYTES_PER_S


@final
class LateRollCall:
    """The roll call that goes on while the run does."""

    def __init__(
        self,
        messenger: Messenger,
        backbones: Mapping[str, SentBackbone],
        node_ids: Mapping[int, str] | None,
        roll_call: RollCall,
    ) -> None:
        """Continues a roll call.

        Args:
            messenger: connection to the sites, with the run and its journal.
            backbones: the run's backbones by name.
            node_ids: node id -> name of every admitted site; None where names are not known beforehand.
            roll_call: the answers to the roll call before the first round.
        """
        self._messenger, self._backbones, self._node_ids, self._roll_call = messenger, backbones, node_ids, roll_call
        self._offer = messages.JoinRequest(
            messenger.run_id, make_offer(messenger.run, backbones), list_digests(backbones)
        )
        self._participants: dict[str, Participant] = {}
        self._newcomers: dict[int, _Newcomer] = {}
        self._ready: dict[int, _Ready] = {}
        self._next_round = 1
        self._looked_at = 0.0

    def admit(self, participants: list[Participant], round_: int) -> list[Participant]:
        """Returns the participants of a round that is about to begin: those so far, and the sites that are ready.

        Args:
            participants: the sites of the round before.
            round_: number of the round.
        """
        self._participants = {participant.site: participant for participant in participants}
        self._next_round = round_
        self._find_newcomers()
        while self._advance():
            pass
        for ready in self._ready.values():
            joined = ready.participant
            self._participants[joined.site] = joined
            self._messenger.journal.write(
                SiteJoined(
                    site=joined.site,
                    tasks=dict(ready.reply.tasks),
                    unit=ready.reply.unit,
                    delta=ready.reply.delta,
                    budget_epsilon=ready.reply.budget_epsilon,
                    first_round=round_,
                )
            )
        self._ready.clear()
        self._next_round = round_ + 1
        # By name: the cohort that is drawn from them depends on who they are alone.
        return [participant for _, participant in sorted(self._participants.items())]

    def look(self) -> None:
        """Takes every answer that is there and asks what follows; called while a round's replies are awaited."""
        if time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._find_newcomers()
        self._advance()

    def _find_newcomers(self) -> None:
        """Offers the rest of the run to sites that are connected and not asked yet; forgets those that left."""
        self._looked_at = now = time.monotonic()
        present = set(self._messenger.grid.get_node_ids())
        if self._node_ids is not None:
            present &= self._node_ids.keys()
        for node in self._newcomers.keys() - present:
            del self._newcomers[node]
            self._roll_call.asked_at.pop(node, None)
        inside = {participant.node_id for participant in self._participants.values()} | self._ready.keys()
        asked_at = self._roll_call.asked_at
        for node in sorted(self._roll_call.select_open(present) - inside - self._newcomers.keys()):
            if now - asked_at.get(node, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
                asked_at[node] = now
                steps = self._bring_in(node)
                newcomer = self._newcomers[node] = _Newcomer(steps, next(steps))
                newcomer.put(newcomer.question)
                self._ask_where_due(node, newcomer)

    def _ask_where_due(self, node: int, newcomer: _Newcomer) -> None:
        """Sends the question, again where nothing came: a site that was killed has lost it; twice is once."""
        now = time.monotonic()
        if now >= newcomer.ask_again_at:
            question = newcomer.question
            message_id = self._messenger.post(question.kind, node, question.payload)
            newcomer.message_ids += [] if message_id is None else [message_id]
            newcomer.ask_again_at = now + newcomer.interval_s
            newcomer.interval_s = max(newcomer.interval_s, min(2.0 * newcomer.interval_s, _LONGEST_INTERVAL_S))

    def _advance(self) -> bool:
        """Returns whether an answer was there; each is followed by the next question to its site."""
        any_answer = False
        for node, newcomer in list(self._newcomers.items()):
            answer = None
            if newcomer.message_ids:
                answer = self._messenger.fetch(newcomer.message_ids, node, newcomer.question.expected)
            # By an error Flower says that no reply will come: it is asked again when that is due.
            if answer is not None and not (isinstance(answer, Rejected) and answer.reason in (NO_REPLY, AWAY)):
                any_answer = True
                try:
                    newcomer.put(newcomer.steps.send(answer))
                except StopIteration as end:
                    del self._newcomers[node]
                    self._end(node, newcomer.question.stage, end.value)
                    continue
            self._ask_where_due(node, newcomer)
        return any_answer

    def _end(self, node: int, stage: str, outcome: _Ready | Rejected) -> None:
        if isinstance(outcome, _Ready):
            self._ready[node] = outcome
            self._roll_call.rejected.pop(node, None)
            return
        before = self._roll_call.rejected.get(node)
        if before is None or before.reason != outcome.reason:
            self._messenger.write_rejected([outcome], self._node_ids or {}, stage)
        self._roll_call.rejected[node] = outcome

    def _bring_in(self, node: int) -> _Steps:
        """Asks one site to join, sends it what it lacks, and has it prepare."""
        messenger = self._messenger
        known_as = None if self._node_ids is None else self._node_ids[node]
        offer = self._make_offer(known_as or "")
        reply = yield _Question(messages.JOIN, "join", offer, messages.JoinReply)
        if isinstance(reply, Rejected):
            return reply
        others = self._participants | {ready.participant.site: ready.participant for ready in self._ready.values()}
        problem = find_join_problem(messenger.run, reply, others, known_as)
        if problem:
            return Rejected(node, problem, reply.site)
        specs = {}
        for name, backbone in self._backbones.items():
            held = reply.backbones.get(name)
            # Two names may mean one backbone: it is sent once.
            if held is None or held.whole or backbone.digest in specs:
                continue
            blob = backbone.blob()
            try:
                total = count_parts(messenger.run, name, blob)
            except BadInput as error:
                return Rejected(node, str(error), reply.site)
            specs[blob.digest] = blob.spec
            num_bytes = 0
            for index in sorted(set(range(total)) - set(held.parts)):
                part = make_part(messenger.run_id, blob, index, total)
                question = _Question(messages.PART, "backbone", part, messages.Ready)
                for _ in range(PART_TRIES):
                    num_bytes += len(part.data)
                    # A site without the whole backbone says so when it is asked to prepare.
                    if not isinstance((yield question), Rejected):
                        break
            messenger.journal.write(BackboneSent(site=reply.site, backbone=name, size_bytes=num_bytes))
        prepare = messages.PrepareRequest(messenger.run_id, specs)
        prepared = yield _Question(messages.PREPARE, "prepare", prepare, messages.Ready)
        if isinstance(prepared, Rejected):
            return prepared
        later = self._make_offer(reply.site)
        if later != offer:
            # Rounds passed meanwhile: the site plans its noise for those that are left.
            reply = yield _Question(messages.JOIN, "join", later, messages.JoinReply)
            if isinstance(reply, Rejected):
                return reply
            problem = find_join_problem(messenger.run, reply, others, known_as)
            if problem:
                return Rejected(node, problem, reply.site)
        messenger.witnesses.keep({reply.site: reply.witness})
        return _Ready(Participant.of(node, reply, messenger.run), reply)

    def _make_offer(self, site: str) -> messages.JoinRequest:
        return show_witness(self._messenger, replace(self._offer, first_round=self._next_round), site)
