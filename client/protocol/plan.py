"""The price of a run at a site and its expected use, before anything is released.

Pure arithmetic on public numbers: no record is read, nothing is opened, charged or created. What a solver draws, a plan
fixes: noise of standard deviation sigma * C in each of the P parameters of a site's heads, in each of the T steps of a
round, on a sum of clipped gradients of expectedly q * n units (n the largest declared public size).

    noise-to-signal of one round = E|noise| / largest signal = sigma * sqrt(P * T) / (q * n * T)

Where a part of a backbone trains too, the same is said of that trunk alone, with P its own parameters and n the largest
public size of the tasks that stand on it. Heads and trunks share one clip: each gets the largest signal only where the
gradient has no other part, so that no sum of the two ratios means anything.

The largest signal is that of units which all agree: each gradient of length C, all in one direction, in every step
(E|noise| <= sigma C sqrt(P T); tight to 1/(4 P)). True gradients are shorter and disagree: the true ratio is larger. A
ratio far above 1 tells of a poor result, one below 1 promises nothing. Averaging over S sites and R rounds divides the
noise by sqrt(S R): the ratio of the whole run, on which the warnings are based. It is of lengths: a head of P
parameters learns in a few of P directions, each of which has little of the noise, and still learns above 1 (masks of 40
pictures at 3.0: Dice .46, a site alone .11, without privacy .79). A trunk above 1 moves by more noise than signal,
however small its steps are; it is of use before it is trained, so what that costs depends on its learning rate, and the
warning says that heads alone may do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from client.config import NoisedEvaluation, SiteConfig
from client.data.records import check_values
from client.ledger.evaluation_budget import count_evaluations_left, list_unspent, make_evaluation_mechanism
from client.ledger.history import History
from client.protocol.balance import count_affordable_rounds, get_evaluation_budget, history_of, shown
from client.protocol.requirements import (
    count_bytes_of_places,
    count_trained,
    feature_dim,
    num_parameters,
    refuse_what_does_not_fit,
    refuse_what_takes_too_long,
    untrained_modules,
)
from client.protocol.site import Joined, SiteDeclined, check_allowed, find_sum_rules, make_plan, plan_measurement
from common.backbones import CacheBits
from common.errors import list_some
from common.model.advice import estimate_points, list_contradictions
from common.model.forecast import Forecast, forecast_loss
from common.model.guessing import Totals, compute_v, explain_hopeless
from common.model.momentum import read_momentum
from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.privacy.filters import TOLERANCE
from common.run import RunConfig
from common.tasks import Task
from common.tasks.parts.calibration import make_released_statistic
from common.types import BadInput, Plan


@dataclass(frozen=True)
class RunPlan:
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
        final_share: part of the budget that the privacy filter then counts as used or held; above 1 the site declines.
        rounds_affordable: how many such rounds the budget covers.
        evaluations: that the run asks for and the site's share pays for.
        evaluation_noise: standard deviation of the noise in each of their counts, in units; 0 without any.
        noise_to_signal: of one round at this site.
        run_noise_to_signal: of the whole run, averaged over sites and rounds.
        logit_noise: deviation of the noise that the whole run adds to a logit, of the task where it is largest; None
            where the steps do not follow from the noise.
        v: task -> mu N / (s C) of its head (`common/model/guessing.py`), where its kind has such a number.
        forecasts: task -> accuracy that privacy will cost it, where there is a forecast.
        hopeless: why the whole run cannot be better than guessing; None where it can.
        cache_mib: MiB on the site's disk that the features of places of its declared units take, by backbone; backbones
            with one vector for a record are left out.
        trunk_parameters: that train of the backbones here, by backbone; empty where they are frozen.
        trunk_noise_to_signal: of one round, the largest of these trunks; 0 without any.
        run_trunk_noise_to_signal: of the whole run, likewise.
        declines: whether the site would decline the run.
        warnings: why the site would decline, or why the result may be poor.
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
    final_share: float
    rounds_affordable: int
    evaluations: int
    evaluation_noise: float
    noise_to_signal: float
    run_noise_to_signal: float
    logit_noise: float | None
    v: Mapping[str, float]
    forecasts: Mapping[str, Forecast]
    hopeless: str | None
    cache_mib: Mapping[str, int]
    trunk_parameters: Mapping[str, int]
    trunk_noise_to_signal: float
    run_trunk_noise_to_signal: float
    declines: bool
    warnings: tuple[str, ...]


def plan_run(config: SiteConfig, run: RunConfig, num_sites: int, totals: Mapping[str, Totals] | None = None) -> RunPlan:
    """Returns the price of a run at a site and the part of its result that would be noise.

    Args:
        config: the site's file.
        run: the run's file.
        num_sites: how many sites' contributions are averaged.
        totals: task -> its units and sites; by default all sites are taken to be like this one.

    Raises:
        BadInput: a setting that is wrong.
        SiteDeclined: the solver has no plan for the run.
        LedgerDamaged: the registry's ledger does not verify.
    """
    # Which weights the digest names is known when the run is joined.
    any_backbone = config.model_copy(update={"allow": config.allow.model_copy(update={"backbones": "any"})})
    joined = Joined("plan", run, {}, Path())
    tasks, plan, history = joined.tasks(config), make_plan(config, joined), history_of(config)
    whole, share = [Mechanism.of(plan.over(run.rounds))], get_evaluation_budget(config)
    measured = plan_measurement(config, joined).plan
    whole += [] if measured is None else [Mechanism.of(measured)]
    evaluations = _evaluations(run, share, history, len(tasks))
    delta = history.terms.delta
    sizes = joined.sizes(config)
    modules = untrained_modules(run, tasks)
    trunks = {name: count_trained(module) for name, module in modules.items() if name not in tasks}
    heads = sum(count_trained(modules[name]) for name in tasks)
    per_round = _noise_to_signal(plan, heads, max((sizes[name] for name in tasks), default=0))
    of_trunks = max((_noise_to_signal(plan, width, sizes[name]) for name, width in trunks.items()), default=0.0)
    alike = {name: Totals(num_sites * sizes[name], num_sites) for name in tasks}
    own_totals = {name: (totals or {}).get(name, alike[name]) for name in tasks}
    forecasts = {name: forecast for name in tasks if (forecast := _forecast(run, name, own_totals[name])) is not None}
    averaged = num_sites * math.sqrt(run.rounds / run.count_noises(num_sites))
    outlook = RunPlan(
        site=config.name,
        tasks=tuple(sorted(tasks)),
        unit=history.terms.unit.value,
        relation=history.terms.relation,
        delta=delta,
        budget_epsilon=history.terms.epsilon_cap,
        spent_epsilon=history.compute_epsilon(),
        noise_multiplier=plan.noise_multiplier,
        rounds=run.rounds,
        round_epsilon=compute_epsilon([Mechanism.of(plan)], delta),
        run_epsilon=compute_epsilon(whole, delta),
        evaluation_epsilon=compute_epsilon(evaluations, delta),
        final_epsilon=history.compute_epsilon([*whole, *evaluations]),
        final_share=history.compute_share([*whole, *list_unspent(share, history), *history.list_earmarked()]),
        rounds_affordable=count_affordable_rounds(history, plan, share),
        evaluations=len(evaluations),
        evaluation_noise=max((_count_noise(run, tasks, each) for each in evaluations), default=0.0),
        noise_to_signal=per_round,
        run_noise_to_signal=per_round / averaged,
        logit_noise=_compute_logit_noise(run, own_totals),
        v={name: v for name, v in compute_v(run, tasks, own_totals).items() if v is not None},
        forecasts=forecasts,
        hopeless=explain_hopeless(run, tasks, own_totals),
        cache_mib=_estimate_cache(run, sizes, config.cache_bits),
        trunk_parameters={name.removesuffix(".trunk"): width for name, width in sorted(trunks.items())},
        trunk_noise_to_signal=of_trunks,
        run_trunk_noise_to_signal=of_trunks / averaged,
        declines=False,
        warnings=(),
    )
    declines = _declines(any_backbone, joined, plan, outlook)
    against = [] if outlook.hopeless is not None else list_contradictions(run, tasks, own_totals)
    warnings = (*declines, *_warnings(config, joined, outlook), *against)
    return replace(outlook, declines=bool(declines), warnings=warnings)


def as_json(outlook: RunPlan) -> dict[str, Any]:
    """The outlook as plain values; an infinite epsilon is null, and `infinite` says so."""
    epsilons = ("spent_epsilon", "round_epsilon", "run_epsilon", "evaluation_epsilon", "final_epsilon")
    values = asdict(outlook) | {name: shown(getattr(outlook, name)) for name in epsilons}
    return values | {"final_share": shown(outlook.final_share), "infinite": math.isinf(outlook.final_epsilon)}


def table(outlooks: list[RunPlan]) -> Table:
    """The outlooks side by side, each epsilon rounded up: a site a column, or many alike."""
    first = outlooks[0]
    title = f"plan: {first.rounds} round(s); epsilon per {first.unit}, {first.relation}, delta {first.delta:g}"
    rows = _ROWS | (_PLACES_ROWS if any(each.cache_mib for each in outlooks) else {})
    rows |= _TRUNK_ROWS if any(each.trunk_parameters for each in outlooks) else {}
    columns = [(each.site, tuple(cell(each) for cell in rows.values())) for each in outlooks]
    if len(columns) > _MOST_COLUMNS:
        alike: dict[tuple[str, ...], list[str]] = {}
        for site, cells in columns:
            alike.setdefault(cells, []).append(site)
        columns = [(list_some(sites, 1), cells) for cells, sites in alike.items()]
    kept = columns[:_MOST_COLUMNS]
    made = Table("", *(site for site, _ in kept), title=title, title_justify="left")
    for line in zip(rows, *(cells for _, cells in kept), strict=True):
        made.add_row(*line)
    if len(columns) > len(kept):
        made.caption = f"left out: {len(columns) - len(kept)} column(s) of sites with other numbers; `--json` has all"
    return made


LEGEND = """\
epsilon at end   of the run, its evaluations and what was spent before, composed; beyond the budget the site declines
affords rounds   how many such rounds the budget pays for
count noise      standard deviation of the noise in each count of an evaluation, in units
noise/signal     of one round: expected length of its noise over that of the largest signal this site could give;
  over the run   the same averaged over all sites and rounds. Where this row is above 1 the result may be poor and a
                 warning says so; one round may be above 1. Below 1 nothing is promised, for true signals are smaller
