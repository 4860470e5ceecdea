"""One unit more, under heads that a coordinator chose: sums in whole numbers, and replies byte by byte.

The audit plays a coordinator that knows every other record. It asks with heads that are orthogonal to some of them, of
the largest weights a site accepts, at ties of all outputs or one step of the grid beside one, where a bias cancels a
record's output, on the grid of weights and off it, and at random; of sites with one to some seventy units, among them
absurd, empty and equal ones. Of each it compares two worlds: the site with and without one unit, at the first, a middle
or the last place. With the noise switched off the two sums must differ by exactly that unit's part (what a site of this
unit alone sums), whose squared norm is at most the squared clip norm in Python's integers.

And with minus that part as noise, both worlds release the same sum: every byte of the two replies must then be equal.

No statement here is statistical: there are no false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from client.audit.canaries import ADDED, read_label, spread_places
from client.audit.noise import InspectingStream, Integers, Released, is_whole
from client.audit.stand_ins import open_on_stand_ins
from client.data.units import TaskRecords, Units
from client.solvers import Solver
from common import messages
from common.model.parameters import MAX_ROW_NORM, create_heads
from common.model.trunks import stand_in
from common.privacy.noise import NoiseStream
from common.tasks import Task
from common.types import BadInput, Plan, RunFailed, Unit

WIDTH = 24
"""Features of a record."""

TRIES = 40
"""Comparisons of two worlds: four for each kind of heads."""

SIZES = (1, 3, 20, 63, 70)
"""Other units at the site."""

_GRID = 2.0**-24
_POOL = 90
_ABSURD = (1.0, 1.0, 1.0, 1e-20, 1e4, 1e10, 1e30, 0.0, float("inf"), float("nan"))
_SMALL = 0.04
"""Norm of small records, relative to the clip norm: they are not clipped, and so show the last bit of a slope."""


@dataclass(frozen=True)
class Audited:
    """The audited solver, and what its site takes part with.

    Attributes:
        solver: the audited solver.
        plan: plan of a round.
        tasks: the site's tasks.
        trunks: task -> name of the trunk that its records pass.
        public_sizes: parameter group -> declared number of units.
    """

    solver: Solver
    plan: Plan
    tasks: Mapping[str, Task]
    trunks: Mapping[str, str]
    public_sizes: Mapping[str, int]

    @property
    def feature_dims(self) -> dict[str, int]:
        """Task -> number of features that its head reads."""
        return {name: WIDTH + ADDED * (name in self.trunks) for name in self.tasks}

    def open_tasks(self) -> Audited:
        """Returns the same with tasks that need no backbone (`stand_ins`)."""
        return replace(self, tasks=open_on_stand_ins(self.tasks, self.feature_dims))


@dataclass(frozen=True)
class Person:
    """A unit of the search: the same records wherever it stands.

    Attributes:
        features_RD: float32, its records.
        labels: task -> their labels.
        masks: task -> whether each has a label.
    """

    features_RD: Tensor
    labels: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """A request's outcome in one world.

    Attributes:
        sums: the exact sums that were released.
        reply: bytes of the reply, in both precisions; the kind of the error where there was one.
    """

    sums: Sequence[Released]
    reply: tuple[bytes, ...] | str


@dataclass(frozen=True)
class TwoWorlds:
    """Two worlds under one head.

    Attributes:
        heads: the heads in words.
        others: number of other units.
        alone: a site of the unit alone.
        without: the other units.
        together: all of them, with minus the unit's part as noise.
    """

    heads: str
    others: int
    alone: Answer
    without: Answer
    together: Answer


def answer(run: Audited, modules: Mapping[str, nn.Module], units: Units, noise: Integers | None = None) -> Answer:
    """Returns a site's answer to a request for one step, with known noise or none.

    Args:
        run: the audited solver.
        modules: parameter group -> head or trunk, as the coordinator sent it.
        units: the site's units.
        noise: what to add to the sum.
    """
    stream = InspectingStream(known=noise)
    plan = replace(run.plan, steps=1)
    try:
        update = run.solver.solve(modules, run.tasks, units, plan=plan, public_sizes=run.public_sizes, stream=stream)
    except (BadInput, RunFailed) as error:
        return Answer(stream.seen, type(error).__name__)
    replies = [messages.TrainReply(update, plan, precision) for precision in ("float32", "float16")]
    return Answer(stream.seen, tuple(messages.to_bytes(messages.encode(reply)) for reply in replies))


def make_modules(run: Audited) -> dict[str, nn.Module]:
    """Returns untrained heads and stand-in trunks."""
    return {
        **create_heads(run.tasks, run.feature_dims, seed=0),
        **{name: stand_in(WIDTH, ADDED) for name in sorted(set(run.trunks.values()))},
    }


def compare_worlds(run: Audited, stream: NoiseStream) -> Iterator[TwoWorlds]:
    """Yields comparisons of two worlds, each under other heads.

    Args:
        run: the audited solver.
        stream: source of records and heads.
    """
    random = np.random.default_rng(int(stream.uniform(1)[0] * 2**53))
    modules = make_modules(run)
    people = [_make_person(run, modules, random) for _ in range(_POOL)]
    for number in range(TRIES):
        others = [people[index] for index in random.permutation(_POOL - 1)[: SIZES[number % len(SIZES)]]]
        if number % 3 == 2:
            others[len(others) // 2 :] = [others[0]] * (len(others) - len(others) // 2)
        more = others[0] if number % 7 == 6 else people[int(random.integers(_POOL))]
        words = _choose_weights(modules, others, number, random)
        place = (0, len(others) // 2, len(others))[number % 3]
        alone = answer(run, modules, gather(run, [more]))
        part = join_sums(alone.sums).numpy() if alone.sums else None
        yield TwoWorlds(
            words,
            len(others),
            alone,
            without=answer(run, modules, gather(run, others)),
            together=answer(
                run, modules, gather(run, [*others[:place], more, *others[place:]]), None if part is None else -part
            ),
        )


def judge_worlds(plan: Plan, comparisons: Sequence[TwoWorlds]) -> Iterator[str]:
    """Yields a sentence for each way in which a unit moves more than its own part, or its part is too large."""
    for each in comparisons:
        about = f"under heads {each.heads}, at a site of {each.others} other units"
        answers = (each.alone, each.without, each.together)
        if len({one.reply if isinstance(one.reply, str) else "" for one in answers}) > 1:
            yield f"whether a request is answered depends on one unit ({about})"
            continue
        if not all(one.sums for one in answers):
            yield "a step's sum does not pass the site's stream, so that it cannot be compared with a neighbour's"
            continue
        if not all(is_whole(release.total) for one in answers for release in one.sums):
            yield "sums are not whole numbers: parts are not rounded to the lattice"
            continue
        alone, without, together = (join_sums(one.sums) for one in answers)
        if not torch.equal(together - without, alone):
            yield f"one unit more changes the sum by more than its own part ({about})"
        ratio = measure_part(each.alone.sums, plan)
        if ratio > 1:
            yield f"a unit's part has {float(ratio) ** 0.5:.6g} times the clip norm ({about})"
        if torch.equal(together - without, alone) and each.together.reply != each.without.reply:
            yield f"a reply differs in more than its noised sum where one unit is added ({about})"


def join_sums(sums: Sequence[Released]) -> Tensor:
    """Returns the sums of one step as one vector of int64."""
    return torch.cat([each.total.flatten() for each in sums]).long()


def measure_part(sums: Sequence[Released], plan: Plan) -> Fraction:
    """Returns the squared norm of a unit's part / the squared clip norm, exactly.

    The noise has a deviation of 2**m whole steps, which the plan calls noise_multiplier clip norms.
    """
    parts = [
        Fraction(sum(value**2 for value in each.total.long().flatten().tolist()), 4 ** (each.log2_deviation or 0))
        for each in sums
    ]
    return sum(parts, start=Fraction()) * Fraction(plan.noise_multiplier) ** 2


def describe_worlds(plan: Plan, comparisons: Sequence[TwoWorlds]) -> str:
    """Returns what was tried, in one sentence."""
    answered = sum(not isinstance(each.together.reply, str) for each in comparisons)
    largest = max((measure_part(each.alone.sums, plan) for each in comparisons if each.alone.sums), default=0)
    kinds = ", ".join(dict.fromkeys(each.heads for each in comparisons))
    return (
        f"{len(comparisons)} pairs of sites that differ by one unit ({answered} were answered) were compared in whole "
        f"numbers, with {min(SIZES)} to {max(SIZES)} other units, under heads {kinds}: the largest part of a unit had "
        f"{_round_down(float(largest) ** 0.5)} of the clip norm. With equal sums, replies were compared byte by byte."
    )


def _round_down(value: float) -> float:
    return math.floor(value * 1e6) / 1e6


# --- records ---------------------------------------------------------------------------------------------------------


def _make_person(run: Audited, modules: Mapping[str, nn.Module], random: np.random.Generator) -> Person:
    count = 1 if run.plan.unit is not Unit.PATIENT else int(random.choice([1, 1, 2, 3, 5, 40]))
    with np.errstate(invalid="ignore", over="ignore"):
        small = _SMALL * (run.plan.clip_norm or 1.0)
        rows = random.normal(size=(count, WIDTH)) * random.choice((*_ABSURD, *[small] * 6), size=(count, 1))
    labels = {}
    for name, task in run.tasks.items():
        num_outputs = next(reversed(list(modules[name].parameters()))).shape[0]
        shape = spread_places(task, torch.zeros(count, num_outputs)).shape
        outputs = torch.from_numpy(random.normal(size=tuple(shape))).float()
        read = [read_label(task, cells) for cells in task.codec.decode(outputs)]
        labels[name] = torch.stack([task.codec.missing() if label is None else label for label in read])
    masks = {name: torch.from_numpy(random.random(count) < 0.9) for name in run.tasks}
    return Person(torch.from_numpy(rows.astype(np.float32)), labels, masks)


def gather(run: Audited, people: Sequence[Person]) -> Units:
    """Returns a site's units."""
    features_RD = torch.cat([person.features_RD for person in people])
    unit_R = torch.cat([torch.full((len(person.features_RD),), number) for number, person in enumerate(people)])
    return Units(
        len(people),
        {
            name: TaskRecords.of(
                spread_places(run.tasks[name], features_RD),
                torch.cat([person.labels[name] for person in people]),
                torch.cat([person.masks[name] for person in people]),
                unit_R,
                len(people),
                trunk=run.trunks.get(name),
            )
            for name in run.tasks
        },
    )


