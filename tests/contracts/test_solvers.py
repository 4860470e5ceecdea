"""The law of `client.solvers`, for every kind in the folder, and once more with a trunk below all heads ("KIND+trunk")
where the kind trains one.

Neighbours are two sites of which one has one unit more. Sums are read off the released delta: with one step, the heads
fixed and the divisor 1, the delta is minus the learning rate times the released sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

from client.data.quantised import QuantisedRows
from client.data.units import TaskRecords, Units
from client.solvers import Solver, SummingSolver, open_solver
from common.model.parameters import create_heads, parameters
from common.plugins import kinds, plugin_class
from common.privacy.accounting import Mechanism
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream
from common.privacy.update_norm import bound_update_norms
from common.run import Privacy, RunConfig
from common.secure_sum.terms import SumRules
from common.secure_sum.vectors import choose_lattice, flatten_whole
from common.tasks import Task, open_task
from common.types import BadInput, Delta, Plan, Unit
from common.yaml import parse
from tests.loaded import list_loaded

KINDS = kinds("client.solvers")
SUMMING = [kind for kind in KINDS if hasattr(plugin_class("client.solvers", kind), "release_whole")]
PRIVATE = [kind for kind in KINDS if plugin_class("client.solvers", kind).private]
FEATURES, DEAD = 6, 150
PRIVACY = Privacy(unit=Unit.PATIENT, delta=1e-5, noise_multiplier=0.7)
KEY = bytes(range(32))
WITH_TRUNK, TRUNK, WIDTH = "+trunk", "backbone.trunk", 8
# Task names that are also attributes of torch modules.
DEEP: dict[str, Task] = {
    "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "grade"),
    "keys": open_task({"kind": "multilabel", "labels": ["x", "y"], "scale": 3.0}, "keys"),
    "train": open_task({"kind": "regression", "range": [-1, 1], "head": {"hidden": 4}}, "train"),
}
# For kinds that refuse heads with a hidden layer.
LINEAR = {**DEEP, "train": open_task({"kind": "regression", "range": [-1, 1], "head": {"bias": False}}, "train")}


class SilentStream(NoiseStream):
    """Real coins, no noise: shows what the noise would cover."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


class CountingStream(NoiseStream):
    """A real stream that remembers what was drawn from it."""

    def __init__(self, key: bytes) -> None:
        NoiseStream.__init__(self, key)
        self.draws: list[int] = []
        self.tosses: list[np.ndarray] = []

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        self.draws.append(count)
        return NoiseStream.rounded_gaussian(self, count, log2_deviation)

    def coins(self, count: int, probability: float) -> np.ndarray:
        self.tosses.append(NoiseStream.coins(self, count, probability))
        return self.tosses[-1]


@dataclass(frozen=True)
class Person:
    """One unit: its records as (seed, absurd value or None), and for each record and task whether it has a label."""

    records: tuple[tuple[int, float | None], ...]
    labelled: tuple[bool, ...]


ABSURD = st.sampled_from(
    [None, None, None, 0.0, 1e-30, 1e6, 1e18, 1e30, 3e38, float("inf"), float("-inf"), float("nan")]
)
PEOPLE = st.builds(
    Person,
    records=st.lists(st.tuples(st.integers(0, 999), ABSURD), min_size=0, max_size=3).map(tuple),
    labelled=st.tuples(*[st.booleans()] * (3 * len(DEEP))),
)


def site(people: list[Person]) -> Units:
    """Units with `FEATURES` features, a value of which may be absurd, and `DEAD` ones that are always zero."""
    features, unit, seeds = [], [], []
    for index, person in enumerate(people):
        for seed, absurd in person.records:
            row = np.random.default_rng(seed).normal(size=FEATURES).astype(np.float32)
            if absurd is not None:
                row[seed % FEATURES] = absurd
            features.append(np.concatenate([row, np.zeros(DEAD, np.float32)]))
            unit.append(index)
            seeds.append(seed)
    # As 16-bit integers hold them, so that all kinds train on the very same numbers.
    features_RD = QuantisedRows.of(
        torch.from_numpy(np.array(features, np.float32).reshape(-1, FEATURES + DEAD))
    ).decode()
    unit_R = torch.tensor(unit, dtype=torch.long)
    tasks = {}
    for number, name in enumerate(DEEP):
        mask = [label for person in people for label in person.labelled[number :: len(DEEP)][: len(person.records)]]
        mask_R = torch.tensor(mask, dtype=torch.bool)
        tasks[name] = TaskRecords.of(features_RD, labels_for(name, seeds), mask_R, unit_R, len(people))
    return Units(len(people), tasks)


