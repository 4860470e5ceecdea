"""Runs to audit: the real parts, and the same parts with one bug planted in them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.audit.attack import AuditedRun
from client.audit.audit import compute_ledger_epsilon
from client.audit.canaries import ADDED, FREE, LIVE
from client.data.units import TaskRecords, Units
from client.solvers import Solver, open_solver
from client.solvers.parts import closed_form, compiled_step, private_step
from common.plugins import plugin_class
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.lattice import Lattice, bound_norms
from common.privacy.noise import NoiseStream, SeededEntropy
from common.run import Privacy
from common.tasks import open_task
from common.types import Delta, Plan, RunFailed, Unit

TASKS = {
    "digit": {"kind": "classification", "labels": ["a", "b", "c"]},
    "loop": {"kind": "classification", "labels": ["no", "yes"], "scale": 2.0},
}
EVERY_KIND = {
    **TASKS,
    "findings": {"kind": "multilabel", "labels": ["x", "y"], "scale": 0.5},
    "age": {"kind": "regression", "range": [0, 90], "head": {"hidden": 4}},
    "death": {"kind": "survival", "boundaries": [1, 2, 5]},
}
LINEAR = {name: {**spec, "head": {"bias": name != "loop"}} for name, spec in EVERY_KIND.items()}
ROUNDS, NUM_CANARIES, TRUNK = 4, 400, "backbone.trunk"
Noise = np.ndarray
Bend = Callable[[Noise], Noise]


def make_run(
    *,
    tasks: Mapping[str, Any] = TASKS,
    unit: Unit = Unit.EXAMPLE,
    seed: int = 0,
    target_epsilon: float = 8.0,
    num_canaries: int = NUM_CANARIES,
    **settings: Any,
) -> AuditedRun:
    """Returns the real parts with keys that repeat from test to test; `settings` are the solver's."""
    descent = {"sampling_rate": 1.0, "steps": 3, "clip_norm": 0.5, "learning_rate": 4.0}
    # Of these a kind is given those that are settings of it.
    known = plugin_class("client.solvers", settings.get("kind", "dp_sgd")).model_fields
    values = {"kind": "dp_sgd", **{key: each for key, each in descent.items() if key in known}, **settings}
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


def make_trunk_run(frozen: tuple[str, ...] = (), **changes: Any) -> AuditedRun:
    """Returns the real parts where a part of a backbone trains below all tasks but the frozen ones."""
    run = make_run(trunk={"learning_rate": 0.2, "weight_decay": 0.01}, **changes)
    trunks = {name: TRUNK for name in run.tasks if name not in frozen}
    return replace(run, trunks=trunks, public_sizes={**run.public_sizes, TRUNK: 150})


# --- solvers ---------------------------------------------------------------------------------------------------------


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
        modules: Mapping[str, nn.Module],
        tasks: Mapping[str, Any],
        units: Units,
        *,
        plan: Plan,
        public_sizes: Mapping[str, int],
        stream: NoiseStream,
    ) -> Delta:
        return self.inner.solve(
            modules,
            tasks,
            units,
            plan=self.plan_used(plan),
            public_sizes=self.sizes(public_sizes, units),
            stream=self.stream(stream),
        )


def break_solver(run: AuditedRun, kind: Callable[..., Any] = BrokenSolver, **changes: Any) -> AuditedRun:
    return replace(run, solver=kind(run.solver, **changes))


@dataclass(frozen=True)
class TaskByTask(BrokenSolver):
    """Clips each task on its own: a unit with T tasks moves the release by sqrt(T) clip norms."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        updates = {}
        for name in sorted(modules):
            one = {name: modules[name]}
            updates.update(self.inner.solve(one, {name: tasks[name]}, units.only([name]), **others).heads)
        return Delta(updates)


@dataclass(frozen=True)
class ClipsNothing(BrokenSolver):
    """Every unit whose values are numbers enters the sum with the factor 1."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        def keep(lattice: Lattice, norm_U: Tensor, slack_U: Tensor | float = 0.0) -> Tensor:
            return norm_U.isfinite().double()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled_step, "open_library", lambda: None)
            patch.setattr(Lattice, "compute_factors", keep)
            return self.inner.solve(modules, tasks, units, **others)