noise on a logit deviation of what the noise of the whole run adds to an output for a record; what training adds is to
                 be larger. It follows from the settings, and where `auto` chose them it is about 0.5 for any run
features on disk of the declared units, where a record has features at many places; beyond the site file's
                 `cache_limit_gib` nothing is encoded
trunk            the same of what trains of a backbone (`trainable`), alone: above 1 over the run a warning says so"""
"""Meanings of those rows of `table` that do not speak for themselves."""


_MOST_COLUMNS = 8
"""Number of columns of numbers that a terminal shows."""


def _shown_up(epsilon: float) -> str:
    return f"{round_up(epsilon):g}"


_ROWS: dict[str, Callable[[RunPlan], str]] = {
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
    "noise on a logit": lambda each: "-" if each.logit_noise is None else f"{each.logit_noise:.2f}",
}

_PLACES_ROWS: dict[str, Callable[[RunPlan], str]] = {
    "features on disk": lambda each: f"{sum(each.cache_mib.values()):,} MiB",
}

_TRUNK_ROWS: dict[str, Callable[[RunPlan], str]] = {
    "trunk parameters": lambda each: ", ".join(f"{width:,}" for width in each.trunk_parameters.values()) or "-",
    "trunk noise/signal": lambda each: f"{each.trunk_noise_to_signal:.2f}",
    "  trunk over the run": lambda each: f"{each.run_trunk_noise_to_signal:.2f}",
}


def _estimate_cache(run: RunConfig, sizes: Mapping[str, int], bits: CacheBits) -> dict[str, int]:
    """Returns the MiB that the cached features of a site's declared units take, of each backbone with places."""
    estimates: dict[str, int] = {}
    for task in run.tasks:
        name, size = run.backbone_of(task), sizes.get(task, 0)
        num_bytes = size * count_bytes_of_places(run.backbone_specs[name], bits)
        if num_bytes:
            estimates[name] = max(estimates.get(name, 1), num_bytes >> 20)
    return estimates