def labels_for(name: str, seeds: list[int]) -> Tensor:
    seed_R = torch.tensor(seeds, dtype=torch.long)
    if name == "grade":
        return seed_R % 3
    if name == "keys":
        return torch.stack([seed_R % 2, seed_R % 5 % 2], dim=1).float()
    return (seed_R % 7).float() / 3.5 - 1.0


def heads(tasks: dict[str, Task]) -> dict[str, nn.Module]:
    """Heads with weights that are not zero, so that every layer has a gradient."""
    made = create_heads(tasks, {name: FEATURES + DEAD for name in tasks}, seed=5)
    generator = torch.Generator().manual_seed(7)
    for head in made.values():
        for parameter in head.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def trunk_and_heads() -> dict[str, nn.Module]:
    """One trunk that all tasks' records pass, and heads on what it gives."""
    made = create_heads(DEEP, {name: WIDTH for name in DEEP}, seed=5)
    generator = torch.Generator().manual_seed(8)
    trunk = nn.Sequential(nn.Linear(FEATURES + DEAD, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    for module in (*made.values(), trunk):
        for parameter in module.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return {**made, TRUNK: trunk}


DEEP_HEADS, LINEAR_HEADS, TRUNK_HEADS = heads(DEEP), heads(LINEAR), trunk_and_heads()


def takes(kind: str, heads: dict[str, nn.Module]) -> bool:
    try:
        solver_of(kind).check_modules(heads)
    except BadInput:
        return False
    return True


def takes_deep_heads(kind: str) -> bool:
    return takes(kind, DEEP_HEADS)


def tasks_of(kind: str) -> dict[str, Task]:
    return DEEP if takes_deep_heads(kind) else LINEAR


def heads_of(kind: str) -> dict[str, nn.Module]:
    if kind.endswith(WITH_TRUNK):
        return TRUNK_HEADS
    return DEEP_HEADS if takes_deep_heads(kind) else LINEAR_HEADS


def solver_of(kind: str) -> Solver:
    return open_solver(example_of(kind), "solver")


def example_of(kind: str) -> dict[str, Any]:
    return plugin_class("client.solvers", kind.removesuffix(WITH_TRUNK)).example()


def rate_of(kind: str) -> float:
    """The learning rate of a kind's example; without such a setting a kind divides its sum and no more."""
    return float(example_of(kind).get("learning_rate", 1.0))


def settings_of(kind: str, **rates: Any) -> dict[str, Any]:
    """A kind's example with those of some rates that it has settings for."""
    fields = plugin_class("client.solvers", kind.removesuffix(WITH_TRUNK)).model_fields
    return {**example_of(kind), **{name: value for name, value in rates.items() if name in fields}}


def is_private(kind: str) -> bool:
    return kind.removesuffix(WITH_TRUNK) in PRIVATE


CASES = [*KINDS, *(f"{kind}{WITH_TRUNK}" for kind in KINDS if takes(kind, TRUNK_HEADS))]
PRIVATE_CASES = [kind for kind in CASES if is_private(kind)]


def plan_of(kind: str, **changes: float) -> Plan:
    private = is_private(kind)
    plan = solver_of(kind).plan(PRIVACY if private else None, Unit.PATIENT, 1)
    return replace(plan, **changes)


def solve(
    kind: str, units: Units, plan: Plan, stream: NoiseStream, public_size: int = 1, solver: Solver | None = None
) -> Delta:
    tasks, heads = tasks_of(kind), heads_of(kind)
    if kind.endswith(WITH_TRUNK):
        units = replace(units, tasks={name: replace(own, trunk=TRUNK) for name, own in units.tasks.items()})
    return (solver or solver_of(kind)).solve(
        heads, tasks, units, plan=plan, public_sizes=dict.fromkeys(heads, public_size), stream=stream
    )


def released_sum(kind: str, units: Units, plan: Plan, public_size: int) -> np.ndarray:
    """All heads' sum of one step as one vector."""
    delta = solve(kind, units, plan, SilentStream(KEY), public_size)
    divisor = plan.sampling_rate * public_size / rate_of(kind)
    return -divisor * flat(delta)


def flat(delta: Delta) -> np.ndarray:
    arrays = [delta.heads[task][name] for task in sorted(delta.heads) for name in sorted(delta.heads[task])]
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float64)


def dead_weights(delta: Delta) -> np.ndarray:
    """Changes of weights that no record touches, one row for each output: noise and nothing else."""
    values = [value for head in delta.heads.values() for value in head.values()]
    grids = [value for value in values if value.ndim == 2 and value.shape[1] == FEATURES + DEAD]
    assert len(grids) == (1 if TRUNK in delta.heads else len(DEEP))
    return np.concatenate([grid[:, FEATURES:] for grid in grids]).astype(np.float64)


def has_scale(values: np.ndarray, std: float) -> bool:
    """Whether values may come from N(0, std^2): chi-square, both tails, false alarm once in a million."""
    tail = chi2.cdf(np.sum((values / std) ** 2), values.size)
    return 5e-7 < tail < 1 - 5e-7


def are_poisson(counts: np.ndarray, trials: int, rate: float) -> bool:
    """Whether counts may be Binomial(trials, rate), one for each unit: dispersion, both tails."""
    tail = chi2.cdf(np.sum((counts - trials * rate) ** 2) / (trials * rate * (1 - rate)), len(counts))
    return 5e-7 < tail < 1 - 5e-7


SOME = [Person(((seed, None), (seed + 1, None))[: 1 + seed % 2], (True,) * 9) for seed in range(12)]


# --- privacy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRIVATE_CASES)
@settings(max_examples=60, deadline=None)
@given(
    people=st.lists(PEOPLE, max_size=4),
    more=PEOPLE,
    clip_norm=st.sampled_from([0.5, 4.0]),
    rate=st.sampled_from([1.0, 0.5]),
)
def test_one_unit_more_moves_the_released_sum_by_at_most_the_clip_norm(
    kind: str, people: list[Person], more: Person, clip_norm: float, rate: float
) -> None:
    plan = plan_of(kind, steps=1, sampling_rate=rate, clip_norm=clip_norm)
    size = round(1 / rate)
    # The unit is the last one, so that its neighbours' coins are the same.
    moved = released_sum(kind, site([*people, more]), plan, size) - released_sum(kind, site(people), plan, size)
    assert np.linalg.norm(moved) <= clip_norm * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("kind", PRIVATE_CASES)
def test_one_ordinary_unit_with_all_tasks_uses_the_whole_clip_norm(kind: str) -> None:
    """The bound above is not kept by releasing nothing."""
    plan = plan_of(kind, steps=1, sampling_rate=1.0, clip_norm=0.5)
    moved = released_sum(kind, site(SOME[:1]), plan, 1)
    assert np.linalg.norm(moved) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("kind", PRIVATE_CASES)
@pytest.mark.parametrize("people", [[], SOME], ids=["empty", "some"])
def test_noise_has_the_claimed_scale_where_no_record_reaches(kind: str, people: list[Person]) -> None:
    plan = plan_of(kind, steps=4, sampling_rate=0.5, clip_norm=0.3)
    delta = solve(kind, site(people), plan, NoiseStream(KEY), public_size=2)
    noise = dead_weights(delta) / rate_of(kind)
    claimed = plan.noise_multiplier * 0.3 * np.sqrt(plan.steps)
    assert has_scale(noise, claimed)
    assert not has_scale(noise, claimed * 2 / 3)
    assert not has_scale(noise, claimed * 3 / 2)


@pytest.mark.parametrize("kind", PRIVATE_CASES)
def test_every_class_task_and_weight_has_noise_of_its_own(kind: str) -> None:
    plan = plan_of(kind, steps=2, sampling_rate=1.0)
    noise = dead_weights(solve(kind, site(SOME), plan, NoiseStream(KEY)))
    between_rows = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(between_rows).max() < 5 / np.sqrt(DEAD)
    flattened = noise.ravel()
    assert abs(np.corrcoef(flattened[:-1], flattened[1:])[0, 1]) < 5 / np.sqrt(flattened.size)


@pytest.mark.parametrize("kind", PRIVATE_CASES)
@pytest.mark.parametrize("people", [[], SOME], ids=["empty", "some"])
def test_the_accounted_mechanism_is_the_one_that_ran(kind: str, people: list[Person]) -> None:
    plan = plan_of(kind, sampling_rate=0.1)
    stream = CountingStream(KEY)
    solve(kind, site(people), plan, stream)
    accounted = Mechanism.of(plan)
    weights = sum(parameter.numel() for head in heads_of(kind).values() for parameter in head.parameters())
    assert stream.draws == [weights] * accounted.steps
    assert accounted.noise_multiplier == plan.noise_multiplier == PRIVACY.noise_multiplier
    assert accounted.sensitivity == plan.clip_norm
    assert accounted.sampling_rate == plan.sampling_rate


@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize("rounds", [1, 12])
def test_all_rounds_of_a_plan_for_a_target_together_cost_the_target(kind: str, rounds: int) -> None:
    """By dp_accounting, which this project does not account with."""
    asked = Privacy(unit=Unit.PATIENT, delta=1e-5, target_epsilon=3.0)
    plan = solver_of(kind).plan(asked, Unit.PATIENT, rounds)
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    if plan.sampling_rate < 1.0:
        event = dp_accounting.PoissonSampledDpEvent(plan.sampling_rate, event)
    oracle = PLDAccountant()
    oracle.compose(dp_accounting.SelfComposedDpEvent(event, rounds * plan.steps))
    # Noise of sampled steps is solved for with Renyi orders, which count up to 13 % more.
    assert 3.0 * (0.85 if plan.sampling_rate < 1.0 else 0.99) < oracle.get_epsilon(1e-5) < 3.0 * 1.003


LIKE = Person(((3, None),), (True,) * 9)
"""Units that are all the same, so that their gradients point in one direction."""


def bounded_run(kind: str, noise_multiplier: float, **solver: Any) -> RunConfig:
    """The run whose coordinator bounds the updates of this kind."""
    tasks = {name: task.model_dump(mode="json", by_alias=True) for name, task in tasks_of(kind).items()}  # type: ignore[attr-defined]
    values: dict[str, Any] = {
        "name": "bounded",
        "seed": 0,
        "rounds": 1,
        "backbone": {"kind": "identity", "dim": FEATURES + DEAD},
        "tasks": tasks,
        "solver": settings_of(kind, **solver),
        "privacy": {**PRIVACY.model_dump(), "noise_multiplier": noise_multiplier},
        "aggregation": {"kind": "mean"},
    }
    if kind.endswith(WITH_TRUNK):
        values["solver"]["trunk"] = {"learning_rate": 0.3, "weight_decay": 0.1}
        values["trainable"] = {"backbone": {"from": "input"}}
    return parse(RunConfig, values, base=Path.cwd())


def compare_with_bounds(kind: str, run: RunConfig, people: list[Person], public_size: int, key: int) -> list[float]:
    """Returns each parameter group's change as a part of what the coordinator allows."""
    solver = open_solver(run.solver, "solver")
    plan = solver.plan(run.requested_privacy, Unit.PATIENT, 1)
    delta = solve(kind, site(people), plan, NoiseStream(bytes([key]) * 32), public_size, solver)
    sent = {name: parameters(module) for name, module in heads_of(kind).items()}
    allowed = bound_update_norms(run, dict.fromkeys(run.tasks, public_size), sent)
    return [float(np.linalg.norm(flat(Delta({name: delta.heads[name]})))) / allowed[name] for name in sent]


@pytest.mark.parametrize("kind", PRIVATE_CASES)
@pytest.mark.parametrize(("noise_multiplier", "rate"), [(0.01, 1.0), (30.0, 0.2)])
def test_the_coordinator_allows_every_update_whatever_the_records_and_the_noise(
    kind: str, noise_multiplier: float, rate: float
) -> None:
    rates: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05, "steps": 3, "sampling_rate": rate}
    run = bounded_run(kind, noise_multiplier, **rates, tasks={"keys": {"learning_rate": 0.1}})
    # At the worst half the true number is declared, and all agree.
    for people, public_size in (([LIKE] * 16, 8), (SOME, 12)):
        for key in range(6):
            assert max(compare_with_bounds(kind, run, people, public_size, key)) <= 1.0