# --- heads -----------------------------------------------------------------------------------------------------------


def _choose_weights(
    modules: Mapping[str, nn.Module], others: Sequence[Person], number: int, random: np.random.Generator
) -> str:
    """Writes hostile weights into the modules and returns what they are, in words.

    Args:
        modules: heads and trunks, changed in place.
        others: units that the coordinator knows.
        number: number of the try.
        random: source of the rest.
    """
    finite = [person.features_RD[0].double().numpy() for person in others if torch.isfinite(person.features_RD).all()]
    known = np.array(finite[-3:] or [np.zeros(WIDTH)])
    kinds = (
        "orthogonal to some of the records",
        "whose outputs are what some records' losses ask for",
        "of the largest weights",
        "that are zero",
        "at a tie of all outputs",
        "one step of the grid beside a tie",
        "whose bias cancels a record's output",
        "off the grid",
        "on the grid",
        "at random",
    )
    words = kinds[number % len(kinds)]
    for module in modules.values():
        layers = list(module.parameters())
        for index, parameter in enumerate(layers):
            values = random.normal(size=tuple(parameter.shape)) * random.choice([0.1, 1.0, 30.0])
            if number % len(kinds) < 2 and parameter.dim() == 2 and index == 0:
                values[:, :WIDTH] = _project_out(values[:, :WIDTH], known)
                values = _lengthen(values, 0.9 * MAX_ROW_NORM)
                if number % len(kinds) == 1:
                    targets = random.choice([-1.0, 0.0, 1.0, 1.0], size=(len(values), len(known)))
                    met = targets @ np.linalg.pinv(known.clip(-1e4, 1e4).T)
                    values[:, :WIDTH] += met.clip(-100.0, 100.0)
            elif words == "of the largest weights" and parameter.dim() == 2:
                values = _lengthen(values, MAX_ROW_NORM)
            elif words == "that are zero":
                values = np.zeros_like(values)
            elif "tie" in words:
                values = np.broadcast_to(values[:1], values.shape).copy()
                if words.startswith("one step"):
                    values = np.round(values / _GRID) * _GRID
                    values[0] += _GRID
            elif words == "whose bias cancels a record's output" and parameter.dim() == 1 and index == 1:
                first = layers[0].detach().double().numpy()
                if first.ndim == 2 and first.shape[0] == len(values):
                    values = np.clip(-first[:, :WIDTH] @ known[0], -MAX_ROW_NORM, MAX_ROW_NORM)
            elif words == "off the grid":
                values = values * 1e-6
            elif words == "on the grid":
                values = np.round(values * 16.0) / 16.0
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values).float())
    return words


