"""The audit against planted bugs: each is a broken part handed to the harness in place of the real one.

Two bugs of the list live outside a solver and have tests of their own: a crash between reserve and commit
(tests/client/test_ledger.py, with a killed process) and a damaged or replaced ledger (tests/client/test_chain.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers.optimizer import _mark_as_processed
from torch import Tensor, nn

from client.audit.attack import AuditedRun
from client.audit.audit import audit, audit_run, compute_ledger_epsilon
from client.audit.canaries import ADDED, FREE, LIVE, plant
from client.audit.result import AuditResult
from client.data.units import TaskRecords, Units
from client.ledger.ledger import Ledger
from client.solvers import Solver, open_solver
from client.solvers.parts import private_step
from common.privacy.accounting import Mechanism, epsilon
from common.privacy.clipping import compute_clip_factors, compute_joint_norms
from common.privacy.noise import NoiseStream, SeededEntropy
from common.run import Privacy, RunConfig
from common.tasks import open_task
from common.types import BadInput, Delta, Plan, Unit
from common.yaml import parse

TASKS = {
    "digit": {"kind": "classification", "labels": ["a", "b", "c"]},
    "loop": {"kind": "classification", "labels": ["no", "yes"], "scale": 2.0},
}
EVERY_KIND = {
    **TASKS,
    "findings": {"kind": "multilabel", "labels": ["x", "y"], "scale": 0.5},
    "age": {"kind": "regression", "range": [0, 90], "head": {"hidden": 4}},
}
ROUNDS = 4


def audited(
    *,
    tasks: Mapping[str, Any] = TASKS,
    unit: Unit = Unit.EXAMPLE,
    seed: int = 0,
    target_epsilon: float = 8.0,
    num_canaries: int = 400,
    **settings: Any,
) -> AuditedRun:
    """The real parts with keys that repeat from test to test; `settings` are the solver's."""
    values = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 3, "clip_norm": 0.5, "learning_rate": 4.0, **settings}
    solver = open_solver(values, "solver")
    privacy = Privacy(unit=unit, delta=1e-5, target_epsilon=target_epsilon)
    return AuditedRun(
        solver=solver,
        plan=solver.plan(privacy, unit, ROUNDS),
        tasks={name: open_task(spec, name) for name, spec in tasks.items()},
        public_sizes={name: 100 + 50 * number for number, name in enumerate(tasks)},
        rounds=ROUNDS,
        delta=1e-5,
        entropy=SeededEntropy(seed),
        accountant=compute_ledger_epsilon,
        num_canaries=num_canaries,
    )


def said(result: AuditResult) -> str:
    assert result.passed == (not result.reasons)
    return "; ".join(result.reasons)


# --- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_honest_solver_passes(seed: int) -> None:
    result = audit(audited(seed=seed))
    assert said(result) == ""
    assert 0.0 < result.epsilon_lower_99_9 <= result.epsilon_lower_95
    assert result.epsilon_claimed == pytest.approx(8.0, rel=1e-3)
    assert result.noise_std_ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling_rate": 0.25, "steps": 4},
        {"sampling_rate": 0.02, "steps": 10},
        {"momentum": 0.9},
        {"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 40.0},
    ],
    ids=str,
)
def test_every_kind_of_task_passes_with_patients_and_any_settings(settings: dict[str, Any]) -> None:
    result = audit(audited(tasks=EVERY_KIND, unit=Unit.PATIENT, num_canaries=200, **settings))
    assert said(result) == ""


LINEAR = {name: {**spec, "head": {"bias": name != "loop"}} for name, spec in EVERY_KIND.items()}


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_closed_form_solver_passes_and_its_planted_bugs_are_caught(unit: Unit, rate: float) -> None:
    parts = audited(tasks=LINEAR, unit=unit, kind="dp_gd", sampling_rate=rate)
    assert said(audit(parts)) == ""
    assert "times" in said(broken(parts, stream=bent(lambda noise: noise / 2)))
    unclipped = broken(parts, plan_used=unclipping)
    assert "not clipped" in said(unclipped)