@pytest.mark.parametrize("kind", PRIVATE_CASES)
def test_what_the_coordinator_allows_is_near_what_units_that_agree_and_noise_reach(kind: str) -> None:
    """The bound above is not kept by allowing everything."""
    agreeing = bounded_run(kind, 0.01, sampling_rate=1.0, steps=2, learning_rate=0.01)
    assert max(compare_with_bounds(kind, agreeing, [LIKE] * 16, 8, 1)) > 0.4
    noisy = bounded_run(kind, 100.0, sampling_rate=1.0, steps=2)
    assert max(compare_with_bounds(kind, noisy, [LIKE] * 16, 8, 1)) > 0.5


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_private_kind_declines_a_run_without_privacy(kind: str) -> None:
    with pytest.raises(BadInput, match="privacy"):
        solver_of(kind).plan(None, Unit.EXAMPLE, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PRIVATE])
def test_a_kind_without_privacy_declines_a_private_run_and_says_none(kind: str) -> None:
    with pytest.raises(BadInput, match="privacy"):
        solver_of(kind).plan(PRIVACY, Unit.EXAMPLE, 1)
    assert Mechanism.of(plan_of(kind)).kind == "none"


@pytest.mark.parametrize("kind", CASES)
def test_without_clipping_and_noise_a_kind_trains_like_the_solver_it_names(kind: str) -> None:
    """With all of its rates: of the heads, of one task's head and, where it trains one, of a trunk."""
    of_one = {"keys": {"learning_rate": 0.02, "weight_decay": 0.3}}
    settings = settings_of(kind, momentum=0.5, weight_decay=0.01, tasks=of_one)
    if kind.endswith(WITH_TRUNK):
        settings["trunk"] = {"learning_rate": 0.003, "weight_decay": 0.1}
    solver, plan = open_solver(settings, "solver"), plan_of(kind)
    if "sampling_rate" in settings:
        plan = replace(plan, sampling_rate=0.5)
    if plan.private:
        plan = replace(plan, clip_norm=64.0)  # Above every norm; the stream is silent.
    other = solver.without_privacy()
    plain = other.plan(None, plan.unit, 1)
    assert not other.private and (plain.sampling_rate, plain.steps) == (plan.sampling_rate, plan.steps)
    expected = flat(solve(kind, site(SOME), plan, SilentStream(KEY), solver=solver, public_size=12))
    got = flat(solve(kind, site(SOME), plain, SilentStream(KEY), solver=other, public_size=12))
    assert got == pytest.approx(expected, abs=1e-5)


