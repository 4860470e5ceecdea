"""The privacy audit: a solver's real code on synthetic records, and what can be refuted of the epsilon it claims.

- Planted (`client/audit/canaries.py`): synthetic background units and canaries, each of which is a unit with a feature
  of its own. No real record is opened: a pass computed on private records would itself be a release.
- Observed (`client/audit/attack.py`): each of the run's noised sums, asked for by a call of `solver.solve` of its own
  (the auditor plays a coordinator that chooses the heads of every step, which the promise covers); and single steps and
  rounds with known noise.
- Decided (here): every statement that the accounting rests on is compared with the observations. The audit passes if
  none is refuted:

  1. a unit moves a step's sum by at most the clip norm, whatever its features are;
  2. every step is noised, also without any unit, and the divisor does not depend on the records;
  3. a round is as many noised steps as the plan says, each with the noise it says, from the site's stream;
  4. units take part by independent coins of the plan's rate;
  5. noise has the accounted scale for every weight and is drawn anew for every step, weight and feature;
  6. canaries (Nasr et al. 2023; Steinke et al. 2023) show no larger epsilon than is claimed;
  7. the claimed epsilon covers all steps of the run, composed at once;
  8. one unit more adds its own part to a sum, in whole numbers, and changes no other byte of a reply
     (`client/audit/neighbours.py`);
  9. noise has its law and never repeats, in one request or between requests (`client/audit/noise.py`);
  10. one unit's values do not move the time of a charge (`client/audit/timing.py`); small effects are warnings.

False alarms: statement 6 at most once in 1000 audits; statements 9 and 10 at most once in 1,000,000 each; the other
statistical tests together about once in 500,000, and once more in 5,000,000 for each head and trunk. Statement 8 is
exact, the rest is exact to rounding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

from client.audit.attack import (
    Attack,
    AuditedRun,
    Observe,
    ParticipationObservation,
    RoundObservation,
    StepObservation,
    observe_participation,
    observe_round,
    observe_run,
    observe_step,
)
from client.audit.canaries import limit_canaries, plant
from client.audit.neighbours import TRIES, Audited, compare_worlds, describe_worlds, judge_worlds
from client.audit.noise import describe_noise, judge_noise, observe_noise
from client.audit.statistics import (
    Floats,
    compute_lower_epsilon,
    compute_one_run_epsilon,
    find_participation_problems,
    is_noise_sufficient,
    is_spread_poisson,
    measure_noise_scale,
)
from client.audit.timing import describe_times, judge_times, measure_times
from client.ledger.ledger import Ledger
from client.solvers import open_solver
from common.events import AuditVerdict
from common.plugins import Spec
from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.privacy.noise import Entropy, NoiseStream, os_entropy
from common.process.threads import steady_time
from common.run import RunConfig, TaskSpec
from common.tasks import open_task
from common.types import BadInput, Plan, Unit


def _ignore_progress(phase: str, done: int, total: int) -> None:
    del phase, done, total


def audit_run(
    run: RunConfig,
    unit: Unit,
    public_sizes: Mapping[str, int],
    *,
    delta: float | None = None,
    entropy: Entropy = os_entropy,
    observe: Observe = _ignore_progress,
) -> AuditVerdict:
    """Audits a run as one site would take part in it.

    Where a part of a backbone trains, a small stand-in trunk with its name, rates and public size takes its place, and
    is attacked together with the heads. Planted records reach the part of a head that trains as they are: features of
    length 1, as a head with a `centre` has them, could not be too long, and would hide a clip that is missing. Pairs of
    worlds are compared with whole heads.

    Args:
        run: the run file; its solver, tasks, rounds and requested privacy are audited.
        unit: the unit that the site's budget protects.
        public_sizes: task -> declared number of units at the site; tasks without one are left out.
        delta: the site's own delta; by default the run's.
        entropy: source of the keys of coins and noise, injected by tests.
        observe: receives the progress.

    Raises:
        BadInput: the run promises no privacy, or asks for a solver or task that cannot be audited.
        RunFailed: nothing could be measured.
    """
    if run.requested_privacy is None:
        raise BadInput("run.privacy: an audit needs a private run, got non_private; it promises nothing")
    solver = open_solver(run.solver, "run.solver")
    whole = {name: open_task(spec, f"run.tasks.{name}") for name, spec in run.tasks.items() if name in public_sizes}
    tasks = {name: open_task(_without_fixed_steps(run.tasks[name]), f"run.tasks.{name}") for name in whole}
    if not tasks:
        raise BadInput("run.tasks: expected at least one task that the site has, got none")
    audited = AuditedRun(
        solver=solver,
        plan=solver.plan(run.training_privacy, unit, run.rounds),
        tasks=tasks,
        whole_tasks=whole,
        public_sizes=run.parameter_group_sizes({name: public_sizes[name] for name in tasks}),
        rounds=run.rounds,
        delta=run.requested_privacy.delta if delta is None else delta,
        entropy=entropy,
        accountant=compute_ledger_epsilon,
        trunks={name: trunk for name in tasks if (trunk := run.trunk_of(name)) is not None},
    )
    return audit(audited, observe)


def _without_fixed_steps(spec: TaskSpec) -> Spec:
    """Returns a task's settings with a head of the same shape that neither centres nor adds an offset."""
    settings = spec.settings()
    head = {key: value for key, value in settings.pop("head", {}).items() if key not in ("centre", "prior")}
    if head:
        settings["head"] = head
    return Spec(**settings)


