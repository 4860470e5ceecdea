"""Observations of an audit: updates that the audited solver releases for a site with planted records.

The auditor plays a coordinator that knows everything but the noise and which canaries the site holds. Everything is
measured relative to what one clipped unit moves, so that neither learning rates nor divisors need to be known: noise is
right if it is `noise_multiplier` times the largest part of a unit in the release.

Observed are, in this order:
1. one step with known noise, of sites with no, one and several units (`observe_step`);
2. one whole round with known noise, and one with the site's own (`observe_round`);
3. who takes part in steps and rounds without noise (`observe_participation`);
4. all steps of the run, of a site that holds each canary with probability 1/2 (`observe_run`).

Nothing is decided here; `client/audit/audit.py` compares these observations with the claim.

# Shapes: S steps, M canaries, W rows of the first weights of all parameter groups together, F free features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from client.audit.canaries import Planted
from client.audit.statistics import Bools, Canaries, Floats, score_canaries
from client.data.units import Units
from client.solvers import Solver
from common.privacy.noise import KEY_BYTES, Entropy, NoiseStream
from common.tasks import Task
from common.types import Plan, RunFailed

Accountant = Callable[[Plan, int, float], float]
"""(plan of a round, number of rounds, delta) -> the epsilon that a site shows after them."""

Observe = Callable[[str, int, int], None]
"""(phase, steps done, steps in all): called after each step of a long phase."""

NUM_PROBES = 8
"""Number of canaries that an exact measurement needs: their directions differ only in the label."""

FIXED_WEIGHTS = 10**9
"""Factor on declared sizes that makes updates so small that weights stay fixed: a round's steps respond alike."""


@dataclass(frozen=True)
class AuditedRun:
    """The parts of a run that are audited; tests pass broken ones.

    Attributes:
        solver: the solver whose `solve` is attacked.
        plan: the plan of one round.
        tasks: the tasks of the site, which are clipped jointly.
        whole_tasks: the same with the heads' fixed steps, with which pairs of worlds are compared; empty: `tasks`.
        public_sizes: parameter group -> declared number of units.
        rounds: number of rounds of the run.
        delta: delta of the claimed epsilon.
        entropy: source of the keys of coins and noise, by purpose.
        accountant: computes the claimed epsilon.
        trunks: task -> name of the trunk that its records pass; empty where backbones are frozen.
        num_canaries: largest number of canaries; more give tighter bounds and take longer.
        max_steps: largest number of noised sums that are observed in `observe_run`.
    """

    solver: Solver
    plan: Plan
    tasks: Mapping[str, Task]
    public_sizes: Mapping[str, int]
    rounds: int
    delta: float
    entropy: Entropy
    accountant: Accountant
    whole_tasks: Mapping[str, Task] = field(default_factory=dict)
    trunks: Mapping[str, str] = field(default_factory=dict)
    num_canaries: int = 1000
    max_steps: int = 200


@final
class ProbeStream(NoiseStream):
    """A stream with every coin true and every noise value the same known number: shows how a solver responds.

    Attributes:
        num_drawn: number of noise values drawn so far.
    """

    def __init__(self, noise: float) -> None:
        NoiseStream.__init__(self, bytes(KEY_BYTES))
        self._noise = noise
        self.num_drawn = 0

    def coins(self, count: int, probability: float) -> Bools:
        """Returns `count` times true."""
        del probability
        return np.ones(count, dtype=np.bool_)

    def rounded_gaussian(self, count: int, log2_deviation: int) -> NDArray[np.int64]:
        """Returns the known number everywhere."""
        self.num_drawn += count
        return np.full(count, round(self._noise * 2**log2_deviation))