# --- every kind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_units_take_part_by_independent_coins_of_the_plans_rate(kind: str) -> None:
    stream = CountingStream(KEY)
    steps, units = 60, 40
    plan = plan_of(kind, steps=steps, sampling_rate=0.25)
    solve(kind, site([Person((), (False,) * 9)] * units), plan, stream)
    counts = np.array(stream.tosses).sum(axis=0)
    assert are_poisson(counts, steps, 0.25)
    shuffled = np.full(units, steps * 0.25)  # Fixed batches of shuffled units: each takes part equally often.
    assert not are_poisson(shuffled, steps, 0.25)


@pytest.mark.parametrize("kind", CASES)
def test_a_coin_decides_whether_a_unit_moves_the_heads(kind: str) -> None:
    plan = plan_of(kind, steps=1, sampling_rate=0.5)
    coins = NoiseStream(KEY).coins(len(SOME), 0.5)
    sampled = [person for person, coin in zip(SOME, coins, strict=True) if coin]
    everyone = replace(plan, sampling_rate=1.0)
    assert 0 < len(sampled) < len(SOME)
    assert released_sum(kind, site(SOME), plan, 2) == pytest.approx(
        released_sum(kind, site(sampled), everyone, 1), abs=1e-5
    )


def release_whole(kind: str, people: list[Person], lattice: Lattice, stream: NoiseStream) -> np.ndarray:
    solver = solver_of(kind)
    assert isinstance(solver, SummingSolver)
    whole = solver.release_whole(
        heads_of(kind), tasks_of(kind), site(people), plan=plan_of(kind), lattice=lattice, stream=stream
    )
    return flatten_whole(whole)