def test_a_larger_claim_shows_a_larger_lower_bound() -> None:
    small, large = (audit(audited(target_epsilon=target)) for target in (1.0, 8.0))
    assert small.epsilon_lower_95 < 1.0 < large.epsilon_lower_95 < 8.0


def test_equal_keys_give_equal_findings_and_the_system_s_do_not() -> None:
    first, again = (audit(audited(num_canaries=100)) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    run = parse(RunConfig, RUN, base=Path.cwd())
    one, other = (audit_run(run, Unit.EXAMPLE, {"digit": 100}) for _ in range(2))
    assert one.noise_std_ratio != other.noise_std_ratio


# --- planted in the solver -------------------------------------------------------------------------------------------


class Bent(NoiseStream):
    """A stream between the site's and the solver that spoils the noise."""

    def __init__(self, inner: NoiseStream, bend: Callable[[np.ndarray], np.ndarray]) -> None:
        NoiseStream.__init__(self, bytes(32))
        self._inner, self._bend = inner, bend

    def coins(self, count: int, probability: float) -> np.ndarray:
        return self._inner.coins(count, probability)

    def gaussian(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._bend(self._inner.gaussian(shape))


@dataclass(frozen=True)
class BrokenSolver:
    """The real solver with one thing done to what it is given."""

    inner: Solver
    stream: Callable[[NoiseStream], NoiseStream] = lambda stream: stream
    plan_used: Callable[[Plan], Plan] = lambda plan: plan
    sizes: Callable[[Mapping[str, int], Units], Mapping[str, int]] = lambda sizes, units: sizes
    kind: str = "broken"
    private: bool = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        return self.inner.plan(privacy, unit, rounds)

    def solve(
        self,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Any],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        return self.inner.solve(
            heads,
            tasks,
            units,
            plan=self.plan_used(plan),
            public_sizes=self.sizes(public_sizes, units),
            stream=self.stream(stream),
        )


def broken(parts: AuditedRun, **changes: Any) -> AuditResult:
    return audit(replace(parts, solver=BrokenSolver(parts.solver, **changes)))


def bent(bend: Callable[[np.ndarray], np.ndarray]) -> Callable[[NoiseStream], NoiseStream]:
    return lambda stream: Bent(stream, bend)


def unclipping(plan: Plan) -> Plan:
    """The norm is a million times what is accounted for, the noise is what it should be."""
    assert plan.clip_norm is not None
    return replace(plan, clip_norm=plan.clip_norm * 1e6, noise_multiplier=plan.noise_multiplier / 1e6)


def test_halved_noise_is_caught_by_scale_and_by_epsilon() -> None:
    result = broken(audited(num_canaries=1000), stream=bent(lambda noise: noise / 2))
    assert "0.5 times" in said(result)
    assert result.noise_std_ratio == pytest.approx(0.5, rel=0.1)
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_a_tenth_too_little_noise_is_caught() -> None:
    assert "times" in said(broken(audited(), stream=bent(lambda noise: 0.9 * noise)))


def test_no_noise_is_caught() -> None:
    result = broken(audited(), stream=bent(np.zeros_like))
    assert "no noise" in said(result)
    assert result.noise_std_ratio == 0.0
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_no_clipping_is_caught() -> None:
    result = broken(audited(), plan_used=unclipping)
    assert "not clipped" in said(result)
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


@dataclass(frozen=True)
class TaskByTask:
    """Clips each task on its own: a unit with T tasks moves the release by sqrt(T) clip norms."""

    inner: Solver
    kind: str = "broken"
    private: bool = True

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {}

    def plan(self, privacy: Privacy | None, unit: Unit, rounds: int) -> Plan:
        return self.inner.plan(privacy, unit, rounds)

    def solve(
        self,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Any],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        deltas = {}
        for name in sorted(heads):
            one = {name: heads[name]}
            solved = self.inner.solve(
                one, {name: tasks[name]}, units.only([name]), plan=plan, public_sizes=public_sizes, stream=stream
            )
            deltas.update(solved.heads)
        return Delta(deltas)


def test_clipping_each_task_by_itself_is_caught() -> None:
    parts = audited(tasks=EVERY_KIND)
    result = audit(replace(parts, solver=TaskByTask(parts.solver)))
    assert "times the standard deviation" in said(result)


def test_clipping_each_record_of_a_patient_is_caught() -> None:
    """Two records of a patient, each clipped and not halved, move the release by two norms."""
    parts = audited(unit=Unit.PATIENT)
    result = audit(replace(parts, solver=RecordByRecord(parts.solver)))
    assert "times" in said(result)


@dataclass(frozen=True)
class RecordByRecord(TaskByTask):
    """Takes every record for a unit of its own."""

    def solve(
        self,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Any],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        split = {}
        for name, records in units.tasks.items():
            count = len(records.unit_R)
            split[name] = TaskRecords.of(
                records.features_RD, records.labels, records.mask_R, torch.arange(count), count
            )
        return self.inner.solve(heads, tasks, Units(count, split), plan=plan, public_sizes=public_sizes, stream=stream)


def test_one_seed_for_all_rounds_is_caught() -> None:
    assert "repeats itself from step to step" in said(audit(replace(audited(), entropy=lambda purpose: bytes(32))))


def test_one_seed_for_every_call_of_the_solver_is_caught() -> None:
    """A generator of the solver's own, seeded alike each time."""
    assert "does not come from the site's stream" in said(
        broken(audited(), stream=lambda stream: NoiseStream(bytes(32)))
    )


def test_the_same_noise_for_all_classes_is_caught() -> None:
    width = 8 + 400 + 32

    def same(noise: np.ndarray) -> np.ndarray:
        """The digit head's weight comes first: its first class's noise is used for all three."""
        copied = noise.copy()
        copied[: 3 * width] = np.tile(noise[:width], 3)
        return copied

    result = broken(audited(tasks={"digit": TASKS["digit"]}), stream=bent(same))
    assert "repeats itself from weight to weight" in said(result)
    # Softmax gradients sum to 0 over classes: along them such noise cancels.
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_noise_that_is_drawn_once_for_a_round_is_caught() -> None:
    parts = audited()

    def once(stream: NoiseStream) -> NoiseStream:
        kept: list[np.ndarray] = []

        def bend(noise: np.ndarray) -> np.ndarray:
            kept.append(noise)
            return kept[0] if len(kept) == 1 else np.zeros_like(noise)

        return Bent(stream, bend)

    assert "times what the plan says" in said(broken(parts, stream=once))


def test_noise_that_thins_out_after_the_first_step_of_a_round_is_caught() -> None:
    """Neighbouring values share their noise: a constant passes through unchanged, but the spread is a quarter."""

    def thinning(stream: NoiseStream) -> NoiseStream:
        draws = itertools.count()

        def bend(noise: np.ndarray) -> np.ndarray:
            return noise if next(draws) == 0 else np.convolve(np.pad(noise, 8, "wrap"), np.ones(17) / 17, "valid")

        return Bent(stream, bend)

    assert said(broken(audited(), stream=thinning)) == (
        "a round's noise varies less than that of as many independent steps"
    )


def test_the_true_number_of_units_as_divisor_is_caught() -> None:
    result = broken(audited(), sizes=lambda sizes, units: {name: max(1, units.num_units) for name in sizes})
    assert "true number of units" in said(result)


def test_more_steps_than_the_plan_says_are_caught() -> None:
    result = broken(audited(), plan_used=lambda plan: plan if plan.steps == 1 else replace(plan, steps=2 * plan.steps))
    assert "draws noise for 6 steps, and 3 are accounted for" in said(result)


# --- planted in a trunk's part of a step -----------------------------------------------------------------------------

TRUNK = "backbone.trunk"


def on_a_trunk(frozen: tuple[str, ...] = (), **changes: Any) -> AuditedRun:
    """The real parts where a part of a backbone trains below all tasks but the frozen ones."""
    parts = audited(trunk={"learning_rate": 0.2, "weight_decay": 0.01}, **changes)
    trunks = {name: TRUNK for name in parts.tasks if name not in frozen}
    return replace(parts, trunks=trunks, public_sizes={**parts.public_sizes, TRUNK: 150})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampling_rate": 0.25, "steps": 4},
        {"sampling_rate": 0.02, "steps": 10},
        {"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 40.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", list(Unit))
def test_a_run_that_trains_a_trunk_passes(unit: Unit, settings: dict[str, Any]) -> None:
    result = audit(on_a_trunk(("loop",), tasks=EVERY_KIND, unit=unit, num_canaries=200, **settings))
    assert said(result) == ""
    assert result.noise_std_ratio == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("unit", list(Unit))
def test_canaries_reach_a_trunk_as_much_as_the_heads(unit: Unit) -> None:
    parts = on_a_trunk()
    planted = plant(parts.tasks, parts.trunks, unit=unit, clip_norm=0.5, num_canaries=50, stream=NoiseStream(bytes(32)))
    share_M = (planted.direction[TRUNK] ** 2).sum(axis=0)
    whole_M = sum((direction**2).sum(axis=0) for direction in planted.direction.values())
    assert np.allclose(whole_M, 1.0)
    assert share_M.min() > 0.1 and share_M.max() < 0.9


def of_the_trunk(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """The trunk's name sorts before the tasks', so its noise is drawn first: its layer's weights and biases."""
    own = ADDED * (LIVE + 400 + FREE + 1)

    def bend(noise: np.ndarray) -> np.ndarray:
        scaled = noise.copy()
        scaled[:own] *= factor
        return scaled

    return bend


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9])
def test_too_little_noise_on_a_trunk_is_caught(factor: float) -> None:
    result = broken(on_a_trunk(), stream=bent(of_the_trunk(factor)))
    assert "a step's noise, relative to a unit's part" in said(result)
    if factor == 0.0:
        assert result.epsilon_lower_99_9 > result.epsilon_claimed
    if factor < 0.9:
        assert "times the standard deviation" in said(result)
    rows = np.array([ADDED, 3 + 2])  # Of the trunk's layer; of a head for three labels and one for two.
    assert result.noise_std_ratio == pytest.approx(np.sqrt(rows @ [factor**2, 1.0] / rows.sum()), rel=0.03)


def test_too_little_noise_on_a_trunk_does_not_drown_in_a_large_head() -> None:
    """A sixteenth of the rows with noise of 0.7: all together would still pass."""
    many = {"kind": "classification", "labels": [f"c{number}" for number in range(60)]}

    def thinner(noise: np.ndarray) -> np.ndarray:
        """Alike where the noise is the same everywhere, as in the exact checks."""
        return noise if np.ptp(noise) == 0.0 else of_the_trunk(0.7)(noise)

    result = broken(on_a_trunk(tasks={"c": many}), stream=bent(thinner))
    assert "released noise of backbone.trunk has 0." in said(result)


def clipping(how: Callable[[list[Tensor], list[Tensor], float], tuple[Tensor, Tensor]]) -> type[Any]:
    """The real optimizer with another rule: (trunk's gradients, heads', clip norm) -> factors of both."""

    class Planted(private_step.StreamOptimizer):
        def clip_and_accumulate(self) -> None:
            gradients = self.grad_samples
            of_trunk, of_heads = how(gradients[:2], gradients[2:], self.max_grad_norm)
            for number, parameter in enumerate(self.params):
                part = torch.einsum("u,u...", of_trunk if number < 2 else of_heads, gradients[number])
                parameter.summed_grad = part if parameter.summed_grad is None else parameter.summed_grad + part
                _mark_as_processed(parameter.grad_sample)

    return Planted


def factors(gradients: list[Tensor], clip_norm: float) -> Tensor:
    return compute_clip_factors(compute_joint_norms(gradients).double(), clip_norm)


def jointly(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    """As it should be."""
    return (factors([*trunk, *heads], clip_norm),) * 2


def by_heads_alone(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    """The trunk is left out of the norm."""
    return (factors(heads, clip_norm),) * 2


def each_alone(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    """A trunk moves by a clip norm of its own."""
    return factors(trunk, clip_norm), factors(heads, clip_norm)


def heads_only(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    """The trunk is not clipped at all."""
    joint = factors([*trunk, *heads], clip_norm)
    return torch.ones_like(joint), joint


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("how", [jointly, by_heads_alone, each_alone, heads_only])
def test_a_trunk_that_is_not_clipped_jointly_is_caught(
    how: Callable[..., tuple[Tensor, Tensor]], unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_step, "StreamOptimizer", clipping(how))
    result = audit(on_a_trunk(unit=unit))
    if how is jointly:
        assert said(result) == ""
        return
    assert "a step's noise, relative to a unit's part" in said(result)
    assert "times the standard deviation" in said(result) and result.noise_std_ratio < 0.95
    if how is heads_only:
        assert "not clipped" in said(result)


def test_a_trunk_that_is_not_clipped_is_refuted_by_canaries_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_step, "StreamOptimizer", clipping(heads_only))
    result = audit(on_a_trunk(num_canaries=1000))
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def miscount(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's part of the trunk's gradient counts for another patient; heads are right."""
    right = private_step.get_unit_indices

    def wrong(entry: str, batch: Units) -> Tensor:
        unit_R = right(entry, batch)
        return unit_R if entry in batch.tasks else unit_R.roll(1)

    monkeypatch.setattr(private_step, "get_unit_indices", wrong)


def test_records_of_a_trunk_that_count_for_another_patient_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a patient's trunk gradient is then clipped with another's heads."""
    miscount(monkeypatch)
    result = audit(on_a_trunk(unit=Unit.PATIENT))
    assert "times" in said(result)


def test_the_true_number_of_units_as_divisor_of_a_trunk_is_caught() -> None:
    result = broken(on_a_trunk(), sizes=lambda sizes, units: {**sizes, TRUNK: max(1, units.num_units)})
    assert "true number of units" in said(result)


# --- planted in the sampler ------------------------------------------------------------------------------------------


class Sampler(NoiseStream):
    """Another way to form batches in place of the site's coins."""

    def __init__(self, inner: NoiseStream, take: Callable[[NoiseStream, int, float], np.ndarray]) -> None:
        NoiseStream.__init__(self, bytes(32))
        self._inner, self._take = inner, take

    def coins(self, count: int, probability: float) -> np.ndarray:
        return self._take(self._inner, count, probability)

    def gaussian(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._inner.gaussian(shape)


@dataclass
class Epochs:
    """Shuffles once per epoch and walks through the batches."""

    seed: int
    order: list[int] = field(default_factory=list)

    def __call__(self, stream: NoiseStream, count: int, probability: float) -> np.ndarray:
        self.seed += 1
        if not self.order:
            self.order = list(np.random.default_rng(self.seed).permutation(count))
        size = round(count * probability)
        taken, self.order = self.order[:size], self.order[size:]
        return np.isin(np.arange(count), taken)


def fixed_size(stream: NoiseStream, count: int, probability: float) -> np.ndarray:
    """A new random subset of one size each step."""
    ranks = stream.uniform(count).argsort().argsort()
    return ranks < round(count * probability)


@pytest.mark.parametrize("bug", ["shuffled epochs", "subsets of one size"])
def test_batches_that_are_not_poisson_are_caught(bug: str) -> None:
    seeds = itertools.count(1)

    def stream(inner: NoiseStream) -> NoiseStream:
        return Sampler(inner, Epochs(1000 * next(seeds)) if bug == "shuffled epochs" else fixed_size)

    result = broken(audited(sampling_rate=0.25, steps=4), stream=stream)
    assert "does not vary as with Poisson sampling" in said(result)


def test_a_higher_rate_than_is_accounted_for_is_caught() -> None:
    def often(stream: NoiseStream, count: int, probability: float) -> np.ndarray:
        return stream.coins(count, 1.5 * probability)

    result = broken(audited(sampling_rate=0.25, steps=4), stream=lambda inner: Sampler(inner, often))
    assert "and 0.25 is accounted for" in said(result)


# --- planted in the accountant ---------------------------------------------------------------------------------------


def fresh_each_round(plan: Plan, rounds: int, delta: float) -> float:
    """A new accountant for every round shows the last round only."""
    return max(compute_ledger_epsilon(plan, 1, delta) for _ in range(rounds))


def reset_half_way(plan: Plan, rounds: int, delta: float) -> float:
    """The ledger's file was deleted after half of the rounds."""
    return compute_ledger_epsilon(plan, rounds - rounds // 2, delta)


def hook_overwritten(plan: Plan, rounds: int, delta: float) -> float:
    """Nothing reaches the accountant."""
    return epsilon([], delta)


def one_step_a_round(plan: Plan, rounds: int, delta: float) -> float:
    """Fewer steps are accounted for than are noised."""
    return compute_ledger_epsilon(replace(plan, steps=1), rounds, delta)


def committed_only(plan: Plan, rounds: int, delta: float) -> float:
    """What a crash left between reserve and commit does not count."""
    return epsilon([Mechanism.of(plan)] * (rounds - 1), delta)


@pytest.mark.parametrize(
    "accountant", [fresh_each_round, reset_half_way, hook_overwritten, one_step_a_round, committed_only]
)
def test_an_accountant_that_forgets_is_caught(accountant: Callable[[Plan, int, float], float]) -> None:
    assert "when composed" in said(audit(replace(audited(num_canaries=100), accountant=accountant)))


def test_a_fresh_accountant_each_round_is_caught_with_sampling_too() -> None:
    parts = audited(sampling_rate=0.25, num_canaries=100)
    assert "when composed" in said(audit(replace(parts, accountant=fresh_each_round)))


def test_a_fresh_accountant_each_round_is_refuted_by_canaries_alone() -> None:
    result = audit(replace(audited(num_canaries=1000), accountant=fresh_each_round))
    assert result.epsilon_lower_99_9 > result.epsilon_claimed


def test_the_claim_is_what_a_real_ledger_composes(tmp_path: Path) -> None:
    plan = audited().plan
    ledger = Ledger.open(tmp_path, registry="r", unit=Unit.EXAMPLE, epsilon_cap=100.0, delta=1e-5)
    for round_ in range(25):
        ledger.commit(ledger.reserve(Mechanism.of(plan), run="run", round=round_, request=""))
    assert compute_ledger_epsilon(plan, 25, 1e-5) == pytest.approx(ledger.spent().spent_epsilon, rel=1e-12)


# --- a run file ------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "name": "audited",
    "seed": 1,
    "rounds": 2,
    "backbone": {"kind": "identity", "dim": 4},
    "tasks": TASKS,
    "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
    "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0},
    "aggregation": {"kind": "mean"},
}


def test_a_run_is_audited_with_the_tasks_and_the_delta_of_the_site() -> None:
    run = parse(RunConfig, RUN, base=Path.cwd())
    result = audit_run(run, Unit.EXAMPLE, {"loop": 80}, delta=1e-6, entropy=SeededEntropy(3))
    assert said(result) == ""
    plan = open_solver(run.solver, "solver").plan(Privacy(**RUN["privacy"]), Unit.EXAMPLE, 2)
    assert result.epsilon_claimed == pytest.approx(epsilon([Mechanism.of(plan)] * 2, 1e-6))
    assert {"epsilon_claimed", "epsilon_lower_95", "epsilon_lower_99_9", "noise_std_ratio", "passed"} <= set(
        result.to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"privacy": "non_private"}, {"loop": 80}, "promises nothing"),
        ({}, {"else": 80}, "at least one task"),
    ],
)
def test_a_run_that_cannot_be_audited_is_refused(changes: dict[str, Any], sizes: dict[str, int], message: str) -> None:
    run = parse(RunConfig, {**RUN, **changes}, base=Path.cwd())
    with pytest.raises(BadInput, match=message):
        audit_run(run, Unit.EXAMPLE, sizes)


def test_a_run_with_a_part_of_a_backbone_that_trains_is_audited_through_a_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {
        "backbone": {"kind": "small_cnn", "input_size": 12, "channels": [4, 8], "pool": 2},
        "trainable": {"backbone": {"from": "input"}},
        "solver": {**RUN["solver"], "trunk": {"learning_rate": 0.1}},
    }
    run = parse(RunConfig, {**RUN, **changes}, base=Path.cwd())
    sizes = {"loop": 80, "digit": 60}
    assert said(audit_run(run, Unit.PATIENT, sizes, entropy=SeededEntropy(3))) == ""
    miscount(monkeypatch)
    assert "a step's noise" in said(audit_run(run, Unit.PATIENT, sizes, entropy=SeededEntropy(3)))
