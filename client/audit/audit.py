"""The privacy audit: a solver's real code on synthetic records, and what can be refuted of the epsilon it claims.

No real record is opened: a pass computed on private records would itself be a release. The auditor plays a coordinator
that chooses the heads of every step, which the promise covers: each of the run's noised sums is asked for by a call of
`solver.solve` of its own, canaries (Nasr et al. 2023; Steinke et al. 2023) are scored over all of them, and the plan of
a whole round is then checked against that one step.

False alarms: the epsilon gate at 99.9 % at most once in 1000 audits; the other statistical tests together about once
in 500,000, and once more in 5,000,000 for each head and trunk; the rest is exact to rounding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.audit.attack import PROBES, STILL, Audited, Lab
from client.audit.canaries import ProbeStream, SilentStream, plant
from client.audit.statistics import (
    Canaries,
    Floats,
    canary_scores,
    enough_noise,
    lower_epsilon,
    noise_scale,
    one_run_epsilon,
    participation_problems,
    spread_is_poisson,
)
from client.ledger.ledger import Ledger
from client.solvers import open_solver
from common.privacy.accounting import Mechanism, epsilon
from common.privacy.noise import Entropy, NoiseStream, os_entropy
from common.process.threads import one_thread
from common.run import RunConfig
from common.tasks import open_task
from common.types import BadInput, Plan, Unit

Observe = Callable[[str, int, int], None]


def _silent(phase: str, done: int, total: int) -> None:
    del phase, done, total


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        epsilon_claimed: of the whole run, as a ledger composes it, at `delta`.
        epsilon_lower_95: refutes every smaller epsilon, wrongly in at most 5 % of audits.
        epsilon_lower_99_9: in at most 0.1 %; the gate.
        epsilon_lower_one_run_95: likewise at 95 %, without assuming anything about the canaries' distribution.
        noise_std_ratio: released noise where no record reaches / what is accounted for.
        delta: at which all epsilons hold.
        rounds: of the run.
        steps: noised sums asked for; fewer than the run's only in a run of very many.
        canaries: planted, of which each was among the records with probability 1/2.
        seconds: the audit took.
        passed: whether nothing was refuted.
        reasons: one sentence for each thing that was.
    """

    epsilon_claimed: float
    epsilon_lower_95: float
    epsilon_lower_99_9: float
    epsilon_lower_one_run_95: float
    noise_std_ratio: float
    delta: float
    rounds: int
    steps: int
    canaries: int
    seconds: float
    passed: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}


def audit_run(
    run: RunConfig,
    unit: Unit,
    public_sizes: Mapping[str, int],
    *,
    delta: float | None = None,
    entropy: Entropy = os_entropy,
    observe: Observe = _silent,
) -> AuditResult:
    """Audit a run as one site would take part in it.

    Where a part of a backbone trains, a small stand-in trunk with its name, rates and public size takes its place, and
    is attacked together with the heads.

    Args:
        run: its solver, tasks, rounds and requested privacy.
        unit: what the site's budget protects.
        public_sizes: declared sizes of the tasks the site has; the run's other tasks are left out.
        delta: the site's own; by default the run's.
        entropy: where keys come from, for tests.
        observe: told the progress.

    Raises:
        BadInput: the run promises no privacy, or asks for a solver or task that cannot be audited.
        RunFailed: nothing could be measured.
    """
    if run.requested_privacy is None:
        raise BadInput("run.privacy: an audit needs a private run, got non_private; it promises nothing")
    solver = open_solver(run.solver, "run.solver")
    tasks = {name: open_task(spec, f"run.tasks.{name}") for name, spec in run.tasks.items() if name in public_sizes}
    if not tasks:
        raise BadInput("run.tasks: expected at least one task that the site has, got none")
    audited = Audited(
        solver=solver,
        plan=solver.plan(run.requested_privacy, unit, run.rounds),
        tasks=tasks,
        public_sizes=run.parameter_group_sizes({name: public_sizes[name] for name in tasks}),
        rounds=run.rounds,
        delta=run.requested_privacy.delta if delta is None else delta,
        entropy=entropy,
        accountant=ledger_epsilon,
        trunks={name: trunk for name in tasks if (trunk := run.trunk_of(name)) is not None},
    )
    return audit(audited, observe)