@dataclass(frozen=True)
class RecordByRecord(BrokenSolver):
    """Takes every record for a unit: two records of a patient, clipped and not halved, move it by two clip norms."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        split = {}
        for name, records in units.tasks.items():
            count = len(records.unit_R)
            split[name] = TaskRecords.of(
                records.features_RD, records.labels, records.mask_R, torch.arange(count), count
            )
        return self.inner.solve(modules, tasks, Units(count, split), **others)


def double_steps(plan: Plan) -> Plan:
    return plan if plan.steps == 1 else replace(plan, steps=2 * plan.steps)


def use_true_sizes(sizes: Mapping[str, int], units: Units) -> Mapping[str, int]:
    return {name: max(1, units.num_units) for name in sizes}


def use_true_trunk_size(sizes: Mapping[str, int], units: Units) -> Mapping[str, int]:
    return {**sizes, TRUNK: max(1, units.num_units)}


# --- noise -----------------------------------------------------------------------------------------------------------


class Bent(NoiseStream):
    """A stream between the site's and the solver that spoils the noise."""

    def __init__(self, inner: NoiseStream, bend: Bend) -> None:
        NoiseStream.__init__(self, bytes(32))
        self._inner, self._bend = inner, bend

    def coins(self, count: int, probability: float) -> np.ndarray:
        return self._inner.coins(count, probability)

    def inspect(self, total: Tensor, noise: np.ndarray) -> None:
        self._inner.inspect(total, noise)

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return self._bend(self._inner.rounded_gaussian(count, log2_deviation))


def bend_noise(bend: Bend) -> Callable[[NoiseStream], NoiseStream]:
    return lambda stream: Bent(stream, bend)


def seed_every_call_alike(stream: NoiseStream) -> NoiseStream:
    """A generator of the solver's own, seeded alike each time."""
    return NoiseStream(bytes(32))


def repeat_for_all_classes(noise: Noise) -> Noise:
    """The digit head's weight comes first: its first class's noise is used for all three."""
    width = LIVE + NUM_CANARIES + FREE
    if len(noise) < 3 * width:  # A head of other records than canaries.
        return noise
    copied = noise.copy()
    copied[: 3 * width] = np.tile(noise[:width], 3)
    return copied


def key_by_round(purpose: str) -> bytes:
    """A release's key follows from its round's number alone."""
    return hashlib.sha256(purpose.rsplit("/", 1)[-1].encode()).digest()


def repeat_every_16384(noise: Noise) -> Noise:
    return np.resize(noise[:16_384], noise.shape)


