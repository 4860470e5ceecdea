"""The coordinator's side of a round of a secure sum: five requests, after which it knows the sites' sum and no more.

An attempt goes on as long as enough sites do (`SumRules.count_needed`). Once it cannot, the round is asked again under
a new attempt, with new keys, new masks and new noise: nothing of one attempt is used in another. Sites pay for each
attempt in which their masked vector left. Rules, references and what sites check: docs/secure-sum.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from common import messages
from common.events import AcceptedUpdate
from common.privacy.lattice import Lattice
from common.privacy.update_norm import bound_update_norms
from common.run import RunConfig
from common.secure_sum.terms import SumRules, SumTerms
from common.secure_sum.unmasking import Collected, select_shares, unmask_sum
from common.secure_sum.vectors import choose_lattice, count_values, make_update
from common.types import (
    DECLINED,
    BadInput,
    DeclineReason,
    Delta,
    Heads,
    RunFailed,
    RunInterrupted,
    heads_digest,
    select_trained,
)
from server.rounds.aggregators import Weighted
from server.rounds.inquiry import Quorum, Waiting
from server.rounds.messenger import Messenger, Participant, Request
from server.rounds.replies import Rejected, RoundUpdates, check_delta, check_plan, describe_reasons

_Reply = TypeVar("_Reply")
MAX_TRIES = 8
"""Attempts at one round by one coordinator process; a site's ledger allows fewer once its vector has left."""
_OVERTAKEN = f"{DECLINED}{DeclineReason.OVERTAKEN}"
_OF_THE_ATTEMPT = (_OVERTAKEN, f"{DECLINED}{DeclineReason.BAD_REQUEST}")
"""Reasons to decline that another attempt may not have."""


def collect_sum(messenger: Messenger, participants: Sequence[Participant], heads: Heads, round_: int) -> RoundUpdates:
    """Returns the mean of the updates of all sites that a secure sum counts, as one update.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        heads: heads before the round.
        round_: number of the round, from 1.

    Raises:
        RunInterrupted: no attempt reached enough sites in time.
        RunFailed: the sum is none that the sites' plans make possible.
    """
    rules = read_rules(messenger.run)
    asked, number, num_tries, problem = list(participants), 0, 0, ""
    while num_tries < MAX_TRIES and len(asked) >= rules.min_sites and number < messages.MAX_ATTEMPTS:
        number += 1
        attempt, over = _Attempt(messenger, heads, rules, round_, number, asked), None
        try:
            updates = attempt.run()
        except _AttemptOver as error:
            over = error
        if over is None or not over.is_stale:
            messenger.write_rejected(attempt.rejected, attempt.names, "train", round_)
        if over is None:
            return updates
        problem = str(over)
        if over.is_final:
            break
        # A coordinator that began anew counts from 1: what its predecessor had tried is no try of its own.
        num_tries += not over.is_stale
        asked = [each for each in asked if each.node_id not in attempt.find_unwilling()]
    raise RunInterrupted(f"round {round_}: {problem}")


def read_rules(run: RunConfig) -> SumRules:
    """Returns the rules of a run's secure sums."""
    assert run.colluding is not None  # The run file has looked.
    return SumRules(run.cohort.min_sites, run.colluding)