def audit(audited: Audited, observe: Observe = _silent) -> AuditResult:
    """Measure, compare with the claim, and say what does not fit. See `audit_run`."""
    started = time.monotonic()
    plan = audited.plan
    if not plan.private or plan.clip_norm is None:
        raise BadInput("solver: an audit needs a plan with noise; this one promises nothing")
    planted = plant(
        audited.tasks,
        audited.trunks,
        unit=plan.unit,
        clip_norm=plan.clip_norm,
        num_canaries=audited.num_canaries,
        stream=NoiseStream(audited.entropy("audit/records")),
    )
    lab = Lab(audited, planted)
    with one_thread():
        reasons = [*_step_problems(lab), *_round_problems(lab), *_sampling_problems(lab)]
        canaries, noise_SWF = _attack(lab, observe)
    scale = noise_scale(noise_SWF, planted.rows())
    trade_off: Literal["gaussian", "any"] = "gaussian" if plan.sampling_rate == 1.0 else "any"
    low_95, low_99_9 = (
        lower_epsilon(canaries, delta=audited.delta, confidence=confidence, trade_off=trade_off)
        for confidence in (0.95, 0.999)
    )
    claimed = audited.accountant(plan, audited.rounds, audited.delta)
    reasons += [*scale.problems, *_claim_problems(audited, claimed, low_99_9)]
    return AuditResult(
        epsilon_claimed=claimed,
        epsilon_lower_95=low_95,
        epsilon_lower_99_9=low_99_9,
        epsilon_lower_one_run_95=one_run_epsilon(canaries, delta=audited.delta, confidence=0.95),
        noise_std_ratio=scale.ratio,
        delta=audited.delta,
        rounds=audited.rounds,
        steps=len(noise_SWF),
        canaries=audited.num_canaries,
        seconds=round(time.monotonic() - started, 3),
        passed=not reasons,
        reasons=tuple(dict.fromkeys(reasons)),
    )


def ledger_epsilon(plan: Plan, rounds: int, delta: float) -> float:
    """What a real ledger in a temporary folder shows after all rounds.

    It is opened anew for every charge, as sites do, and the last charge is never committed, as after a crash. Very many
    rounds are charged in ten groups.
    """
    groups = [len(part) for part in np.array_split(np.arange(rounds), min(rounds, 10))]
    with tempfile.TemporaryDirectory() as folder:

        def ledger() -> Ledger:
            return Ledger.open(Path(folder), registry="audit", unit=plan.unit, epsilon_cap=1e9, delta=delta)

        for number, group in enumerate(groups, start=1):
            charge = Mechanism.of(plan.over(group))
            reservation = ledger().reserve(charge, run="audit", round=number, request="", allow_infinite=True)
            if number < len(groups):
                ledger().commit(reservation)
        return ledger().spent().reserved_epsilon


# --- exact checks ----------------------------------------------------------------------------------------------------


def _close(values: Floats, expected: float = 1.0) -> bool:
    return bool(np.allclose(values, expected, rtol=0.01, atol=0.0))


def _step_problems(lab: Lab) -> Iterator[str]:
    """One step: clipping, and a divisor that does not depend on the records."""
    gains = lab.gains(lab.step)
    larger = lab.gains(lab.step, scale=10.0)
    if not _close(np.array([larger[name] / gains[name] for name in gains])):
        yield "a unit's part of a release grows with its features: it is not clipped"
    nobody = lab.planted.units(lab.first(0), background=False)
    one = lab.planted.units(lab.first(1), background=False)
    many = lab.planted.units(lab.first(PROBES), background=True)
    empty, single, full = (
        lab.noise(lab.ask(units, lab.step, ProbeStream(1.0)), gains) for units in (nobody, one, many)
    )
    if not empty.all():
        yield "without records a release has no noise"
    elif not (_close(single / empty) and _close(full / empty)):
        yield "the divisor of a release depends on the true number of units"