@pytest.mark.parametrize("kind", SUMMING)
def test_whole_sums_are_the_update_before_it_is_divided(kind: str) -> None:
    plan = plan_of(kind)
    assert plan.clip_norm is not None
    lattice = Lattice.of(plan.clip_norm, plan.noise_multiplier)
    whole = release_whole(kind, SOME, lattice, NoiseStream(KEY))
    update = flat(solve(kind, site(SOME), plan, NoiseStream(KEY), public_size=8))
    assert np.array_equal((whole * (-lattice.spacing / 8)).astype(np.float32), update.astype(np.float32))


@pytest.mark.parametrize("kind", SUMMING)
@settings(max_examples=20, deadline=None)
@given(people=st.lists(PEOPLE, max_size=4), more=PEOPLE)
def test_one_unit_more_moves_a_whole_sum_by_at_most_the_lattices_bound(
    kind: str, people: list[Person], more: Person
) -> None:
    """In Python's integers: on the coarser lattice of a secure sum too, with no tolerance."""
    lattice = choose_lattice(plan_of(kind), SumRules(5, 1))
    one = release_whole(kind, people, lattice, SilentStream(KEY))
    two = release_whole(kind, [*people, more], lattice, SilentStream(KEY))
    alone = release_whole(kind, [more], lattice, SilentStream(KEY))
    assert np.array_equal(two - one, alone)
    assert sum(int(value) ** 2 for value in alone) <= int(lattice.bound) ** 2
    noise = release_whole(kind, [*people, more], lattice, NoiseStream(KEY)) - two
    # A bias is drawn after its weights, and stands before them here.
    drawn = NoiseStream(KEY).rounded_gaussian(len(two), lattice.log2_deviation)
    assert np.array_equal(np.sort(noise), np.sort(drawn))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_heads_are_accepted_by_every_kind(kind: str) -> None:
    solver_of(kind).check_modules(LINEAR_HEADS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if f"{kind}{WITH_TRUNK}" not in CASES])