class _AttemptOver(Exception):
    """An attempt that too few sites are left for.

    Attributes:
        is_final: true where waiting for sites did not help either.
        is_stale: true where sites have gone on to a later attempt.
    """

    def __init__(self, problem: str, *, is_final: bool = False, is_stale: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final
        self.is_stale = is_stale


@dataclass
class _Attempt:
    """One attempt while it is under way.

    Attributes:
        messenger: connection to the sites.
        heads: heads before the round.
        rules: rules of the run's sums.
        round_: number of the round.
        number: number of the attempt.
        asked: sites that it begins with.
        rejected: answers that were not used.
        masked_rejected: node ids of the sites that did not send a masked vector -> why.
        spoilers: node ids of the sites whose masked vector cannot be one.
        bytes_down: node id -> bytes that it was sent.
        bytes_up: node id -> bytes that it answered.
    """

    messenger: Messenger
    heads: Heads
    rules: SumRules
    round_: int
    number: int
    asked: Sequence[Participant]
    rejected: list[Rejected] = field(default_factory=list)
    masked_rejected: dict[int, str] = field(default_factory=dict)
    spoilers: set[int] = field(default_factory=set)
    bytes_down: Counter[int] = field(default_factory=Counter)
    bytes_up: Counter[int] = field(default_factory=Counter)

    @property
    def names(self) -> dict[int, str]:
        """Node id -> name of each site."""
        return {each.node_id: each.site for each in self.asked}

    def find_unwilling(self) -> set[int]:
        """Returns the nodes whose site would not send a usable masked vector in another attempt either.

        All others would pay for each attempt that such a site spoils.
        """
        declined = {
            node
            for node, reason in self.masked_rejected.items()
            if reason.startswith(DECLINED) and reason not in _OF_THE_ATTEMPT
        }
        return declined | self.spoilers

    def run(self) -> RoundUpdates:
        """Returns the sum of all who stayed until their masked vectors had come."""
        about = (self.messenger.run_id, self.round_, self.number)
        nodes = {each.site: each.node_id for each in self.asked}
        keys = self._ask(
            messages.SUM_KEYS,
            {node: messages.SumKeysRequest(*about) for node in nodes.values()},
            messages.SumKeysReply,
            self.rules.min_sites,
        )
        listed = self._select_alike(keys, nodes)
        needed = self.rules.count_needed(len(listed))
        to_all = messages.SumSharesRequest(*about, listed)
        shares = self._ask(
            messages.SUM_SHARES,
            {nodes[name]: to_all for name in listed},
            messages.SumSharesReply,
            needed,
            check=lambda name, reply: _check_names(reply.shares, set(listed) - {name}),
        )
        encrypted = {name: reply.shares for name, reply in shares.items()}
        masked = self._ask_for_vectors(nodes, encrypted, needed)
        survivors = tuple(sorted(masked))
        confirmed = self._ask(
            messages.SURVIVORS,
            {nodes[name]: messages.SurvivorsRequest(*about, survivors) for name in survivors},
            messages.SurvivorsReply,
            threshold := self.rules.compute_threshold(len(listed)),
        )
        signatures = {name: reply.signature for name, reply in confirmed.items()}
        revealed = self._ask(
            messages.UNMASK,
            {nodes[name]: messages.UnmaskRequest(*about, signatures) for name in confirmed},
            messages.UnmaskReply,
            threshold,
            check=lambda name, reply: _check_names(reply.shares, set(encrypted)),
            at_once=True,
        )
        lattice = self._find_lattice(masked)
        collected = Collected(
            SumTerms(*about, self.rules, lattice.log2_deviation),
            listed,
            tuple(encrypted),
            heads_digest(self.heads),
            {name: reply.masked for name, reply in masked.items()},
        )
        return self._make_updates(collected, {name: reply.shares for name, reply in revealed.items()}, masked, lattice)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        kind: str,
        requests: Mapping[int, messages.Request],
        expected: type[_Reply],
        needed: int,
        *,
        check: Callable[[str, _Reply], None] = lambda name, reply: None,
        at_once: bool = False,
    ) -> dict[str, _Reply]:
        """Returns the answers by the sites' names, once they are enough and the grace of the others is over."""
        names = self.names
        quorum = Quorum(needed, {}, {node: () for node in requests})
        answers = self.messenger.send(
            Request(
                kind,
                requests,
                expected,
                replace(Waiting.of(self.messenger.run, quorum), at_once=at_once),
                round=self.round_,
                names=names,
                check=lambda node, reply: check(names[node], reply),
            )
        )
        self.bytes_down.update(answers.bytes_sent)
        self.bytes_up.update({node: size for node, (_, size) in answers.accepted.items()})
        if not at_once:
            self.rejected += answers.rejected
        if kind == messages.MASKED:
            self.masked_rejected |= {item.node_id: item.reason for item in answers.rejected}
        missing = quorum.describe_missing(answers.accepted)
        if missing is not None:
            problem = f"{missing}: {describe_reasons(answers.rejected, names)}"
            stale = kind == messages.SUM_KEYS and any(item.reason == _OVERTAKEN for item in answers.rejected)
            raise _AttemptOver(problem, is_final=kind == messages.SUM_KEYS and not stale, is_stale=stale)
        return {
            names[node]: reply for node, (reply, _) in sorted(answers.accepted.items(), key=lambda item: names[item[0]])
        }

    def _select_alike(self, keys: Mapping[str, messages.SumKeysReply], nodes: Mapping[str, int]) -> dict[str, str]:
        """Returns the keys of the sites with the roster that most have: the others would decline all keys."""
        roster, _ = Counter(reply.roster for _, reply in sorted(keys.items())).most_common(1)[0]
        reason = "its site file has another roster, or other rules of secure sums, than most sites have"
        others = [Rejected(nodes[name], reason) for name, reply in keys.items() if reply.roster != roster]
        self.rejected += others
        if len(keys) - len(others) < self.rules.min_sites:
            problem = f"expected the same roster of secure sums at {self.rules.min_sites} site(s)"
            raise _AttemptOver(f"{problem}: {describe_reasons(others, self.names)}", is_final=True)
        return {name: reply.keys for name, reply in keys.items() if reply.roster == roster}

    def _ask_for_vectors(
        self, nodes: Mapping[str, int], encrypted: Mapping[str, Mapping[str, str]], needed: int
    ) -> dict[str, messages.MaskedReply]:
        run, witnesses = self.messenger.run, self.messenger.witnesses
        length = 8 * count_values({name: select_trained(params) for name, params in self.heads.items()})
        requests = {
            nodes[name]: messages.MaskedRequest(
                self.messenger.run_id,
                self.round_,
                self.number,
                select_shares(encrypted, name),
                self.heads,
                witnesses.find(name),
            )
            for name in encrypted
        }

        def check(name: str, reply: messages.MaskedReply) -> None:
            witnesses.keep({name: reply.witness})
            self.spoilers.add(nodes[name])
            if len(reply.masked) != length:
                raise BadInput(f"expected a masked vector of {length} bytes, got {len(reply.masked)}")
            check_plan(reply.plan, run)
            self.spoilers.remove(nodes[name])

        return self._ask(messages.MASKED, requests, messages.MaskedReply, needed, check=check)

    def _find_lattice(self, masked: Mapping[str, messages.MaskedReply]) -> Lattice:
        """Returns the lattice of the plan that most sites state: with another one, masks do not cancel."""
        plan, _ = Counter(reply.plan for reply in masked.values()).most_common(1)[0]
        try:
            return choose_lattice(plan, self.rules)
        except BadInput as error:
            raise RunFailed(f"round {self.round_}: {error}") from error

    def _make_updates(
        self,
        collected: Collected,
        revealed: Mapping[str, Mapping[str, str]],
        masked: Mapping[str, messages.MaskedReply],
        lattice: Lattice,
    ) -> RoundUpdates:
        counted = [each for each in self.asked if each.site in masked]
        sent = {name: select_trained(params) for name, params in self.heads.items()}
        updates: dict[str, list[Weighted]] = {}
        try:
            total = unmask_sum(collected, revealed)
            for group, params in make_update(total, sent, spacing=lattice.spacing, size=1.0).items():
                size = float(sum(each.parameter_groups[group] for each in counted))
                mean = {name: (values / size).astype(values.dtype) for name, values in params.items()}
                updates[group] = [Weighted(size, mean, self.messenger.run.count_noises(len(counted)))]
            delta = {group: dict(own[0].delta) for group, own in updates.items()}
            check_delta(Delta(delta), sent, self.messenger.run.max_delta_norm, self._bound_norms(counted, sent))
        except BadInput as error:
            raise RunFailed(
                f"round {self.round_}: the sites' secure sum cannot be used: {error}; which site caused it a "
                "secure sum does not tell"
            ) from error
        accepted = {
            each.site: AcceptedUpdate(
                bytes_down=self.bytes_down[each.node_id],
                bytes_up=self.bytes_up[each.node_id],
                plan=masked[each.site].plan,
                weights=dict(each.parameter_groups),
            )
            for each in counted
        }
        return RoundUpdates(accepted, updates, dict.fromkeys(updates, len(counted)))

    def _bound_norms(self, counted: Sequence[Participant], sent: Heads) -> dict[str, float]:
        """Returns head -> largest norm of its change: of wrong shares comes a sum that is uniform modulo 2**64."""
        run = self.messenger.run
        sizes = {task: sum(each.tasks[task] for each in counted) for task in run.tasks}
        # Of one site with all units, whose noise is that of the honest ones; that of all may be more.
        more = max(1.0, run.count_noises(len(counted))) ** 0.5
        return {group: more * norm for group, norm in bound_update_norms(run, sizes, sent).items()}


def _check_names(shares: Mapping[str, str], expected: set[str]) -> None:
    """Raises BadInput for shares of other sites than those that were asked for."""
    if set(shares) != expected:
        raise BadInput("expected one share for each site of the attempt, got another set")