@final
class SilentStream(NoiseStream):
    """A stream with real coins and no noise: shows who took part."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> NDArray[np.int64]:
        """Returns zeros."""
        del log2_deviation
        return np.zeros(count, np.int64)


# --- releases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """The part of one update that an audit reads.

    Attributes:
        canaries: parameter group -> [its rows, M], change of the weights of the canaries' features.
        free: parameter group -> [its rows, F], change of the weights that no record touches.
    """

    canaries: Mapping[str, Floats]
    free: Mapping[str, Floats]


@dataclass(frozen=True)
class Attack:
    """The audited run and the records planted at its site.

    A gain is the released change of a parameter group's weights divided by what was summed, gradient or noise.
    """

    run: AuditedRun
    planted: Planted

    @property
    def clip_norm(self) -> float:
        """Clip norm of the plan, which has one."""
        clip_norm = self.run.plan.clip_norm
        assert clip_norm is not None
        return clip_norm

    @property
    def claimed_noise(self) -> float:
        """Claimed standard deviation of the noise in one step's sum."""
        return self.run.plan.noise_multiplier * self.clip_norm

    @property
    def step_plan(self) -> Plan:
        """Plan of a round of one step."""
        return replace(self.run.plan, steps=1)

    def hold_first(self, count: int, *, background: bool = False, scale: float = 1.0) -> Units:
        """Returns the units of a site that holds the first `count` canaries.

        Args:
            count: number of canaries.
            background: whether the site holds the background units too.
            scale: factor on all features.
        """
        return self.planted.select_units(self.mark_first(count), background=background, scale=scale)

    def mark_first(self, count: int) -> Bools:
        """Returns true for the first `count` canaries."""
        return np.arange(self.planted.num_canaries) < count

    def release(self, units: Units, plan: Plan, stream: NoiseStream, *, size_factor: int = 1) -> Release:
        """Calls the solver once and returns what it releases.

        Args:
            units: the site's units.
            plan: plan of the call.
            stream: coins and noise.
            size_factor: factor on all declared sizes.
        """
        planted = self.planted
        sizes = {name: size * size_factor for name, size in self.run.public_sizes.items()}
        update = self.run.solver.solve(
            planted.modules, planted.tasks, units, plan=plan, public_sizes=sizes, stream=stream
        )
        return Release(
            {name: planted.read_canary_weights(update, name) for name in planted.modules},
            {name: planted.read_free_weights(update, name) for name in planted.modules},
        )

    def measure_gain(self, *, size_factor: int = 1, scale: float = 1.0) -> dict[str, float]:
        """Returns each parameter group's gain in one step, from clipped canaries without noise.

        Args:
            size_factor: factor on all declared sizes.
            scale: factor on the canaries' features.

        Raises:
            RunFailed: a canary does not reach the release.
        """
        present = self.mark_first(NUM_PROBES)
        units = self.hold_first(NUM_PROBES, scale=scale)
        release = self.release(units, self.step_plan, ProbeStream(0.0), size_factor=size_factor)
        gain = {}
        for name, canaries in release.canaries.items():
            direction = self.planted.direction[name][:, present]
            gain[name] = float((canaries[:, present] * direction).sum() / (direction**2).sum() / self.clip_norm)
            if not np.isfinite(gain[name]) or gain[name] == 0.0:
                raise RunFailed(f"audit: {name}: a canary does not reach the release; nothing can be measured")
        return gain

    def compute_noise_gain(self, release: Release) -> dict[str, float]:
        """Returns each parameter group's gain for noise, where every noise value was 1 and no record reaches."""
        return {name: float(free.mean()) / self.claimed_noise for name, free in release.free.items()}

    def measure_reach(self, gain: Mapping[str, float]) -> float:
        """Returns the update norm along a canary's gradient after one round, in multiples of one step.

        Weights are held fixed and the canary takes part in every step. The norm is over all parameter groups: weight
        decay turns a gradient a little from one to another.
        """
        present = self.mark_first(NUM_PROBES)
        units = self.hold_first(NUM_PROBES)
        release = self.release(units, self.run.plan, ProbeStream(0.0), size_factor=FIXED_WEIGHTS)
        parts = [values[:, present] / (gain[name] * self.clip_norm) for name, values in release.canaries.items()]
        return float(np.linalg.norm(np.concatenate(parts), axis=0).mean())

    def weigh_groups(self, gain: Mapping[str, float]) -> dict[str, float]:
        """Returns each parameter group's weight in `project_on_canaries`.

        The weight is 1 where a release shows as much of a unit as is claimed and larger where it shows more, up to a
        million where noise is missing altogether.
        """
        noise_gain = self.compute_noise_gain(self.release(self.hold_first(0), self.step_plan, ProbeStream(1.0)))
        return {name: (value / max(abs(noise_gain[name]), 1e-3 * abs(value))) ** 2 for name, value in gain.items()}

    def project_on_canaries(
        self, release: Release, gain: Mapping[str, float], weights: Mapping[str, float] | None = None
    ) -> Floats:
        """Returns signal_M, the release along each canary's direction; a clipped canary's part is 1.

        Args:
            release: what the solver released.
            gain: parameter group -> gain, as `measure_gain` returns it.
            weights: parameter group -> weight relative to the others; None for equal weights.
        """
        signal_M, whole_M = np.zeros(self.planted.num_canaries), np.zeros(self.planted.num_canaries)
        for name, canaries in release.canaries.items():
            direction, weight = self.planted.direction[name], 1.0 if weights is None else weights[name]
            signal_M += weight * (canaries * direction).sum(axis=0) / (gain[name] * self.clip_norm)
            whole_M += weight * (direction**2).sum(axis=0)
        return signal_M / whole_M

    def standardise_noise(self, release: Release, gain: Mapping[str, float]) -> Floats:
        """Returns [W, F], released noise divided by the claimed standard deviation of one step's noise."""
        return np.concatenate([free / (gain[name] * self.claimed_noise) for name, free in release.free.items()])


