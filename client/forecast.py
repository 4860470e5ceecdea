"""What a run would cost at a site and whether it can be useful, before anything is released.

Pure arithmetic on public numbers: no record is read, nothing is opened, charged or created. What a solver draws, a plan
fixes: noise of standard deviation sigma * C in each of the P parameters of a site's heads, in each of the T steps of a
round, on a sum of clipped gradients of expectedly q * n units (n the largest declared public size).

    noise-to-signal of one round = E|noise| / largest signal = sigma * sqrt(P * T) / (q * n * T)

The largest signal is that of units which all agree: each gradient of length C, all in one direction, in every step
(E|noise| <= sigma C sqrt(P T); tight to 1/(4 P)). True gradients are shorter and disagree: the true ratio is larger. A
ratio far above 1 is hopeless, one below 1 promises nothing. Where a part of a backbone trains too, its parameters are
not counted: it is of use before it is trained, and takes steps of its own size. Averaging over S sites and R rounds
divides the noise by sqrt(S R): the ratio of the whole run, on which the warning is based.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from client.budget import affordable_rounds, history_of, share_of, shown
from client.history import History
from client.limits import refuse_what_does_not_fit, untrained_modules
from client.share import evaluation_mechanism, evaluations_left, unspent
from client.site import DeclinedRequest, Joined, check_allowed, plan_of
from common.config import NoisedEvaluation, RunConfig, SiteConfig
from common.privacy.accounting import Mechanism, epsilon, rounded_up
from common.tasks import Task
from common.types import BadInput


@dataclass(frozen=True)
class Forecast:
    """One site's outlook on a run.

    Attributes:
        site: its name.
        tasks: of the run that it takes part in.
        unit: what its budget protects.
        relation: which data sets count as neighbours.
        delta: the site's own; every epsilon is at it.
        budget_epsilon: the registry's cap.
        spent_epsilon: what its history has cost already.
        noise_multiplier: as the solver would use it; 0 without privacy.
        rounds: of the run.
        round_epsilon: of one round alone.
        run_epsilon: of the whole run's training alone.
        evaluation_epsilon: of its evaluations alone.
        final_epsilon: of history, training and evaluations together.
        rounds_affordable: how many such rounds the budget covers.
        evaluations: that the run asks for and the site's share pays for.
        evaluation_noise: standard deviation of the noise in each of their counts, in units; 0 without any.
        noise_to_signal: of one round at this site.
        run_noise_to_signal: of the whole run, averaged over sites and rounds.
        warnings: why the site would decline, or why the result cannot be useful.
    """

    site: str
    tasks: tuple[str, ...]
    unit: str
    relation: str
    delta: float
    budget_epsilon: float
    spent_epsilon: float
    noise_multiplier: float
    rounds: int
    round_epsilon: float
    run_epsilon: float
    evaluation_epsilon: float
    final_epsilon: float
    rounds_affordable: int
    evaluations: int
    evaluation_noise: float
    noise_to_signal: float
    run_noise_to_signal: float
    warnings: tuple[str, ...]


def forecast(config: SiteConfig, run: RunConfig, num_sites: int) -> Forecast:
    """What a run would cost a site and how much of its result would be noise.

    Args:
        config: the site's file.
        run: the run's file.
        num_sites: how many sites' contributions are averaged.

    Raises:
        BadInput: a setting that is wrong.
        DeclinedRequest: the solver has no plan for the run.
        LedgerDamaged: the registry's ledger does not verify.
    """
    # Which weights the digest names is known when the run is joined.
    any_backbone = config.model_copy(update={"allow": config.allow.model_copy(update={"backbones": "any"})})
    joined = Joined("plan", run, {}, Path())
    tasks, plan, history = joined.tasks(config), plan_of(config, joined), history_of(config)
    whole, share = Mechanism.of(replace(plan, steps=plan.steps * run.rounds)), share_of(config)
    evaluations = _evaluations(run, share, history, len(tasks))
    delta = history.terms.delta
    size = max((config.tasks[name].public_size for name in tasks), default=0)
    per_round = 0.0
    if plan.private and size:
        modules = untrained_modules(run, tasks)
        width = sum(parameter.numel() for name in tasks for parameter in modules[name].parameters())
        per_round = plan.noise_multiplier * math.sqrt(width / plan.steps) / (plan.sampling_rate * size)
    outlook = Forecast(
        site=config.name,
        tasks=tuple(sorted(tasks)),
        unit=history.terms.unit.value,
        relation=history.terms.relation,
        delta=delta,
        budget_epsilon=history.terms.epsilon_cap,
        spent_epsilon=history.epsilon(),
        noise_multiplier=plan.noise_multiplier,
        rounds=run.rounds,
        round_epsilon=epsilon([Mechanism.of(plan)], delta),
        run_epsilon=epsilon([whole], delta),
        evaluation_epsilon=epsilon(evaluations, delta),
        final_epsilon=history.epsilon([whole, *evaluations]),
        rounds_affordable=affordable_rounds(history, plan, share),
        evaluations=len(evaluations),
        evaluation_noise=max((_count_noise(tasks, each) for each in evaluations), default=0.0),
        noise_to_signal=per_round,
        run_noise_to_signal=per_round / math.sqrt(num_sites * run.rounds),
        warnings=(),
    )
    affords = history.within_cap([whole, *unspent(share, history)])
    return replace(outlook, warnings=tuple(_warnings(any_backbone, joined, outlook, affords)))


def as_json(outlook: Forecast) -> dict[str, Any]:
    """The outlook as plain values; an infinite epsilon is null, and `infinite` says so."""
    epsilons = ("spent_epsilon", "round_epsilon", "run_epsilon", "evaluation_epsilon", "final_epsilon")
    values = asdict(outlook) | {name: shown(getattr(outlook, name)) for name in epsilons}
    return values | {"infinite": math.isinf(outlook.final_epsilon)}


def table(outlooks: list[Forecast]) -> Table:
    """The outlooks side by side, one site a column, each epsilon rounded up."""
    first = outlooks[0]
    title = f"plan: {first.rounds} round(s); epsilon per {first.unit}, {first.relation}, delta {first.delta:g}"
    made = Table("", *(each.site for each in outlooks), title=title, title_justify="left")
    for name, cell in _ROWS.items():
        made.add_row(name, *(cell(each) for each in outlooks))
    return made


LEGEND = """\
epsilon at end   of the run, its evaluations and what was spent before, composed; beyond the budget the site declines
affords rounds   how many such rounds the budget pays for
count noise      standard deviation of the noise in each count of an evaluation, in units
noise/signal     of one round: expected length of its noise over that of the largest signal this site could give;
  over the run   the same averaged over all sites and rounds. Above 1 the result is hopeless and a warning says so;
                 below 1 nothing is promised, for true signals are smaller than the largest one"""
"""What the rows of `table` mean that do not speak for themselves."""


def _shown_up(epsilon: float) -> str:
    return f"{rounded_up(epsilon):g}"


_ROWS: Mapping[str, Callable[[Forecast], str]] = {
    "tasks": lambda each: ", ".join(each.tasks) or "-",
    "noise multiplier": lambda each: f"{each.noise_multiplier:.3f}",
    "epsilon/round": lambda each: _shown_up(each.round_epsilon),
    "epsilon of run": lambda each: _shown_up(each.run_epsilon),
    "spent before": lambda each: _shown_up(each.spent_epsilon),
    "epsilon at end": lambda each: _shown_up(each.final_epsilon),
    "budget": lambda each: f"{each.budget_epsilon:g}",
    "affords rounds": lambda each: str(each.rounds_affordable),
    "evaluations": lambda each: str(each.evaluations),
    "  their epsilon": lambda each: _shown_up(each.evaluation_epsilon),
    "  count noise": lambda each: f"{each.evaluation_noise:.1f}",
    "noise/signal": lambda each: f"{each.noise_to_signal:.2f}",
    "  over the run": lambda each: f"{each.run_noise_to_signal:.2f}",
}


def _evaluations(run: RunConfig, share: NoisedEvaluation | None, history: History, num_tasks: int) -> list[Mechanism]:
    """Those the run asks for, as far as the share pays for them."""
    if run.evaluation is None or share is None or num_tasks == 0:
        return []
    answered = min(run.evaluation.times(run.rounds), evaluations_left(share, history))
    return [evaluation_mechanism(share, history.terms, num_tasks)] * answered


def _count_noise(tasks: Mapping[str, Task], mechanism: Mechanism) -> float:
    """The largest standard deviation of the noise over the tasks, in a count where each unit is one."""
    assert mechanism.sensitivity is not None
    return mechanism.noise_multiplier * mechanism.sensitivity * max(task.counts_norm() for task in tasks.values())


def _warnings(config: SiteConfig, joined: Joined, outlook: Forecast, affords: bool) -> list[str]:
    found = []
    if not outlook.tasks:
        found.append("the site would decline: it has none of the run's tasks")
    try:
        check_allowed(config, joined)
        refuse_what_does_not_fit(joined.run, joined.tasks(config))
    except DeclinedRequest as declined:
        found.append(f"the site would decline: {declined.detail}")
    except BadInput as error:
        found.append(f"the site would decline: {error}")
    asked = joined.run.evaluation
    if asked is not None and config.evaluation == "local":
        found.append("the site would send no evaluation: its file says `local`")
    elif asked is not None and outlook.evaluations < asked.times(outlook.rounds):
        found.append(
            f"the run asks for {asked.times(outlook.rounds)} evaluation(s), the share pays for {outlook.evaluations}; "
            "the site would decline the others"
        )
    if joined.privacy is None:
        return [*found, "the run is not private: epsilon is infinite"]
    held = "" if config.evaluation == "local" else ", of which a share is held for evaluations"
    if not affords:
        found.append(
            f"the site would decline: the run would bring epsilon to {rounded_up(outlook.final_epsilon):g}, beyond the "
            f"budget of {outlook.budget_epsilon:g}{held}; the rest affords {outlook.rounds_affordable} of "
            f"{outlook.rounds} round(s)"
        )
    target = joined.privacy.target_epsilon
    if target is not None and outlook.run_epsilon > target * (1.0 + 1e-9):
        found.append(
            f"at the site's delta of {outlook.delta:g} the run costs epsilon {rounded_up(outlook.run_epsilon):g}, more "
            f"than the {target:g} asked for at delta {joined.privacy.delta:g}"
        )
    if outlook.run_noise_to_signal > 1.0:
        found.append(
            f"the result cannot be useful: the noise of the whole run is {outlook.run_noise_to_signal:.1f} times its "
            "largest possible signal; use more units, fewer features or parameters, or a larger epsilon"
        )
    return found