def _project_out(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns rows orthogonal to the known records, as far as double precision goes."""
    norms = np.linalg.norm(known, axis=1, keepdims=True)
    unit = known / np.where(norms > 0.0, norms, 1.0)
    basis, sizes, _ = np.linalg.svd(unit.T, full_matrices=False)
    kept = basis[:, sizes > 1e-9]
    return np.asarray(values - values @ kept @ kept.T)


def _lengthen(values: np.ndarray, norm: float) -> np.ndarray:
    """Returns rows of a norm; the last bits below it, so that float32 keeps it."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(norms > 0.0, norms, 1.0) * norm * (1.0 - 1e-6))


def make_plain(run: Audited, random: np.random.Generator) -> tuple[dict[str, nn.Module], Person]:
    """Returns heads and a unit whose outputs meet its labels, as far as a head's hidden layers allow."""
    modules, labels, masks = make_modules(run), {}, {}
    count = 3 if run.plan.unit is Unit.PATIENT else 1
    direction = nn.functional.normalize(torch.from_numpy(random.normal(size=WIDTH)).float(), dim=0)
    for name, task in run.tasks.items():
        *_, weight = (parameter for parameter in modules[name].parameters() if parameter.dim() > 1)
        outputs, label = _meet_label(task, torch.from_numpy(random.normal(size=(1, len(weight)))).float())
        labels[name], masks[name] = label.expand(count, *label.shape[1:]), torch.ones(count, dtype=torch.bool)
        with torch.no_grad():
            biases = [parameter.zero_() for parameter in modules[name].parameters() if parameter.dim() == 1]
            weight.mul_(1e-3)
            if weight is next(modules[name].parameters()):
                weight[:, :WIDTH] = outputs.T * direction
            elif biases:
                biases[-1].copy_(outputs[0])
    return modules, Person(direction.expand(count, -1), labels, masks)


def _meet_label(task: Task, drawn_1K: Tensor) -> tuple[Tensor, Tensor]:
    """Returns outputs and a label with little loss, where the opposite outputs have more."""
    found: list[tuple[bool, float, Tensor, Tensor]] = []
    for outputs_1K in (torch.ones_like(drawn_1K), drawn_1K, 30.0 * drawn_1K, -torch.ones_like(drawn_1K)):
        placed = spread_places(task, outputs_1K)
        label = read_label(task, task.codec.decode(placed)[0])
        if label is None or len(found) == 3:
            continue
        loss, opposite = (float(task.losses(sign * placed, label[None]).sum()) for sign in (1.0, -1.0))
        found.append((opposite <= loss, loss, outputs_1K, label[None]))
    return min(found, key=lambda each: each[:2])[2:]