# --- observations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepObservation:
    """One step. Noise values of 1 were injected; they are shown as [W, F], in claimed standard deviations.

    Attributes:
        growth: for each parameter group a unit's part with ten times its features / its part.
        noise_without_units: noise released by a site without any unit.
        noise_of_one_unit: noise released by a site with one unit.
        noise_of_many_units: noise released by a site with several units.
    """

    growth: Floats
    noise_without_units: Floats
    noise_of_one_unit: Floats
    noise_of_many_units: Floats


def observe_step(attack: Attack) -> StepObservation:
    """Returns how one step treats large records, and noise at sites of three sizes."""
    gain, larger = attack.measure_gain(), attack.measure_gain(scale=10.0)
    sites = (attack.hold_first(0), attack.hold_first(1), attack.hold_first(NUM_PROBES, background=True))
    releases = [attack.release(units, attack.step_plan, ProbeStream(1.0)) for units in sites]
    noises = [attack.standardise_noise(release, gain) for release in releases]
    return StepObservation(np.array([larger[name] / gain[name] for name in gain]), *noises)


@dataclass(frozen=True)
class RoundObservation:
    """One round and one of its steps, with weights held fixed. Noise is shown in claimed standard deviations.

    Attributes:
        steps_with_noise: number of noise values drawn in a round / number of trainable parameters.
        step_noise: noise of one step where values of 1 were injected, relative to a unit's part.
        round_noise: noise of a round where values of 1 were injected, relative to the part of a unit that takes part in
            every step; 0 where a parameter group shows no noise at all.
        site_noise: noise of a round from the site's own stream / sqrt(steps), as if every step had the same weight.
    """

    steps_with_noise: float
    step_noise: Floats
    round_noise: Floats
    site_noise: Floats


