"""The `batched` executor: the sites are rows of arrays, in this process or in shards, and a round trains them together.

The heads are those of `in_process`, to the bit, from the same keys, however many shards there are. Each site keeps a
key of its own for each round, a balance of its own in the shared ledger, and a check of its own update. One chained
ledger lies beside the coordinator: a charge is on the disk before any shard is asked, so before a key is drawn. What is
done once for all sites: joining, preparing, the line of a charge, the request. Messages are encoded for a few sites
(`simulations.executors.encoded`).

A site that the solver cannot train beside others (see `client.solvers.parts.many_sites`), and every site with a solver
that trains one at a time, is trained by itself: the same update, more slowly.

# Shapes: S sites.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import numpy as np
from flwr.app import Context, Message
from numpy.typing import NDArray

from client.config import NoisedEvaluation
from client.ledger.events import Terms
from client.ledger.place import locate_ledgers
from client.ledger.shared import SharedLedger, SharedReservation
from client.protocol.answer import MAX_CHARGES
from client.protocol.site import Measurement
from common import messages
from common.events import AcceptedUpdate
from common.privacy.accounting import Mechanism
from common.types import DECLINED, BadInput, DeclineReason, Heads, Plan, RunFailed, RunInterrupted
from server.rounds.aggregators import Weighted, open_aggregator
from server.rounds.aggregators.parts.exact_sum import ExactSum
from server.rounds.inquiry import Quorum
from server.rounds.join import describe_missing_quorum
from server.rounds.loop import build_request, gather_updates, sample_cohort
from server.rounds.messenger import Answers, Messenger, Participant, Request, map_groups, map_names
from server.rounds.replies import Rejected, RoundUpdates, describe_reasons
from simulations.executors.alike import Gathering
from simulations.executors.encoded import Encoded, compare_answers, list_accepted
from simulations.executors.gathered import list_kinds
from simulations.executors.in_process import FIRST_NODE_ID
from simulations.executors.joining import accept_run, describe_joined
from simulations.executors.shard import Asked, Shard
from simulations.executors.shards import OpenShards, Shards

_Reply = TypeVar("_Reply")


@final
class BatchedSites:
    """The sites of a run as arrays; see `server.rounds.loop.SitesAtHand`.

    Attributes:
        gathering: the sites.
        prepare: encodes the records of the one site for the run.
        shards: the sites' shards, once they have joined.
    """

    def __init__(
        self, gathering: Gathering, prepare: Callable[[], None], open_shards: OpenShards, num_shards: int = 1
    ) -> None:
        """Takes the sites of a run.

        Args:
            gathering: the sites.
            prepare: encodes their records.
            open_shards: opens the shards once that is done.
            num_shards: number of the shards.
        """
        self.gathering, self.prepare = gathering, prepare
        self._all, self._open_shards = gathering, open_shards
        everyone = np.arange(len(gathering.sites.names))
        self._divided = [own for own in np.array_split(everyone, num_shards) if len(own)]
        self._kinds, self._kind_S = list_kinds(gathering.sites)
        self._groups: dict[int, Mapping[str, int]] = {}
        self.shards: Shards | None = None
        self._encoded: Encoded | None = None
        self._plan: Plan | None = None
        self._measured: list[Measurement] = []

    @property
    def _evaluation_budget(self) -> NoisedEvaluation | None:
        config = self._all.site
        return None if config.evaluation == "local" else config.evaluation

    def ledger(self) -> SharedLedger:
        """Returns the ledger that the sites share."""
        config = self._all.site
        terms = Terms(config.unit, config.budget.epsilon, config.budget.delta, filter=config.budget.filter)
        return SharedLedger.open(locate_ledgers(config) / config.registry, self._all.sites.names, terms)

    def __len__(self) -> int:
        return len(self._all.sites.names)

    def list_epsilons(self) -> dict[str, float]:
        """Returns epsilon of everything that each site was charged."""
        return dict(zip(self._all.sites.names, self.ledger().compute_epsilons(), strict=True))

    def close(self) -> None:
        """Ends the shards' processes."""
        if self.shards is not None:
            self.shards.close()

    # --- before the first round --------------------------------------------------------------------------------------

    def join(self, messenger: Messenger) -> list[Participant]:
        """Returns the sites that agree to the run, prepared. See `SitesAtHand.join`."""
        run, sites = self._all.run, self._all.sites
        plan, self._measured = accept_run(self._all)
        self._plan, self._ledger = plan, self.ledger()
        held_S = self._earmark(plan)
        participants, rejected = [], []
        digests = {name: messages.Held(True, ()) for name in run.backbone_specs}
        shared: dict[int, Mapping[str, messages.Held]] = {}
        for number, (name, sizes) in enumerate(zip(sites.names, sites.sizes, strict=True)):
            node = FIRST_NODE_ID + number
            if not held_S[number]:
                rejected.append(Rejected(node, f"{DECLINED}{DeclineReason.BUDGET.value}", name))
                continue
            if id(sizes) not in shared:
                shared[id(sizes)] = {key: digests[key] for task in sizes for key in run.backbones_of(task)}
                self._groups[id(sizes)] = run.parameter_group_sizes(sizes)
            backbones, budget = shared[id(sizes)], self._all.site.budget
            groups = self._groups[id(sizes)]
            participants.append(Participant(node, name, sizes, groups, backbones, budget.epsilon, budget.delta))
        messenger.write_rejected(rejected, {}, "join")
        for each in participants:
            messenger.journal.write(describe_joined(self._all, each))
        problem = describe_missing_quorum(run, {each.site: each for each in participants})
        if problem is not None:
            raise RunFailed(f"{problem}: {describe_reasons(rejected, {})}")
        messenger.observe("joined", len(participants), len(participants))
        self.prepare()
        self.shards = self._open_shards(self._all, self._divided)
        self._encoded = Encoded(self._all, plan, self._kind_S, self._locate)
        return participants

    def _earmark(self, plan: Plan) -> NDArray[np.bool_]:
        """Holds the run's price at each site, and returns the sites whose budgets cover it."""
        rounds = self._all.run.rounds
        held_S = np.full(len(self), not plan.private)
        for kind, measured in enumerate(self._measured) if plan.private else ():
            held_S |= self._ledger.earmark(
                Mechanism.of(plan.over(rounds)),
                self._kind_S == kind,
                run=self._all.run_id,
                rounds=rounds,
                before=None if measured.plan is None else Mechanism.of(measured.plan),
                evaluation_budget=self._evaluation_budget,
            )
        return held_S

    # --- a round -----------------------------------------------------------------------------------------------------

    def collect(
        self, messenger: Messenger, participants: Sequence[Participant], heads: Heads, round_: int
    ) -> RoundUpdates:
        """Returns the updates of a cohort. See `SitesAtHand.collect`.

        Args:
            messenger: connection to the sites, with the run and its journal.
            participants: sites that joined.
            heads: heads before the round.
            round_: number of the round, from 1.
        """
        assert self.shards is not None and self._encoded is not None and self._plan is not None
        run, cohort = self._all.run, sample_cohort(messenger.run, participants, round_)
        by_site = {each.node_id - FIRST_NODE_ID: each for each in cohort}
        requests = [build_request(self._all.run_id, heads, kind, round_) for kind in self._kinds]
        digest = hashlib.sha256("".join(map(messages.request_digest, requests)).encode()).hexdigest()
        reservation = self._ledger.reserve(
            Mechanism.of(self._plan),
            self._mask(list(by_site)),
            run=self._all.run_id,
            round=round_,
            request=digest,
            most_charges=MAX_CHARGES,
            allow_infinite=not self._plan.private,
            evaluation_budget=self._evaluation_budget,
        )
        self._ledger.make_durable()
        plans: list[Plan | Mechanism | Measurement | None] = [self._plan] * len(self._kinds)
        asked = Asked(str(round_), round_, heads, np.flatnonzero(reservation.granted_S), plans, {})
        answered = self.shards.ask(Shard.train, self._divide(asked))
        self._ledger.commit(reservation)
        used = np.concatenate([each.accepted for each in answered])
        self._encoded.begin(asked, reservation.witness)
        accepted = list_accepted(self._encoded, messenger, by_site, heads, used, self.shards)
        rejected = [*_list_refused(reservation), *(item for each in answered for item in each.rejected)]
        rejected.sort(key=lambda item: item.node_id)
        messenger.write_rejected(rejected, map_names(cohort), "train", round_)
        missing = Quorum.of(run, map_groups(cohort), {}).describe_missing((FIRST_NODE_ID + used).tolist())
        if missing is not None:
            raise RunInterrupted(f"round {round_}: {missing}: {describe_reasons(rejected, map_names(cohort))}")
        if open_aggregator(run.aggregation_of(None), "aggregation").needs_sum:
            return self._add_up(by_site, heads, used, accepted)
        updates = {number: each for shard in self._list_all(used) for number, each in shard.items()}
        pairs = {by_site[number].site: (by_site[number], updates[number]) for number in used.tolist()}
        return gather_updates(run, heads, accepted, pairs)

    def _add_up(
        self,
        by_site: Mapping[int, Participant],
        heads: Heads,
        used: NDArray[np.int64],
        accepted: Mapping[str, AcceptedUpdate],
    ) -> RoundUpdates:
        """Returns the updates of a round as one for each head: the mean of the shards' exact sums.

        Args:
            by_site: number of a site -> the site, of the cohort.
            heads: heads before the round.
            used: int64, the sites whose updates are used, ascending.
            accepted: site -> facts of its update.
        """
        assert self.shards is not None
        weights, totals = {}, {}
        for group in heads:
            own = [by_site[number] for number in used.tolist() if group in by_site[number].parameter_groups]
            sizes = {each.site: float(each.parameter_groups[group]) for each in own}
            found = self._all.run.aggregation.select_adjustment(group).weigh_sites(sizes) if sizes else {}
            weights[group] = np.zeros(len(self))
            weights[group][[each.node_id - FIRST_NODE_ID for each in own]] = list(found.values())
            # As `server.rounds.loop` weighs each update: a site whose units count twice brings twice its noise.
            noise = math.fsum((found[site] / size) ** 2 for site, size in sizes.items())
            totals[group] = math.fsum(found.values()), noise, len(own)
        shares = [{group: each[own] for group, each in weights.items()} for own in self._divided]
        sums: dict[str, dict[str, ExactSum]] = {}
        for part in self.shards.ask(Shard.add_up, shares):
            for group, params in part.items():
                known = sums.setdefault(group, params)
                for key, each in params.items() if known is not params else ():
                    known[key].merge(each)
        by_group: dict[str, list[Weighted]] = {group: [] for group in heads}
        for group, params in sums.items():
            weight, noise, count = totals[group]
            if count:
                mean: dict[str, NDArray[Any]] = {key: each.round() / weight for key, each in params.items()}
                by_group[group] = [Weighted(weight, mean, noise)]
        return RoundUpdates(accepted, by_group, {group: count for group, (_, _, count) in totals.items()})

    # --- other releases ----------------------------------------------------------------------------------------------

    def send(self, messenger: Messenger, request: Request[_Reply]) -> Answers[_Reply]:
        """Returns the sites' answers to a request for sums or statistics. See `SitesAtHand.send`.

        Args:
            messenger: connection to the sites, with the run and its journal.
            request: the request.
        """
        assert self.shards is not None and self._encoded is not None
        by_kind: dict[int, messages.Request] = {}
        for node, payload in request.payloads.items():
            by_kind.setdefault(int(self._kind_S[node - FIRST_NODE_ID]), payload)
        granted_S, rejected = np.zeros(len(self), np.bool_), []
        plans: list[Plan | Mechanism | Measurement | None] = [None] * len(self._kinds)
        charges = []
        for kind, payload in by_kind.items():
            some_S = self._mask([node - FIRST_NODE_ID for node in request.payloads]) & (self._kind_S == kind)
            reservation, plans[kind] = self._charge(payload, kind, some_S)
            charges.append(reservation)
            granted_S |= reservation.granted_S
            rejected += _list_refused(reservation)
        self._ledger.make_durable()
        first = next(iter(by_kind.values()))
        is_evaluation = isinstance(first, messages.EvaluateRequest)
        heads: Heads = {name: each for one in by_kind.values() for name, each in _list_heads(one).items()}
        offsets = {name: each for one in by_kind.values() for name, each in _list_offsets(one).items()}
        release = f"evaluation/{request.round}" if is_evaluation else str(request.round)
        asked = Asked(release, request.round, heads, np.flatnonzero(granted_S), plans, offsets)
        method = Shard.evaluate if is_evaluation else Shard.measure
        found = {number: own for part in self.shards.ask(method, self._divide(asked)) for number, own in part.items()}
        for reservation in charges:
            self._ledger.commit(reservation)
        self._encoded.begin(asked, charges[-1].witness)
        return compare_answers(self._encoded, messenger, request, found, rejected)

    def _charge(
        self, payload: messages.Request, kind: int, sites_S: NDArray[np.bool_]
    ) -> tuple[SharedReservation, Mechanism | Measurement]:
        """Charges a release to the sites of one kind, and returns the charge and what they are to release.

        Args:
            payload: what they are asked.
            kind: number of the kind.
            sites_S: those of them that are asked.

        Raises:
            BadInput: sites of this simulation release nothing of the sort.
        """
        assert self._plan is not None
        budget, run_id = self._evaluation_budget, self._all.run_id
        if isinstance(payload, messages.EvaluateRequest):
            if budget is None:
                raise BadInput(
                    "evaluation: expected a share of the sites' budgets where the run has an `evaluation`, such as "
                    "`evaluation: {evaluations: 2, share: 0.1}`, got `local`"
                )
            return self._ledger.reserve_evaluation(
                budget,
                len(self._kinds[kind]),
                sites_S,
                run=run_id,
                round=payload.round,
                request=messages.request_digest(payload),
                most_charges=MAX_CHARGES,
                allow_infinite=not self._plan.private,
            )
        assert isinstance(payload, messages.MomentsRequest)
        measured = self._measured[kind]
        assert measured.plan is not None  # Only sites that measure something are asked.
        reservation = self._ledger.reserve(
            Mechanism.of(measured.plan),
            sites_S,
            run=run_id,
            round=payload.round,
            request=messages.request_digest(payload),
            most_charges=MAX_CHARGES,
            allow_infinite=not measured.plan.private,
            evaluation_budget=budget,
        )
        return reservation, measured

    def answer(self, message: Message, context: Context) -> Message:
        """Returns a site's answer to the request under way, computed for this site alone."""
        assert self.shards is not None and self._encoded is not None
        return self._encoded.answer(message, int(context.node_config["partition-id"]), self.shards)

    def finish(self, heads: Heads) -> None:
        """Holds nothing for the run any more. See `SitesAtHand.finish`."""
        del heads
        self._ledger.release(self._all.run_id)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _mask(self, numbers: Sequence[int]) -> NDArray[np.bool_]:
        found_S = np.zeros(len(self), np.bool_)
        found_S[np.array(numbers, np.int64)] = True
        return found_S

    def _divide(self, asked: Asked) -> list[Asked]:
        """Returns what each shard is asked: all of it, of its own sites."""
        return [replace(asked, granted=asked.granted[np.isin(asked.granted, own)]) for own in self._divided]

    def _locate(self, number: int) -> int:
        """Returns the number of a site's shard."""
        return next(at for at, own in enumerate(self._divided) if own[0] <= number <= own[-1])

    def _list_all(self, used: NDArray[np.int64]) -> list[dict[int, Heads]]:
        """Returns the updates of some sites, shard by shard."""
        assert self.shards is not None
        return self.shards.ask(Shard.list_updates, [used[np.isin(used, own)].tolist() for own in self._divided])


def _list_refused(reservation: SharedReservation) -> list[Rejected]:
    """Returns the sites that are charged nothing, and why."""
    reasons = ((reservation.refused_S, DeclineReason.BUDGET), (reservation.answered_S, DeclineReason.BAD_REQUEST))
    return [
        Rejected(FIRST_NODE_ID + number, f"{DECLINED}{reason.value}")
        for mask_S, reason in reasons
        for number in np.flatnonzero(mask_S).tolist()
    ]


def _list_heads(payload: messages.Request) -> Heads:
    return payload.heads if isinstance(payload, messages.EvaluateRequest) else {}


def _list_offsets(payload: messages.Request) -> Mapping[str, Sequence[float]]:
    return payload.offsets if isinstance(payload, messages.EvaluateRequest) else {}