def _noise_to_signal(plan: Plan, num_parameters: int, size: int) -> float:
    """Returns the ratio of one round, as derived above; 0 without privacy or without anything to train."""
    if not plan.private or not size:
        return 0.0
    return plan.noise_multiplier * math.sqrt(num_parameters / plan.steps) / (plan.sampling_rate * size)


def _compute_logit_noise(run: RunConfig, totals: Mapping[str, Totals]) -> float | None:
    """Returns the noise on a logit of the task where it is largest; None where steps do not follow from the noise."""
    if run.requested_privacy is None:
        return None
    found = {name: read_momentum(run, name) for name in totals}
    noises = [
        each.compute_logit_noise(
            totals[name].num_units,
            run.count_noises(totals[name].num_sites),
            run.aggregation.select_adjustment(name),
        )
        for name, each in found.items()
        if each
    ]
    return max(noises, default=None)


def _forecast(run: RunConfig, task: str, total: Totals) -> Forecast | None:
    """Returns the accuracy that privacy will cost a task; None where there is no forecast."""
    num_features = feature_dim(run.backbone_specs[run.backbone_of(task)])
    return forecast_loss(run, task, num_features, total.num_units, total.num_sites)


def describe_forecasts(outlooks: Sequence[RunPlan]) -> list[str]:
    """Returns one line for each task that has a v or a forecast: of the site where it is worst, where they differ."""
    worst: dict[str, Forecast] = {}
    least: dict[str, float] = {}
    for outlook in outlooks:
        for name, forecast in outlook.forecasts.items():
            worst[name] = max(worst.get(name, forecast), forecast, key=lambda each: each.most)
        for name, v in outlook.v.items():
            least[name] = min(least.get(name, v), v)
    lines = [
        f"v: {name}: {v:.1f} (mu N / (s C)); at this v privacy cost about {estimate_points(v):.0f} points on CIFAR-10, "
        "the hardest set measured"
        for name, v in least.items()
    ]
    return lines + [
        f"expected: {name}: privacy costs {100 * each.least:.0f} to {100 * each.most:.0f} points of accuracy, by how "
        "hard its records are to tell apart"
        for name, each in worst.items()
    ]