def test_a_kind_that_trains_no_trunk_refuses_one_before_and_while_training(kind: str) -> None:
    assert kind in ("dp_gd", "head_sum"), "every other kind of this project trains trunks"
    for refused in (lambda: solver_of(kind).check_modules({TRUNK: nn.Linear(2, 2)}), lambda: example_with_rates(kind)):
        with pytest.raises(BadInput, match=r"no part of a backbone|solver.trunk: unknown key"):
            refused()


def example_with_rates(kind: str) -> Solver:
    return open_solver({**example_of(kind), "trunk": {"learning_rate": 0.1}}, "solver")


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_head_that_mixes_examples_is_refused_before_and_while_training(kind: str) -> None:
    mixing = {**LINEAR_HEADS, "grade": nn.Sequential(nn.Linear(FEATURES + DEAD, 3), nn.BatchNorm1d(3))}
    solver, sizes = solver_of(kind), dict.fromkeys(LINEAR, 1)
    with pytest.raises(BadInput, match="grade"):
        solver.check_modules(mixing)
    with pytest.raises(BadInput, match="grade"):
        solver.solve(mixing, LINEAR, site(SOME), plan=plan_of(kind), public_sizes=sizes, stream=NoiseStream(KEY))


@pytest.mark.parametrize("kind", CASES)
def test_equal_streams_give_equal_bits_and_other_keys_other_ones(kind: str) -> None:
    plan = plan_of(kind)
    first, again, other = (solve(kind, site(SOME), plan, NoiseStream(key)) for key in (KEY, KEY, bytes(32)))
    assert np.array_equal(flat(first), flat(again))
    assert not np.array_equal(flat(first), flat(other))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("people", [[], SOME], ids=["empty", "some"])
