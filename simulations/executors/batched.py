"""The `batched` executor: the sites are rows of arrays in this process, and a round trains all of them at once.

The heads are those of `in_process`, to the bit, from the same keys. Each site keeps a key of its own for each round, a
balance of its own in the shared ledger, and a check of its own update; the ledger is charged, durably, before anything
is computed from a record. What is done once for all sites: joining, preparing, the line of a round's charge, the
request. Messages are encoded for a few sites a round: these are asked as by the other executors, through Flower's
bytes, the site's solver and the coordinator's checks, and what they answer must be what was computed for them.

A site that the solver cannot train beside others (see `client.solvers.parts.many_sites`), and every site with a solver
that trains one at a time, is trained by itself: the same update, more slowly.

# Shapes: S sites.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import nn

from client.config import SiteConfig
from client.data.prepare import list_positions, open_units
from client.ledger.events import Terms
from client.ledger.place import locate_ledgers
from client.ledger.shared import SharedLedger, SharedReservation
from client.protocol.answer import MAX_CHARGES
from client.protocol.join import accept_training
from client.protocol.site import Joined, SiteDeclined, check_allowed
from client.solvers import ManySitesSolver, Solver
from client.solvers.parts.many_sites import ManySites
from client.solvers.parts.many_units import ManyUnits
from common import messages
from common.events import AcceptedUpdate, SiteJoined
from common.files import without_flushing
from common.model.parameters import load_parameters
from common.privacy.accounting import Mechanism
from common.privacy.noise import Entropy, NoiseStream, draw_key
from common.privacy.update_norm import bound_update_norms
from common.run import RunConfig
from common.tasks import Task, select_round
from common.types import DECLINED, BadInput, DeclineReason, Delta, Heads, Plan, RunFailed, RunInterrupted
from server.rounds.inquiry import Quorum, Waiting
from server.rounds.join import describe_missing_quorum
from server.rounds.loop import build_request, gather_updates, make_update_check, sample_cohort, select_trained_groups
from server.rounds.messenger import Messenger, Participant, Request, map_groups, map_names
from server.rounds.replies import Rejected, RoundUpdates, check_delta, describe_reasons
from simulations.executors.gathered import GatheredSites
from simulations.executors.in_process import FIRST_NODE_ID

_NEARLY = 1.0 - 2.0**-20
"""Updates nearly as long as they may be are looked at one by one."""


@dataclass(frozen=True)
class Gathering:
    """The sites of a run, gathered and prepared.

    Attributes:
        site: the one site file.
        sites: which row is whose.
        run_id: id of the run.
        run: the run.
        backbones: name -> width of its features, and its digest.
        entropy: source of the keys of sampling and noise.
        tasks: the run's tasks by name.
        num_encoded: number of sites a round whose messages are encoded.
        solver: the run's solver.
    """

    site: SiteConfig
    sites: GatheredSites
    run_id: str
    run: RunConfig
    backbones: Mapping[str, tuple[int, str]]
    entropy: Entropy
    tasks: Mapping[str, Task]
    num_encoded: int
    solver: Solver


@dataclass(frozen=True)
class _Alike:
    """The sites that train the same heads.

    Attributes:
        tasks: their tasks.
        sites: int64, their numbers.
        place_S: int64, the place of each site among them; -1 for the others.
        units: their units.
        many: these, opened for training; None where the solver trains one site at a time.
        modules: task -> head, whose parameters are those that were opened last.
    """

    tasks: Mapping[str, Task]
    sites: NDArray[np.int64]
    place_S: NDArray[np.int64]
    units: ManyUnits
    many: ManySites | None
    modules: Mapping[str, nn.Module]

    def open_modules(self, heads: Heads) -> Mapping[str, nn.Module]:
        """Returns the heads as modules, as a site opens them; no solver changes them."""
        for name, module in self.modules.items():
            load_parameters(module, heads[name])
        return self.modules


@dataclass
class _Round:
    """The round under way: its keys and its charges.

    Attributes:
        number: its number.
        keys: site -> key of its stream.
        reservation: the charges.
        bounds: identity of a site's declared sizes -> parameter group -> largest norm of its change.
        doubtful: the sites whose updates are not surely short enough.
    """

    number: int
    keys: Mapping[int, bytes]
    reservation: SharedReservation
    bounds: dict[int, dict[str, float]]
    doubtful: set[int]


@final
class BatchedSites:
    """The sites of a run as arrays; see `server.rounds.loop.SitesAtHand`.

    Attributes:
        gathering: the sites.
        prepare: encodes the records of the one site for the run.
    """

    def __init__(self, gathering: Gathering, prepare: Callable[[], None]) -> None:
        """Args: as the attributes."""
        self.gathering, self.prepare = gathering, prepare
        self._all, self._solver = gathering, gathering.solver
        self._alike: list[_Alike] = []
        self._group_S = np.zeros(len(gathering.sites.names), np.int64)
        self._groups: dict[int, Mapping[str, int]] = {}
        self._round: _Round | None = None
        self._plan: Plan | None = None

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

    # --- before the first round --------------------------------------------------------------------------------------

    def join(self, messenger: Messenger) -> list[Participant]:
        """Returns the sites that agree to the run, prepared. See `SitesAtHand.join`."""
        run, sites = self._all.run, self._all.sites
        plan = self._accept()
        rounds = run.rounds
        self._plan, self._ledger = plan, self.ledger()
        held_S = self._ledger.earmark(
            Mechanism.of(plan.over(rounds)), run=self._all.run_id, rounds=rounds, allow_infinite=not plan.private
        )
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
            backbones, budget = shared[id(sizes)], self._all.site.budget
            groups = self._list_groups(number)
            participants.append(Participant(node, name, sizes, groups, backbones, budget.epsilon, budget.delta))
        with without_flushing():  # One line for each site; the next that is flushed puts them all on the disk.
            messenger.write_rejected(rejected, {}, "join")
            for each in participants:
                messenger.journal.write(self._describe_joined(each))
        problem = describe_missing_quorum(run, {each.site: each for each in participants})
        if problem is not None:
            raise RunFailed(f"{problem}: {describe_reasons(rejected, {})}")
        messenger.observe("joined", len(participants), len(participants))
        self.prepare()
        self._open()
        return participants

    def _accept(self) -> Plan:
        """Returns the plan of a round, which is the same at all sites. Raises BadInput where a site would decline."""
        config, run = self._all.site, self._all.run
        digests = {name: digest for name, (_, digest) in self._all.backbones.items()}
        joined = Joined(self._all.run_id, run, digests, config.state_dir / "runs" / self._all.run_id)
        largest: dict[frozenset[str], dict[str, int]] = {}
        for sizes in {id(each): each for each in self._all.sites.sizes}.values():
            kept = largest.setdefault(frozenset(sizes), dict(sizes))
            kept |= {name: max(size, kept[name]) for name, size in sizes.items()}
        plans = []
        for most in largest.values():
            tasks = {name: config.tasks[name].model_copy(update={"public_size": size}) for name, size in most.items()}
            own = config.model_copy(update={"tasks": tasks})
            try:
                check_allowed(own, joined)
                plans.append(accept_training(own, joined))
            except SiteDeclined as declined:
                raise BadInput(declined.detail) from declined
        return plans[0]

    def _describe_joined(self, participant: Participant) -> SiteJoined:
        return SiteJoined(
            site=participant.site,
            tasks=dict(participant.tasks),
            unit=self._all.site.unit,
            delta=participant.delta,
            budget_epsilon=participant.budget_epsilon,
        )

    def _open(self) -> None:
        """Opens the prepared units, divided among the sites."""
        gathered, run = self._all.sites, self._all.run
        folder, names = self._all.site.state_dir / "runs" / self._all.run_id / "data", list(self._all.tasks)
        units = open_units(folder, "train", names, torch.device("cpu"))
        positions = list_positions(folder, "train", names)
        groups: dict[frozenset[str], list[int]] = {}
        for number, sizes in enumerate(gathered.sizes):
            groups.setdefault(frozenset(sizes), []).append(number)
        for own, members in groups.items():
            tasks, sites = {name: self._all.tasks[name] for name in names if name in own}, np.array(members)
            place_S = np.full(len(gathered.names) + 1, -1)  # The last is of rows that are nobody's.
            place_S[sites] = np.arange(len(sites))
            self._group_S[sites] = len(self._alike)
            homes = [place_S[gathered.site_P[positions[name]]] for name in tasks]
            divided = ManyUnits.divide(units.only(list(tasks)), homes, len(sites))
            heads = {name: task.head(self._all.backbones[run.backbone_of(name)][0]) for name, task in tasks.items()}
            many = ManySites(heads, tasks, divided) if isinstance(self._solver, ManySitesSolver) else None
            self._alike.append(_Alike(tasks, sites, place_S, divided, many, heads))

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
        cohort = sample_cohort(messenger.run, participants, round_)
        by_site = {each.node_id - FIRST_NODE_ID: each for each in cohort}
        reservation, rejected = self._charge(by_site, heads, round_)
        granted = [number for number in by_site if reservation.granted_S[number]]
        name_of, run = self._all.sites.names, self._all.run
        keys = {number: draw_key(self._all.entropy, run.name, name_of[number], str(round_)) for number in granted}
        bounds = {}
        for each in cohort:
            if id(each.tasks) not in bounds:
                sent = select_trained_groups(heads, each.parameter_groups)
                bounds[id(each.tasks)] = bound_update_norms(run, each.tasks, sent)
        self._round = _Round(round_, keys, reservation, bounds, set())
        deltas = self._train(heads, granted, rejected)
        self._check(messenger, by_site, heads, deltas, rejected)
        self._ledger.commit(reservation)
        accepted = self._encode_some(messenger, by_site, heads, deltas)
        rejected = sorted(rejected, key=lambda item: item.node_id)
        messenger.write_rejected(rejected, map_names(cohort), "train", round_)
        missing = Quorum.of(run, map_groups(cohort), {}).describe_missing([FIRST_NODE_ID + number for number in deltas])
        if missing is not None:
            raise RunInterrupted(f"round {round_}: {missing}: {describe_reasons(rejected, map_names(cohort))}")
        pairs = {by_site[number].site: (by_site[number], delta) for number, delta in deltas.items()}
        return gather_updates(run, heads, accepted, pairs)

    def _charge(
        self, by_site: Mapping[int, Participant], heads: Heads, round_: int
    ) -> tuple[SharedReservation, list[Rejected]]:
        """Charges a round to the sites of a cohort, and returns with the charges the sites that decline it."""
        assert self._plan is not None
        asked_S = np.zeros(len(self._group_S), np.bool_)
        asked_S[list(by_site)] = True
        requests = [build_request(self._all.run_id, heads, alike.tasks, round_) for alike in self._alike]
        digests = [messages.request_digest(request) for request in requests]
        reservation = self._ledger.reserve(
            Mechanism.of(self._plan),
            asked_S,
            run=self._all.run_id,
            round=round_,
            request=hashlib.sha256("".join(digests).encode()).hexdigest(),
            most_charges=MAX_CHARGES,
            allow_infinite=not self._plan.private,
        )
        reasons = ((reservation.refused_S, DeclineReason.BUDGET), (reservation.answered_S, DeclineReason.BAD_REQUEST))
        rejected = [
            Rejected(FIRST_NODE_ID + number, f"{DECLINED}{reason.value}")
            for mask_S, reason in reasons
            for number in np.flatnonzero(mask_S).tolist()
        ]
        return reservation, rejected

    def _train(self, heads: Heads, granted: Sequence[int], rejected: list[Rejected]) -> dict[int, Heads]:
        """Returns site -> its update; sites whose training fails are added to those that are rejected."""
        assert self._round is not None and self._plan is not None
        deltas: dict[int, Heads] = {}
        group_S = self._group_S[granted] if granted else np.empty(0, np.int64)
        for index, alike in enumerate(self._alike):
            own = np.array(granted, np.int64)[group_S == index]
            trained = self._train_alike(alike, heads, own)
            for number in own.tolist():
                delta = trained.get(number)
                if delta is None:
                    delta = self._train_alone(alike, heads, number)
                if delta is None:
                    rejected.append(Rejected(FIRST_NODE_ID + number, f"{DECLINED}{DeclineReason.INTERNAL.value}"))
                else:
                    deltas[number] = delta
        return dict(sorted(deltas.items()))

    def _train_alike(self, alike: _Alike, heads: Heads, sites: NDArray[np.int64]) -> dict[int, Heads]:
        """Returns the updates of the sites that can be trained at once."""
        assert self._round is not None and self._plan is not None
        many, solver = alike.many, self._solver
        if many is None or not isinstance(solver, ManySitesSolver):
            return {}
        places = alike.place_S[sites]
        tasks = select_round(alike.tasks, self._round.number, self._all.run.rounds)
        modules = alike.open_modules(heads)
        found: dict[int, Heads] = {}
        for block in many.list_blocks(places[many.fits[places]]):
            numbers = alike.sites[block].tolist()
            trained = solver.solve_each(
                modules,
                tasks,
                many,
                block,
                plan=self._plan,
                public_sizes=[self._list_groups(number) for number in numbers],
                streams=[NoiseStream(self._round.keys[number]) for number in numbers],
            )
            parts = many.split(self._round_as_sent(trained.change_SN))
            self._round.doubtful.update(self._find_doubtful(numbers, parts))
            for place, number in enumerate(numbers):
                if trained.sound[place]:
                    found[number] = {
                        name: {key: values[place] for key, values in own.items()} for name, own in parts.items()
                    }
        return found

    def _find_doubtful(
        self, numbers: Sequence[int], parts: Mapping[str, Mapping[str, NDArray[np.float32]]]
    ) -> list[int]:
        """Returns the sites whose update may be longer than it may be; the others' surely is not.

        Args:
            numbers: the sites.
            parts: task -> parameter -> the sites' changes, one after the other.
        """
        assert self._round is not None
        all_S, is_long_S = np.zeros(len(numbers)), np.zeros(len(numbers), np.bool_)
        for name, own in parts.items():
            flat = [values.reshape(len(numbers), -1) for values in own.values()]
            square_S = sum(np.square(each, dtype=np.float64).sum(axis=1) for each in flat)
            limit_S = [self._round.bounds[id(self._all.sites.sizes[number])][name] for number in numbers]
            is_long_S |= np.sqrt(square_S) > np.array(limit_S) * _NEARLY
            all_S += square_S
        is_long_S |= np.sqrt(all_S) > self._all.run.max_delta_norm * _NEARLY
        return [numbers[place] for place in np.flatnonzero(is_long_S).tolist()]

    def _train_alone(self, alike: _Alike, heads: Heads, number: int) -> Heads | None:
        """Returns a site's update as it is sent; None where its training fails."""
        assert self._round is not None
        self._round.doubtful.add(number)
        try:
            delta = self._solve(alike, alike.open_modules(heads), number)
        except RunFailed:
            return None
        return {
            name: {key: self._round_as_sent(values) for key, values in own.items()} for name, own in delta.heads.items()
        }

    def _solve(self, alike: _Alike, modules: Mapping[str, nn.Module], number: int) -> Delta:
        assert self._round is not None and self._plan is not None
        return self._solver.solve(
            modules,
            select_round(alike.tasks, self._round.number, self._all.run.rounds),
            alike.units.select_site(int(alike.place_S[number])),
            plan=self._plan,
            public_sizes=self._list_groups(number),
            stream=NoiseStream(self._round.keys[number]),
        )

    def _list_groups(self, number: int) -> Mapping[str, int]:
        """Returns the declared sizes of the parameter groups of a site: one mapping for sites with equal ones."""
        sizes = self._all.sites.sizes[number]
        if id(sizes) not in self._groups:
            self._groups[id(sizes)] = self._all.run.parameter_group_sizes(sizes)
        return self._groups[id(sizes)]

    def _round_as_sent(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return messages.round_as_sent(values, self._all.run.delta_precision)

    def _check(
        self,
        messenger: Messenger,
        by_site: Mapping[int, Participant],
        heads: Heads,
        deltas: dict[int, Heads],
        rejected: list[Rejected],
    ) -> None:
        """Removes the updates that the coordinator's checks reject; shapes and finite numbers are their making."""
        assert self._round is not None
        for number in sorted(self._round.doubtful & deltas.keys()):
            participant = by_site[number]
            sent = select_trained_groups(heads, participant.parameter_groups)
            bounds = self._round.bounds[id(participant.tasks)]
            try:
                check_delta(Delta(deltas[number]), sent, messenger.run.max_delta_norm, bounds)
            except BadInput as error:
                rejected.append(Rejected(participant.node_id, str(error)))
                del deltas[number]

    # --- messages ----------------------------------------------------------------------------------------------------

    def _encode_some(
        self, messenger: Messenger, by_site: Mapping[int, Participant], heads: Heads, deltas: Mapping[int, Heads]
    ) -> dict[str, AcceptedUpdate]:
        """Asks a few sites by messages, compares what they answer, and returns the facts of all updates.

        Raises:
            RunFailed: a site's answer differs from what was computed for it.
        """
        assert self._round is not None and self._plan is not None
        drawn = random.Random(f"{messenger.run.seed}/{self._round.number}/encoded")
        chosen = drawn.sample(list(deltas), min(self._all.num_encoded, len(deltas)))
        # One of each kind of site at least: what it is sent and what it sends has a size of its own.
        groups = self._group_S[list(deltas)]
        others = np.setdiff1d(groups, self._group_S[chosen]).tolist() if deltas else []
        some = sorted({*chosen, *(list(deltas)[int(np.argmax(groups == group))] for group in others)})
        cohort = [by_site[number] for number in some]
        by_update = make_update_check(messenger, cohort, heads)

        def check(node: int, reply: messages.TrainReply) -> None:
            by_update(node, reply)
            expected = deltas[node - FIRST_NODE_ID]
            for name, own in reply.delta.heads.items():
                if any(values.tobytes() != expected[name][key].tobytes() for key, values in own.items()):
                    raise BadInput(f"{name}: expected the update that was computed for this site, got another one")

        requests: dict[int, messages.Request] = {
            each.node_id: build_request(messenger.run_id, heads, each.parameter_groups, self._round.number)
            for each in cohort
        }
        answers = messenger.send(
            Request(
                messages.TRAIN,
                requests,
                messages.TrainReply,
                Waiting(messenger.run.cohort.timeout_s, asks_again=False),
                round=self._round.number,
                names=map_names(cohort),
                check=check,
            )
        )
        if answers.rejected:
            raise RunFailed(
                f"round {self._round.number}: what a site answers by messages is not what was computed for it "
                f"({describe_reasons(answers.rejected, map_names(cohort))}); take `executor.kind: in_process`, and "
                "report it"
            )
        facts: dict[tuple[int, int], AcceptedUpdate] = {}
        sizes = {self._group_S[number]: FIRST_NODE_ID + number for number in some}
        accepted = {}
        for number in deltas:
            participant, group = by_site[number], int(self._group_S[number])
            key = group, id(participant.parameter_groups)
            if key not in facts:
                node = sizes[group]
                facts[key] = AcceptedUpdate(
                    bytes_down=answers.bytes_sent[node],
                    bytes_up=answers.accepted[node][1],
                    plan=self._plan,
                    weights=dict(participant.parameter_groups),
                )
            accepted[participant.site] = facts[key]
        return accepted

    def answer(self, message: Message, context: Context) -> Message:
        """Returns a site's answer to the request of the round under way, computed for this site alone."""
        assert self._round is not None and self._plan is not None
        number = int(context.node_config["partition-id"])
        alike = self._alike[int(self._group_S[number])]
        request = messages.decode(message.content, messages.TrainRequest)
        assert (request.run_id, request.round) == (self._all.run_id, self._round.number)
        delta = self._solve(alike, alike.open_modules(request.heads), number)
        witness = self._round.reservation.witness
        reply = messages.TrainReply(delta, self._plan, self._all.run.delta_precision, witness)
        records: RecordDict = messages.encode(reply)
        return Message(records, reply_to=message)

    def finish(self, heads: Heads) -> None:
        """Holds nothing for the run any more. See `SitesAtHand.finish`."""
        del heads
        self._ledger.release(self._all.run_id)