def observe_round(attack: Attack) -> RoundObservation:
    """Returns how much noise one step and a whole round release at a site without units."""
    plan, nobody = attack.run.plan, attack.hold_first(0)
    gain, probe = attack.measure_gain(size_factor=FIXED_WEIGHTS), ProbeStream(1.0)
    step = attack.release(nobody, attack.step_plan, ProbeStream(1.0), size_factor=FIXED_WEIGHTS)
    whole = attack.release(nobody, plan, probe, size_factor=FIXED_WEIGHTS)
    # Every step's noise 1: their sum, relative to what a unit in every step moves, is the noise multiplier. Parameter
    # groups may have rates of their own, so each group's part of a unit is taken relative to the group's noise.
    noise_gain = attack.compute_noise_gain(whole)
    round_noise, site_noise = np.zeros(1), np.zeros(1)
    if all(noise_gain.values()):
        round_noise = attack.standardise_noise(whole, noise_gain) / attack.measure_reach(noise_gain)
        real = NoiseStream(attack.run.entropy("audit/round"))
        released = attack.release(nobody, plan, real, size_factor=FIXED_WEIGHTS)
        site_noise = attack.standardise_noise(released, noise_gain) * np.sqrt(plan.steps)
    return RoundObservation(
        steps_with_noise=probe.num_drawn / attack.planted.count_parameters(),
        step_noise=attack.standardise_noise(step, gain),
        round_noise=round_noise,
        site_noise=site_noise,
    )


@dataclass(frozen=True)
class ParticipationObservation:
    """Participation of units, seen in releases without noise: no counter of the solver is trusted.

    Attributes:
        took_part_SM: whether each canary moved each of several single steps.
        count_M: in how many steps of whole rounds each canary took part, up to the steps' weights.
        num_steps: number of steps of those rounds.
    """

    took_part_SM: Bools
    count_M: Floats
    num_steps: int


def observe_participation(attack: Attack) -> ParticipationObservation:
    """Returns in which steps, and in how many steps of a round, each of up to 200 canaries takes part."""
    plan, present = attack.run.plan, attack.mark_first(200)
    rate, units = plan.sampling_rate, attack.hold_first(200)
    stream = SilentStream(attack.run.entropy("audit/coins"))
    gain = attack.measure_gain(size_factor=FIXED_WEIGHTS)

    def observe_parts(observed: Plan) -> Floats:
        release = attack.release(units, observed, stream, size_factor=FIXED_WEIGHTS)
        return attack.project_on_canaries(release, gain)[present]

    num_steps = 2 if rate == 1.0 else min(200, max(30, int(np.ceil(2.0 / rate))))
    part_SM = np.array([observe_parts(attack.step_plan) for _ in range(num_steps)])
    rounds = -(-num_steps // plan.steps)
    reach = attack.measure_reach(gain)
    parts = [observe_parts(plan) / reach for _ in range(rounds)]
    return ParticipationObservation(part_SM > 0.5, np.sum(parts, axis=0) * plan.steps, rounds * plan.steps)


@dataclass(frozen=True)
class RunObservation:
    """All steps of the run, with half of the canaries and all background units at the site.

    Attributes:
        canaries: each canary's score over all steps, and the truth.
        noise_SWF: released noise of each step / its claimed standard deviation.
    """

    canaries: Canaries
    noise_SWF: Floats


def observe_run(attack: Attack, observe: Observe) -> RunObservation:
    """Returns the canaries' scores and the noise over all steps of the run, each asked for by a call of its own."""
    run, plan = attack.run, attack.run.plan
    included_M = NoiseStream(run.entropy("audit/inclusion")).coins(run.num_canaries, 0.5)
    units = attack.planted.select_units(included_M, background=True)
    gain = attack.measure_gain()
    weights = attack.weigh_groups(gain)
    total = min(run.rounds * plan.steps, run.max_steps)
    signal_SM: list[Floats] = []
    noise_SWF: list[Floats] = []
    for round_ in range(1, run.rounds + 1):
        stream = NoiseStream(run.entropy(f"audit/round/{round_}"))
        for _ in range(min(plan.steps, total - len(signal_SM))):
            release = attack.release(units, attack.step_plan, stream)
            signal_SM.append(attack.project_on_canaries(release, gain, weights))
            noise_SWF.append(attack.standardise_noise(release, gain))
            observe("audit", len(signal_SM), total)
        if len(signal_SM) == total:
            break
    scores = score_canaries(np.array(signal_SM), plan.noise_multiplier, plan.sampling_rate)
    return RunObservation(Canaries(scores, included_M), np.array(noise_SWF))