def audit(run: AuditedRun, observe: Observe = _ignore_progress) -> AuditVerdict:
    """Plants records, observes the solver on them and decides; see `audit_run`."""
    started = time.monotonic()
    plan = run.plan
    if not plan.private or plan.clip_norm is None:
        raise BadInput("solver: an audit needs a plan with noise; this one promises nothing")
    run = replace(run, num_canaries=limit_canaries(run.tasks, run.num_canaries))
    with steady_time():
        planted = plant(
            run.tasks,
            run.trunks,
            unit=plan.unit,
            clip_norm=plan.clip_norm,
            num_canaries=run.num_canaries,
            stream=NoiseStream(run.entropy("audit/records")),
        )
        attack = Attack(run, planted)
        audited = Audited(run.solver, plan, run.whole_tasks or run.tasks, run.trunks, run.public_sizes).open_tasks()
        worlds = []
        for compared in compare_worlds(audited, NoiseStream(run.entropy("audit/worlds"))):
            worlds.append(compared)
            observe("audit: two worlds", len(worlds), TRIES)
        noise = observe_noise(run.solver, plan, run.tasks, run.public_sizes, run.entropy)
        times = measure_times(audited, NoiseStream(run.entropy("audit/times")))
        reasons = [
            *judge_step(observe_step(attack)),
            *judge_round(plan, observe_round(attack)),
            *judge_participation(plan, observe_participation(attack)),
            *judge_noise(plan, noise),
            *judge_worlds(plan, worlds),
            *judge_times(times, gross=True),
        ]
        observed = observe_run(attack, observe)
    scale = measure_noise_scale(observed.noise_SWF, planted.count_rows())
    trade_off: Literal["gaussian", "any"] = "gaussian" if plan.sampling_rate == 1.0 else "any"
    low_95, low_99_9 = (
        compute_lower_epsilon(observed.canaries, delta=run.delta, confidence=confidence, trade_off=trade_off)
        for confidence in (0.95, 0.999)
    )
    claimed = run.accountant(plan, run.rounds, run.delta)
    reasons += [*scale.problems, *judge_claim(run, claimed, low_99_9)]
    return AuditVerdict(
        epsilon_claimed=claimed,
        epsilon_lower_95=low_95,
        epsilon_lower_99_9=low_99_9,
        epsilon_lower_one_run_95=compute_one_run_epsilon(observed.canaries, delta=run.delta, confidence=0.95),
        noise_std_ratio=scale.ratio,
        delta=run.delta,
        rounds=run.rounds,
        steps=len(observed.noise_SWF),
        canaries=run.num_canaries,
        seconds=round(time.monotonic() - started, 3),
        passed=not reasons,
        reasons=tuple(dict.fromkeys(reasons)),
        tried=(describe_noise(noise), describe_worlds(plan, worlds), describe_times(times)),
        warnings=tuple(judge_times(times, gross=False)),
    )


# --- what is decided -------------------------------------------------------------------------------------------------


def _are_close(values: Floats, expected: float = 1.0) -> bool:
    return bool(np.allclose(values, expected, rtol=0.01, atol=0.0))


def judge_step(step: StepObservation) -> Iterator[str]:
    """Yields a sentence where statement 1 or 2 is refuted."""
    if not _are_close(step.growth):
        yield "a unit's part of a release grows with its features: it is not clipped"
    empty = step.noise_without_units
    if not empty.all():
        yield "without records a release has no noise"
    elif not (_are_close(step.noise_of_one_unit / empty) and _are_close(step.noise_of_many_units / empty)):
        yield "the divisor of a release depends on the true number of units"