def repeat_first_third(noise: Noise) -> Noise:
    return np.resize(noise[: -(-len(noise) // 3)], noise.shape)


def repeat_with_other_signs(noise: Noise) -> Noise:
    """The second half is the first one backward, with its sign changed at every other value."""
    half = len(noise) // 2
    turned = noise.copy()
    turned[-half:] = np.where(np.arange(half) % 2, noise[:half], -noise[:half] - 1)[::-1]
    return turned


def leave_fractions(noise: Noise) -> Noise:
    """Noise as floating point has it: on no lattice."""
    return noise + np.random.default_rng(0).random(len(noise))


def draw_in_float32(noise: Noise) -> Noise:
    return noise.astype(np.float32).astype(np.int64)


def mix_neighbours(noise: Noise) -> Noise:
    """Variance 1, correlation 0.05 with the next value."""
    return np.rint(np.cos(0.05) * noise + np.sin(0.05) * np.roll(noise, 1)).astype(np.int64)


def share_a_part(stream: NoiseStream) -> NoiseStream:
    """A twentieth of the variance of every release is the same."""
    shared: list[Noise] = []

    def bend(noise: Noise) -> Noise:
        if not shared:
            shared.append(noise)
            return noise
        return np.rint(np.sqrt(0.95) * noise + np.sqrt(0.05) * np.resize(shared[0], noise.shape)).astype(np.int64)

    return Bent(stream, bend)


def cut_tails(noise: Noise) -> Noise:
    bound = round(3.5 * float(noise.std()))
    return noise.clip(-bound, bound)


def start_anew_somewhere(stream: NoiseStream) -> NoiseStream:
    """One key for all, and another offset in its stream each time."""
    again = NoiseStream(bytes(32))
    again.uniform(int(stream.uniform(1)[0] * 20_000))
    return Bent(stream, lambda noise: again.rounded_gaussian(len(noise), max(20, round(np.log2(noise.std())))))


def draw_once_a_round(stream: NoiseStream) -> NoiseStream:
    draws = itertools.count()
    return Bent(stream, lambda noise: noise if next(draws) == 0 else np.zeros_like(noise))


def thin_out_after_the_first_step(stream: NoiseStream) -> NoiseStream:
    """Neighbouring values share their noise: a constant passes through unchanged, but the spread is a quarter."""
    draws = itertools.count()

    def bend(noise: Noise) -> Noise:
        return (
            noise
            if next(draws) == 0
            else np.rint(np.convolve(np.pad(noise, 8, "wrap"), np.ones(17) / 17, "valid")).astype(np.int64)
        )

    return Bent(stream, bend)


def scale_trunk_noise(factor: float) -> Bend:
    """The trunk's name sorts before the tasks', so its noise is drawn first: its layer's weights and biases."""
    count = ADDED * (LIVE + NUM_CANARIES + FREE + 1)

    def bend(noise: Noise) -> Noise:
        return np.concatenate([(noise[:count] * factor).astype(noise.dtype), noise[count:]])

    return bend


def scale_random_trunk_noise(noise: Noise) -> Noise:
    """Alike where the noise is the same everywhere, as in the exact observations."""
    return noise if np.ptp(noise) == 0.0 else scale_trunk_noise(0.7)(noise)


# --- participation ---------------------------------------------------------------------------------------------------


class Sampler(NoiseStream):
    """Another way to form batches in place of the site's coins."""

    def __init__(self, inner: NoiseStream, take: Callable[[NoiseStream, int, float], np.ndarray]) -> None:
        NoiseStream.__init__(self, bytes(32))
        self._inner, self._take = inner, take

    def coins(self, count: int, probability: float) -> np.ndarray:
        return self._take(self._inner, count, probability)

    def inspect(self, total: Tensor, noise: np.ndarray) -> None:
        self._inner.inspect(total, noise)

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return self._inner.rounded_gaussian(count, log2_deviation)


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


def shuffle_epochs() -> Callable[[NoiseStream], NoiseStream]:
    seeds = itertools.count(1)
    return lambda stream: Sampler(stream, Epochs(1000 * next(seeds)))


def take_subsets_of_one_size(stream: NoiseStream) -> NoiseStream:
    """A new random subset of one size each step."""

    def take(inner: NoiseStream, count: int, probability: float) -> np.ndarray:
        return inner.uniform(count).argsort().argsort() < round(count * probability)

    return Sampler(stream, take)


def take_more_often(stream: NoiseStream) -> NoiseStream:
    return Sampler(stream, lambda inner, count, probability: inner.coins(count, 1.5 * probability))


# --- a trunk's part of a step ----------------------------------------------------------------------------------------

Clipping = Callable[[list[Tensor], list[Tensor], float], tuple[Tensor, Tensor]]
"""(trunk's gradients, heads' gradients, clip norm) -> clip factors of both."""


def clip_by(rule: Clipping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the clipping of the real optimizer by another rule."""

    class Planted(private_step.StreamOptimizer):
        def clip_and_accumulate(self) -> None:
            gradients = self.grad_samples
            of_trunk, of_heads = rule(gradients[:2], gradients[2:], self.max_grad_norm)
            for number, (total, gradient_U) in enumerate(zip(self._totals, gradients, strict=True)):
                parts = self._lattice.truncate(gradient_U, of_trunk if number < 2 else of_heads)
                total.add_(parts.sum(dim=0).long())

    monkeypatch.setattr(private_step, "StreamOptimizer", Planted)


def _factors(gradients: list[Tensor], clip_norm: float) -> Tensor:
    square_U = torch.stack([bound_norms(gradient_U.flatten(1)).square() for gradient_U in gradients]).sum(dim=0)
    return Lattice.of(clip_norm, 1.0).compute_factors(square_U.sqrt())


def clip_jointly(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    """As it should be."""
    return (_factors([*trunk, *heads], clip_norm),) * 2


def leave_trunk_out_of_norm(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    return (_factors(heads, clip_norm),) * 2


def clip_trunk_by_itself(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    return _factors(trunk, clip_norm), _factors(heads, clip_norm)


def clip_heads_only(trunk: list[Tensor], heads: list[Tensor], clip_norm: float) -> tuple[Tensor, Tensor]:
    joint = _factors([*trunk, *heads], clip_norm)
    return torch.ones_like(joint), joint


def count_for_another_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's part of the trunk's gradient counts for another patient; heads are right."""
    right = private_step.get_unit_indices

    def get_wrong_indices(group: str, batch: Units) -> Tensor:
        unit_R = right(group, batch)
        return unit_R if group in batch.tasks else unit_R.roll(1)

    monkeypatch.setattr(private_step, "get_unit_indices", get_wrong_indices)


# --- accountants -----------------------------------------------------------------------------------------------------


def forget_earlier_rounds(plan: Plan, rounds: int, delta: float) -> float:
    """A new accountant for every round shows the last round only."""
    return max(compute_ledger_epsilon(plan, 1, delta) for _ in range(rounds))


def reset_half_way(plan: Plan, rounds: int, delta: float) -> float:
    """The ledger's file was deleted after half of the rounds."""
    return compute_ledger_epsilon(plan, rounds - rounds // 2, delta)


def overwrite_hook(plan: Plan, rounds: int, delta: float) -> float:
    """Nothing reaches the accountant."""
    return compute_epsilon([], delta)


def count_one_step_a_round(plan: Plan, rounds: int, delta: float) -> float:
    """Fewer steps are accounted for than are noised."""
    return compute_ledger_epsilon(replace(plan, steps=1), rounds, delta)


def count_committed_only(plan: Plan, rounds: int, delta: float) -> float:
    """What a crash left between reserve and commit does not count."""
    return compute_epsilon([Mechanism.of(plan)] * (rounds - 1), delta)


# --- what one unit does to the others' parts -------------------------------------------------------------------------


RIGHT_PARTS = closed_form.add_clipped_parts


def forget_a_task_when_clipping(block: Mapping[str, closed_form.Inputs], *others: Any) -> None:
    """The closed form, with the first of several tasks left out of a unit's joint norm and clipped by itself."""
    first = next(iter(block), "")
    RIGHT_PARTS({name: inputs for name, inputs in block.items() if name == first}, *others)
    RIGHT_PARTS({name: inputs for name, inputs in block.items() if name != first}, *others)


def compute_outputs_in_float32(rows: Any, weight_KD: Tensor, bias_K: Tensor | None) -> Tensor:
    """A product in single precision, whose last bits depend on the number of rows."""
    values = (rows.integers.double() * rows.scale.unsqueeze(-1)).float()
    return nn.functional.linear(values, weight_KD.float(), None if bias_K is None else bias_K.float()).double()


def centre_records(units: Units) -> Units:
    """Every record loses the mean of the site's records: each part depends on all of them."""
    return replace(
        units,
        tasks={
            name: replace(records, features_RD=records.features_RD - records.features_RD.nan_to_num().mean(dim=0))
            for name, records in units.tasks.items()
        },
    )


@dataclass(frozen=True)
class OtherUnits(BrokenSolver):
    """Trains on units that are not quite the site's."""

    change: Callable[[Units], Units] = centre_records

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        return self.inner.solve(modules, tasks, self.change(units) if units.num_units else units, **others)


@dataclass(frozen=True)
class TellsTheCount(BrokenSolver):
    """The last bit of one weight of the reply is the parity of the number of units."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        heads = self.inner.solve(modules, tasks, units, **others).heads
        for head in heads.values():
            for values in head.values():
                bits = values.view(np.uint32)
                bits |= 1
                bits -= np.uint32(units.num_units % 2)
        return Delta(heads)


@dataclass(frozen=True)
class StopsAtAbsurdRecords(BrokenSolver):
    """Fails where a record holds a value that is not finite."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        if not all(bool(torch.isfinite(records.features_RD).all()) for records in units.tasks.values()):
            raise RunFailed("a record is not finite")
        return self.inner.solve(modules, tasks, units, **others)


class RoundsTheWholeSum(private_step.StreamOptimizer):
    """Clipped parts are added in floating point and rounded together."""

    def clip_and_accumulate(self) -> None:
        factor_U = _factors(self.grad_samples, self.max_grad_norm)
        for total, gradient_U in zip(self._totals, self.grad_samples, strict=True):
            scale_U = (factor_U / self._lattice.spacing).view(-1, *(1,) * (gradient_U.dim() - 1))
            total.add_((gradient_U.double() * scale_U).nan_to_num_(nan=0.0).sum(dim=0).long())


# --- time that one unit's values decide ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReturnsEarly(BrokenSolver):
    """Computes nothing where a record is huge."""

    def solve(self, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], units: Units, **others: Any) -> Delta:
        if any(bool((records.features_RD.abs() > 1e9).any()) for records in units.tasks.values()):
            raise RunFailed("a record is huge")
        return self.inner.solve(modules, tasks, units, **others)