def _evaluations(run: RunConfig, share: NoisedEvaluation | None, history: History, num_tasks: int) -> list[Mechanism]:
    """Those the run asks for, as far as the share pays for them."""
    if run.evaluation is None or share is None or num_tasks == 0:
        return []
    answered = min(run.evaluation.times(run.rounds), count_evaluations_left(share, history))
    return [make_evaluation_mechanism(share, history.terms, num_tasks)] * answered


def _count_noise(run: RunConfig, tasks: Mapping[str, Task], mechanism: Mechanism) -> float:
    """The largest standard deviation of the noise over the tasks, in a count where each unit is one."""
    assert mechanism.sensitivity is not None and run.evaluation is not None
    released = [make_released_statistic(task, calibrate=run.evaluation.calibrate) for task in tasks.values()]
    return mechanism.noise_multiplier * mechanism.sensitivity * max(statistic.bound for statistic in released)


def _declines(config: SiteConfig, joined: Joined, plan: Plan, outlook: RunPlan) -> list[str]:
    """Why the site would decline the run.

    Args:
        config: the site's file.
        joined: the run.
        plan: the plan of one round.
        outlook: what was found of the run so far.
        affords: whether the budget covers it.
    """
    found = []
    if not outlook.tasks:
        found.append("the site would decline: it has none of the run's tasks")
    try:
        check_allowed(config, joined)
        find_sum_rules(config, joined)
        tasks = joined.tasks(config)
        refuse_what_does_not_fit(joined.run, tasks)
        units = max(joined.sizes(config).values(), default=0)
        refuse_what_takes_too_long(plan, num_parameters(joined.run, tasks), units)
    except SiteDeclined as declined:
        found.append(f"the site would decline: {declined.detail}")
    except BadInput as error:
        found.append(f"the site would decline: {error}")
    if joined.run.requested_privacy is not None and outlook.final_share > TOLERANCE:
        held = "" if config.evaluation == "local" else ", of which a share is held for evaluations"
        found.append(
            f"the site would decline: {round_up(100.0 * outlook.final_share, 1):g} % of the budget of epsilon "
            f"{outlook.budget_epsilon:g}{held} would be used; the rest affords {outlook.rounds_affordable} of "
            f"{outlook.rounds} round(s)"
        )
    return found


def _warnings(config: SiteConfig, joined: Joined, outlook: RunPlan) -> list[str]:
    """Why its result cannot be what was asked for."""
    found = []
    for name, task in joined.tasks(config).items():
        try:
            check_values(name, task, config.tasks[name])
        except BadInput as error:
            found.append(f"{error}; records with that value would be left out")
    asked = joined.run.evaluation
    if asked is not None and config.evaluation == "local":
        found.append("the site would send no evaluation: its file says `local`")
    elif asked is not None and outlook.evaluations < asked.times(outlook.rounds):
        found.append(
            f"the run asks for {asked.times(outlook.rounds)} evaluation(s), the share pays for {outlook.evaluations}; "
            "the site would decline the others"
        )
    if joined.run.requested_privacy is None:
        return [*found, "the run is not private: epsilon is infinite"]
    target = joined.run.requested_privacy.target_epsilon
    if target is not None and outlook.run_epsilon > target * (1.0 + 1e-9):
        found.append(
            f"at the site's delta of {outlook.delta:g} the run costs epsilon {round_up(outlook.run_epsilon):g}, more "
            f"than the {target:g} asked for at delta {joined.run.requested_privacy.delta:g}"
        )
    if outlook.hopeless is not None:
        found.append(outlook.hopeless)
    elif outlook.run_noise_to_signal > 1.0:
        found.append(
            f"the result may be far below one without privacy: the noise of the whole run is "
            f"{outlook.run_noise_to_signal:.1f} times its largest possible signal; use more units, fewer features or "
            "parameters, or a larger epsilon"
        )
    if outlook.run_trunk_noise_to_signal > 1.0:
        widths = " and ".join(f"{width:,} of {name}" for name, width in outlook.trunk_parameters.items())
        found.append(
            f"what trains of the backbone gets more noise than signal: in its parameters ({widths}) the noise of the "
            f"whole run is {outlook.run_trunk_noise_to_signal:.1f} times the largest possible signal; heads alone may "
            "do better: train fewer blocks or by lora, with more units, or at a larger epsilon"
        )
    return found