def judge_round(plan: Plan, observed: RoundObservation) -> Iterator[str]:
    """Yields a sentence where statement 3 is refuted."""
    if observed.steps_with_noise != plan.steps:
        yield f"a round draws noise for {observed.steps_with_noise:g} steps, and {plan.steps} are accounted for"
    for part, noise in (("step", observed.step_noise), ("round", observed.round_noise)):
        if not _are_close(noise):
            yield (
                f"a {part}'s noise, relative to a unit's part, is {float(np.abs(noise).mean()):.3g} times what the "
                "plan says, or does not come from the site's stream"
            )
            return
    # Steps may have different weights (momentum); independent noise then varies by at least 1 / steps of the sum.
    if not is_noise_sufficient(observed.site_noise):
        yield "a round's noise varies less than that of as many independent steps"


def judge_participation(plan: Plan, observed: ParticipationObservation) -> Iterator[str]:
    """Yields a sentence where statement 4 is refuted."""
    problems = list(find_participation_problems(observed.took_part_SM, plan.sampling_rate))
    yield from problems
    if not problems and not is_spread_poisson(observed.count_M, observed.num_steps, plan.sampling_rate):
        yield "how often a unit takes part in a round does not vary as with Poisson sampling"


def judge_claim(run: AuditedRun, claimed: float, lower: float) -> Iterator[str]:
    """Yields a sentence where statement 6 or 7 is refuted; for statement 5 see `measure_noise_scale`.

    Args:
        run: the audited run.
        claimed: the claimed epsilon of the run.
        lower: lower bound on epsilon from canaries at 99.9 % confidence.
    """
    if lower > claimed:
        yield f"canaries show an epsilon of at least {lower:.2f} at 99.9 % confidence, and {claimed:.2f} is claimed"
    whole = compute_epsilon([Mechanism.of(run.plan.over(run.rounds))], run.delta)
    if claimed < whole * (1.0 - 1e-6):
        yield f"the run's steps cost an epsilon of {whole:.2f} when composed, and {claimed:.2f} is claimed"


def compute_ledger_epsilon(plan: Plan, rounds: int, delta: float) -> float:
    """Returns the epsilon that a real ledger in a temporary folder shows after all rounds.

    The ledger is opened anew for every charge, as sites do, and the last charge is never committed, as after a crash.
    Very many rounds are charged in ten groups.

    Args:
        plan: plan of one round.
        rounds: number of rounds.
        delta: delta of the ledger.
    """
    groups = [len(part) for part in np.array_split(np.arange(rounds), min(rounds, 10))]
    with tempfile.TemporaryDirectory() as folder:

        def open_ledger() -> Ledger:
            return Ledger.open(Path(folder), population="audit", unit=plan.unit, epsilon_cap=1e9, delta=delta)

        for number, group in enumerate(groups, start=1):
            charge = Mechanism.of(plan.over(group))
            reservation = open_ledger().reserve(charge, run="audit", round=number, request="", allow_infinite=True)
            if number < len(groups):
                open_ledger().commit(reservation)
        return open_ledger().spent().reserved_epsilon


def make_audit_table(verdict: AuditVerdict) -> Table:
    """Returns a table of what is claimed, what the attack shows, and how much was measured."""
    table = Table(title=f"audit: {'passed' if verdict.passed else 'FAILED'}", title_justify="left", show_header=False)
    rows = (
        ("epsilon claimed", f"{round_up(verdict.epsilon_claimed):.2f}"),
        ("epsilon at least, 95 % confidence", f"{verdict.epsilon_lower_95:.2f}"),
        ("epsilon at least, 99.9 % confidence (the gate)", f"{verdict.epsilon_lower_99_9:.2f}"),
        ("epsilon at least, 95 %, no distribution assumed", f"{verdict.epsilon_lower_one_run_95:.2f}"),
        ("released noise / accounted noise", f"{verdict.noise_std_ratio:.3f}"),
        ("delta, rounds, noised steps audited", f"{verdict.delta:g}, {verdict.rounds}, {verdict.steps}"),
        ("canaries", str(verdict.canaries)),
        ("seconds", f"{verdict.seconds:.1f}"),
        *(("tried", sentence) for sentence in verdict.tried),
        *(("warning", sentence) for sentence in verdict.warnings),
    )
    for row in rows:
        table.add_row(*row)
    return table