def test_a_delta_has_the_heads_names_shapes_and_type_and_leaves_them_alone(kind: str, people: list[Person]) -> None:
    heads = heads_of(kind)
    before = {name: parameters(head) for name, head in heads.items()}
    delta = solve(kind, site(people), plan_of(kind), NoiseStream(KEY))
    assert delta.heads.keys() == heads.keys()
    for name, head in heads.items():
        assert {key: (value.shape, value.dtype) for key, value in delta.heads[name].items()} == {
            key: (value.shape, np.float32) for key, value in before[name].items()
        }
        after = parameters(head)
        assert all(np.array_equal(after[key], value) for key, value in before[name].items())


@pytest.mark.parametrize("kind", CASES)
def test_a_missing_label_contributes_nothing_and_changes_no_weight(kind: str) -> None:
    """A patient's two equal records count like one; when one of them has no label, they count half."""
    plan = plan_of(kind, steps=1, sampling_rate=1.0)
    if plan.private:
        plan = replace(plan, clip_norm=64.0)  # Above every norm; the stream is silent.
    one = Person(((3, None),), (True,) * 9)
    both = Person(((3, None), (3, None)), (True,) * 9)
    half = Person(((3, None), (3, None)), (True,) * 3 + (False,) * 6)
    none = Person(((3, None), (3, None)), (False,) * 9)
    assert released_sum(kind, site([both]), plan, 1) == pytest.approx(
        released_sum(kind, site([one]), plan, 1), abs=1e-5
    )
    assert released_sum(kind, site([half]), plan, 1) == pytest.approx(
        released_sum(kind, site([both]), plan, 1) / 2, abs=1e-5
    )
    assert not released_sum(kind, site([none]), plan, 1).any()


@pytest.mark.parametrize("kind", CASES)
def test_the_divisor_is_the_declared_size_not_the_true_one(kind: str) -> None:
    plan = plan_of(kind, steps=1, sampling_rate=1.0)
    once = flat(solve(kind, site(SOME), plan, SilentStream(KEY), public_size=1))
    tenth = flat(solve(kind, site(SOME), plan, SilentStream(KEY), public_size=10))
    assert once == pytest.approx(10 * tenth, abs=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_records_with_features_that_are_not_finite_leave_the_heads_finite(kind: str) -> None:
    spoiled = [Person(((seed, value),), (True,) * 9) for seed, value in enumerate([float("nan"), float("inf")])]
    delta = solve(kind, site([*SOME, *spoiled]), plan_of(kind, sampling_rate=1.0), NoiseStream(KEY))
    assert np.isfinite(flat(delta)).all()


def test_planning_loads_no_torch() -> None:
    code = """
from client.solvers import open_solver
from common.run import Privacy
from common.types import Unit

def read(own):
    solver = open_solver(own, "solver")
    privacy = Privacy(unit=Unit.PATIENT, delta=1e-5, noise_multiplier=0.7) if solver.private else None
    solver.without_privacy().plan(None, Unit.PATIENT, 3), solver.plan(privacy, Unit.PATIENT, 3)
"""
    settings = {kind: dict(plugin_class("client.solvers", kind).example()) for kind in KINDS}  # type: ignore[attr-defined]
    assert list_loaded(code, settings, ("torch", "scipy", "opacus")) == {kind: [] for kind in KINDS}
