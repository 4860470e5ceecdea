"""Some sites of a run as rows of arrays in one process: their updates, their sums, what each answers by itself.

A site's keys are drawn here, when its charge is on the disk (`simulations.executors.batched`), and stay here; so do its
updates. What leaves is asked for: which updates can be used, their exact sum, those of a few sites. A unit's clipped
part is an integer array that follows from that unit alone, and a sum of sites is exact: so nothing depends on which
sites stand in which shard.

# Shapes: S sites of the run; B sites of one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.protocol.site import Measurement
from client.solvers import ManySitesSolver
from common import messages
from common.privacy.accounting import Mechanism
from common.privacy.noise import NoiseStream, draw_key
from common.privacy.update_norm import bound_update_norms
from common.tasks import select_round
from common.types import DECLINED, BadInput, DeclineReason, Delta, Heads, Plan, RunFailed
from server.rounds.aggregators.parts.exact_sum import ExactSum, add_exactly
from server.rounds.loop import select_trained_groups
from server.rounds.replies import Rejected, check_delta
from simulations.executors.alike import Alike, Gathering
from simulations.executors.gathered import list_kinds
from simulations.executors.in_process import FIRST_NODE_ID
from simulations.executors.releases import evaluate_alone, evaluate_each, measure_alone

_NEARLY = 1.0 - 2.0**-20
"""Updates nearly as long as they may be are looked at one by one."""

Updates = dict[str, dict[str, NDArray[np.float32]]]
"""Head -> parameter -> the updates of some sites, one after the other along the first axis."""


@dataclass(frozen=True)
class Asked:
    """A request to the sites of a shard, whose charge is on the disk.

    Attributes:
        release: name of the release, for its keys.
        round: number of the round; 0 before the first.
        heads: heads before, or to be evaluated; none where the sums before the first round are asked for.
        granted: int64, the sites that were charged, ascending.
        plans: for each kind of site, what it is to release: a round's update, statistics of held-out units, or sums
            before the first round; None for one that releases nothing.
        offsets: task -> offset of its outputs in training, for an evaluation that calibrates.
    """

    release: str
    round: int
    heads: Heads
    granted: NDArray[np.int64]
    plans: Sequence[Plan | Mechanism | Measurement | None]
    offsets: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Answered:
    """The answer of a shard to a round.

    Attributes:
        accepted: int64, the sites whose updates can be used, ascending.
        rejected: the others that were asked.
    """

    accepted: NDArray[np.int64]
    rejected: list[Rejected]


@dataclass
class _Updated:
    """The updates of some sites of one kind.

    Attributes:
        sites: int64 [B], their numbers.
        updates: their updates.
        is_used_B: the sites whose updates can be used.
    """

    sites: NDArray[np.int64]
    updates: Updates
    is_used_B: NDArray[np.bool_]


@final
class Shard:
    """Some sites of a run."""

    def __init__(self, gathering: Gathering, numbers: NDArray[np.int64]) -> None:
        """Args: gathering: all sites of the run, prepared; numbers: the shard's sites, one after the other."""
        self._all, self._numbers, self._solver = gathering, numbers, gathering.solver
        kinds, self._kind_S = list_kinds(gathering.sites)
        self._alike: list[Alike | None] = []
        for number, own in enumerate(kinds):
            sites = numbers[self._kind_S[numbers] == number]
            tasks = {name: task for name, task in gathering.tasks.items() if name in own}
            self._alike.append(Alike(gathering, tasks, sites) if len(sites) else None)
        self._groups: dict[int, Mapping[str, int]] = {}
        self._asked: Asked | None = None
        self._keys: dict[int, bytes] = {}
        self._blocks: list[_Updated] = []

    def count_sites(self, argument: None) -> int:
        """Returns the number of sites: the shard is open."""
        del argument
        return len(self._numbers)

    # --- a round -----------------------------------------------------------------------------------------------------

    def train(self, asked: Asked) -> Answered:
        """Trains the sites that were charged, keeps their updates, and returns which of them can be used."""
        self._draw_keys(asked)
        self._blocks, rejected = [], []
        bounds: dict[int, dict[str, float]] = {}
        for number in asked.granted.tolist():
            sizes = self._all.sites.sizes[number]
            if id(sizes) not in bounds:
                sent = select_trained_groups(asked.heads, self._list_groups(number))
                bounds[id(sizes)] = bound_update_norms(self._all.run, sizes, sent)
        for kind, alike in enumerate(self._alike):
            if alike is None:
                continue
            own = asked.granted[self._kind_S[asked.granted] == kind]
            found, blocks = self._train_alike(alike, asked, own)
            for number in np.setdiff1d(own, found).tolist():
                block = self._train_alone(alike, asked, number)
                if block is None:
                    rejected.append(Rejected(FIRST_NODE_ID + number, f"{DECLINED}{DeclineReason.INTERNAL.value}"))
                else:
                    blocks.append(block)
            for block in blocks:
                rejected += self._check(block, asked.heads, bounds)
            self._blocks += blocks
        accepted = [block.sites[block.is_used_B] for block in self._blocks]
        return Answered(np.sort(np.concatenate([np.empty(0, np.int64), *accepted])), rejected)

    def list_updates(self, numbers: Sequence[int]) -> dict[int, Heads]:
        """Returns the updates of some sites of this round."""
        wanted, found = set(numbers), dict[int, Heads]()
        for block in self._blocks:
            for place, number in enumerate(block.sites.tolist()):
                if number in wanted:
                    found[number] = {
                        name: {key: values[place] for key, values in own.items()} for name, own in block.updates.items()
                    }
        return found

    def add_up(self, weights: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[str, ExactSum]]:
        """Returns the exact weighted sum of the updates that can be used, of each parameter of each head.

        Args:
            weights: head -> for each site of this shard, its weight.
        """
        total: dict[str, dict[str, ExactSum]] = {}
        for block in self._blocks:
            place_B = np.searchsorted(self._numbers, block.sites[block.is_used_B])
            for name, own in block.updates.items():
                used = own if block.is_used_B.all() else {key: each[block.is_used_B] for key, each in own.items()}
                sums = add_exactly(weights[name][place_B], used)
                if name in total:
                    for key, each in sums.items():
                        total[name][key].merge(each)
                else:
                    total[name] = sums
        return total

    def _draw_keys(self, asked: Asked) -> None:
        run, name_of, entropy = self._all.run.name, self._all.sites.names, self._all.entropy
        self._asked = asked
        self._keys = {
            number: draw_key(entropy, run, name_of[number], asked.release) for number in asked.granted.tolist()
        }

    def _train_alike(
        self, alike: Alike, asked: Asked, sites: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[_Updated]]:
        """Returns the sites that could be trained at once, and their updates."""
        solver, plan, many = self._solver, asked.plans[self._find_kind(sites)], alike.open_many(asked.heads)
        if many is None or not isinstance(solver, ManySitesSolver) or not len(sites):
            return np.empty(0, np.int64), []
        assert isinstance(plan, Plan)
        places = alike.place_S[sites]
        tasks = select_round(alike.tasks, asked.round, self._all.run.rounds)
        modules = alike.open_modules(asked.heads)
        blocks = []
        for block in many.list_blocks(places[many.fits[places]]):
            numbers = alike.sites[block]
            trained = solver.solve_each(
                modules,
                tasks,
                many,
                block,
                plan=plan,
                public_sizes=[self._list_groups(number) for number in numbers.tolist()],
                streams=[NoiseStream(self._keys[number]) for number in numbers.tolist()],
            )
            updates, sound = many.split(self._round_as_sent(trained.change_SN)), trained.sound
            if not sound.all():
                updates = {name: {key: each[sound] for key, each in own.items()} for name, own in updates.items()}
            blocks.append(_Updated(numbers[sound], updates, np.ones(int(sound.sum()), np.bool_)))
        return np.concatenate([np.empty(0, np.int64), *(block.sites for block in blocks)]), blocks

    def _train_alone(self, alike: Alike, asked: Asked, number: int) -> _Updated | None:
        """Returns a site's update as it is sent; None where its training fails."""
        try:
            delta = self._solve(alike, alike.open_modules(asked.heads), number)
        except RunFailed:
            return None
        updates = {
            name: {key: self._round_as_sent(values)[None] for key, values in own.items()}
            for name, own in delta.heads.items()
        }
        return _Updated(np.array([number]), updates, np.ones(1, np.bool_))

    def _solve(self, alike: Alike, modules: Mapping[str, nn.Module], number: int) -> Delta:
        asked = self._asked
        assert asked is not None
        plan = asked.plans[int(self._kind_S[number])]
        assert isinstance(plan, Plan)
        return self._solver.solve(
            modules,
            select_round(alike.tasks, asked.round, self._all.run.rounds),
            alike.units.select_site(int(alike.place_S[number])),
            plan=plan,
            public_sizes=self._list_groups(number),
            stream=NoiseStream(self._keys[number]),
        )

    def _check(self, block: _Updated, heads: Heads, bounds: Mapping[int, Mapping[str, float]]) -> list[Rejected]:
        """Returns the updates that the coordinator's checks reject; shapes and finite numbers are their making."""
        rejected = []
        for place in self._find_doubtful(block, bounds):
            number = int(block.sites[place])
            sizes, groups = self._all.sites.sizes[number], self._list_groups(number)
            update = {name: {key: each[place] for key, each in own.items()} for name, own in block.updates.items()}
            try:
                check_delta(
                    Delta(update),
                    select_trained_groups(heads, groups),
                    self._all.run.max_delta_norm,
                    bounds[id(sizes)],
                )
            except BadInput as error:
                rejected.append(Rejected(FIRST_NODE_ID + number, str(error)))
                block.is_used_B[place] = False
        return rejected

    def _find_doubtful(self, block: _Updated, bounds: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Returns the places of updates that may be longer than they may be; the others surely are not."""
        count = len(block.sites)
        all_B, is_short_B = np.zeros(count), np.ones(count, np.bool_)
        sizes = [id(self._all.sites.sizes[number]) for number in block.sites.tolist()]
        for name, own in block.updates.items():
            flat = [values.reshape(count, -1) for values in own.values()]
            square_B = sum(np.square(each, dtype=np.float64).sum(axis=1) for each in flat)
            limit_B = np.array([bounds[key][name] for key in sizes])
            is_short_B &= np.sqrt(square_B) <= limit_B * _NEARLY
            all_B += square_B
        is_short_B &= np.sqrt(all_B) <= self._all.run.max_delta_norm * _NEARLY
        places: list[int] = np.flatnonzero(~is_short_B).tolist()
        return places

    def _list_groups(self, number: int) -> Mapping[str, int]:
        """Returns the declared sizes of the parameter groups of a site: one mapping for sites with equal ones."""
        sizes = self._all.sites.sizes[number]
        if id(sizes) not in self._groups:
            self._groups[id(sizes)] = self._all.run.parameter_group_sizes(sizes)
        return self._groups[id(sizes)]

    def _find_kind(self, sites: NDArray[np.int64]) -> int:
        return int(self._kind_S[sites[0]]) if len(sites) else 0

    def _round_as_sent(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return messages.round_as_sent(values, self._all.run.delta_precision)

    # --- other releases ----------------------------------------------------------------------------------------------

    def evaluate(self, asked: Asked) -> dict[int, Heads]:
        """Returns the noised statistics of the held-out units of the sites that were charged."""
        self._draw_keys(asked)
        found: dict[int, Heads] = {}
        for kind, alike in enumerate(self._alike):
            own = asked.granted[self._kind_S[asked.granted] == kind]
            mechanism = asked.plans[kind]
            if alike is None or not len(own):
                continue
            assert isinstance(mechanism, Mechanism)
            streams = [NoiseStream(self._keys[number]) for number in own.tolist()]
            found |= evaluate_each(
                self._all.run,
                alike,
                asked.heads,
                own,
                offsets=asked.offsets,
                mechanism=mechanism,
                round_=asked.round,
                streams=streams,
            )
        return found

    def measure(self, asked: Asked) -> dict[int, Heads]:
        """Returns the noised sums that the run measures before its first round, of the sites that were charged."""
        self._draw_keys(asked)
        return {number: self.answer((number, asked.heads)) for number in asked.granted.tolist()}

    def answer(self, request: tuple[int, Heads]) -> Heads:
        """Returns what one site releases when it is asked by itself what the shard was asked last.

        Args:
            request: the site's number, and the heads that it was sent.
        """
        number, heads = request
        asked, kind = self._asked, int(self._kind_S[number])
        assert asked is not None
        alike, stream = self._alike[kind], NoiseStream(self._keys[number])
        assert alike is not None
        run, what = self._all.run, asked.plans[kind]
        if isinstance(what, Measurement):
            return measure_alone(run, alike, number, what, stream)
        if isinstance(what, Mechanism):
            return evaluate_alone(
                run,
                alike,
                heads,
                number,
                offsets=asked.offsets,
                mechanism=what,
                round_=asked.round,
                stream=stream,
            )
        return self._solve(alike, alike.open_modules(heads), number).heads