def _round_problems(lab: Lab) -> Iterator[str]:
    """A step and a whole round: as many noised steps as the plan says, each with the noise it says."""
    plan, units = lab.audited.plan, lab.planted.units(lab.first(0), background=False)
    gains, listening = lab.gains(lab.step, STILL), ProbeStream(1.0)
    one = lab.noise(lab.ask(units, lab.step, ProbeStream(1.0), STILL), gains)
    # Every step's noise 1: their sum, relative to what a unit in every step moves, is the noise multiplier. Entries may
    # have rates of their own, and each entry's part of a unit is taken relative to the entry's noise.
    released = lab.ask(units, plan, listening, STILL)
    whole = lab.noise_gains(released)
    ratio = lab.noise(released, whole) / lab.reach(whole) if all(whole.values()) else np.zeros(1)
    steps = listening.drawn / lab.planted.num_weights()
    if steps != plan.steps:
        yield f"a round draws noise for {steps:g} steps, and {plan.steps} are accounted for"
    for what, found in (("step", one), ("round", ratio)):
        if not _close(found):
            yield (
                f"a {what}'s noise, relative to a unit's part, is {float(np.abs(found).mean()):.3g} times what the "
                "plan says, or does not come from the site's stream"
            )
            return
    real = NoiseStream(lab.audited.entropy("audit/round"))
    # Steps may have different weights (momentum); independent noise then varies by at least 1 / steps of the sum.
    if not enough_noise(lab.noise(lab.ask(units, plan, real, STILL), whole) * np.sqrt(plan.steps)):
        yield "a round's noise varies less than that of as many independent steps"


def _sampling_problems(lab: Lab) -> Iterator[str]:
    """Who takes part, seen in releases without noise: no counter of the solver is trusted."""
    plan = lab.audited.plan
    rate = plan.sampling_rate
    present = lab.first(200)
    units = lab.planted.units(present, background=False)
    stream = SilentStream(lab.audited.entropy("audit/coins"))
    gains = lab.gains(lab.step, STILL)
    num_steps = 2 if rate == 1.0 else min(200, max(30, int(np.ceil(2.0 / rate))))
    signals = [lab.signals(lab.ask(units, lab.step, stream, STILL), gains)[present] for _ in range(num_steps)]
    problems = list(participation_problems(np.array(signals) > 0.5, rate))
    yield from problems
    rounds = -(-num_steps // plan.steps)
    reach = lab.reach(gains)
    shares = [lab.signals(lab.ask(units, plan, stream, STILL), gains)[present] / reach for _ in range(rounds)]
    if not problems and not spread_is_poisson(np.sum(shares, axis=0) * plan.steps, rounds * plan.steps, rate):
        yield "how often a unit takes part in a round does not vary as with Poisson sampling"


# --- statistical checks ----------------------------------------------------------------------------------------------


def _attack(lab: Lab, observe: Observe) -> tuple[Canaries, Floats]:
    """All steps of the run with half of the canaries among the records: their scores, and noise_SWF."""
    audited, plan = lab.audited, lab.audited.plan
    included_M = NoiseStream(audited.entropy("audit/inclusion")).coins(audited.num_canaries, 0.5)
    units = lab.planted.units(included_M, background=True)
    gains = lab.gains(lab.step)
    weights = lab.weights(gains)
    total = _audited_steps(audited)
    signal_SM: list[Floats] = []
    noise_SWF: list[Floats] = []
    for round_ in range(1, audited.rounds + 1):
        stream = NoiseStream(audited.entropy(f"audit/round/{round_}"))
        for _ in range(min(plan.steps, total - len(signal_SM))):
            released = lab.ask(units, lab.step, stream)
            signal_SM.append(lab.signals(released, gains, weights))
            noise_SWF.append(lab.noise(released, gains))
            observe("audit", len(signal_SM), total)
        if len(signal_SM) == total:
            break
    scores = canary_scores(np.array(signal_SM), plan.noise_multiplier, plan.sampling_rate)
    return Canaries(scores, included_M), np.array(noise_SWF)


def _audited_steps(audited: Audited) -> int:
    return min(audited.rounds * audited.plan.steps, audited.max_steps)


def _claim_problems(audited: Audited, claimed: float, lower: float) -> Iterator[str]:
    """The claim against what the canaries show, and against the run's steps composed at once."""
    if lower > claimed:
        yield f"canaries show an epsilon of at least {lower:.2f} at 99.9 % confidence, and {claimed:.2f} is claimed"
    whole = epsilon([Mechanism.of(audited.plan.over(audited.rounds))], audited.delta)
    if claimed < whole * (1.0 - 1e-6):
        yield f"the run's steps cost an epsilon of {whole:.2f} when composed, and {claimed:.2f} is claimed"
