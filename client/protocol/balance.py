"""The balance of a population: spent, left, and what the rest affords. Nothing is charged, opened or created."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from client.config import NoisedEvaluation, SiteConfig
from client.ledger.evaluation_budget import compute_evaluation_noise, count_evaluations_left, list_unspent
from client.ledger.events import EVALUATION, Terms
from client.ledger.history import History
from client.protocol.site import Joined, find_ledger, make_plan, read_first_round
from common.offers import parse_offer
from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.run import RunConfig
from common.types import Plan

MAX_ROUNDS = 100_000
"""Most rounds that a run file may ask for."""


@dataclass(frozen=True)
class RunSpent:
    """One run's own part. Parts do not add up to the whole: the whole is composed at once.

    Attributes:
        run: its id.
        epsilon: of its charges alone.
        rounds: distinct rounds of training that were charged.
        evaluations: distinct rounds after which an evaluation was charged.
        charges: reservations; more than `rounds` where a round was charged again.
        open: reservations whose reply is not known to be stored; they count all the same.
    """

    run: str
    epsilon: float
    rounds: int
    evaluations: int
    charges: int
    open: int


@dataclass(frozen=True)
class Affordable:
    """The rounds that the rest of the budget covers: rounds of one plan, at most MAX_ROUNDS."""

    run: str
    rounds: int
    plan: Plan


@dataclass(frozen=True)
class EvaluationBudget:
    """The budget that evaluations of held-out units may spend.

    Attributes:
        share: of the budget, in Gaussian-DP terms (client/ledger/evaluation_budget.py).
        evaluations: that it pays for in all.
        left: that it still pays for.
        noise_multiplier: of one.
        spent_epsilon: of all that were charged, by themselves.
    """

    share: float
    evaluations: int
    left: int
    noise_multiplier: float
    spent_epsilon: float


@dataclass(frozen=True)
class Balance:
    """A registry's account.

    Attributes:
        registry: whose.
        terms: unit, cap, delta, relation, as the ledger says.
        spent_epsilon: of what was committed.
        reserved_epsilon: of all that may have left, the committed included.
        runs: in order of their first charge.
        affordable: for the last run's plan or another; None without any.
        amendment_due: whether the site file says other terms than the ledger.
        used_share: part of the budget that the privacy filter counts as used; it decides, the epsilons are shown.
        earmarks: runs that the site joined and for which what is left of their price is held.
        held_share: part of the budget that is held for them.
        filter: the filter, such as `gdp` or `renyi at order 7`; None where a recovery counts the whole cap as spent.
        evaluation: the share for evaluations; None where held-out units are evaluated locally.
    """

    registry: str
    terms: Terms
    spent_epsilon: float
    reserved_epsilon: float
    runs: tuple[RunSpent, ...]
    affordable: Affordable | None
    amendment_due: bool
    evaluation: EvaluationBudget | None
    used_share: float
    filter: str | None
    earmarks: tuple[str, ...]
    held_share: float

    @property
    def left_epsilon(self) -> float:
        """Cap minus everything that may have left, never below 0."""
        return max(0.0, self.terms.epsilon_cap - self.reserved_epsilon)


def history_of(config: SiteConfig) -> History:
    """The history of a site's registry; an empty one under the site file's terms where there is no ledger yet.

    Raises:
        BadInput: there are two ledgers of it.
        LedgerDamaged: it does not verify, or is gone from a site that has answered before.
    """
    ledger = find_ledger(config)
    return History(read_terms(config), {}) if ledger is None else ledger.history()


def read_terms(config: SiteConfig) -> Terms:
    """Returns the terms of the site file as it is now."""
    return Terms(config.unit, config.budget.epsilon, config.budget.delta, filter=config.budget.filter)


def balance(config: SiteConfig, run: RunConfig | None = None) -> Balance:
    """The account of a site's registry.

    Args:
        config: the site's file.
        run: whose plan to count affordable rounds of; by default that of the run charged last.

    Raises:
        LedgerDamaged: the ledger does not verify.
        SiteDeclined: `run` has no plan here.
    """
    history, share = history_of(config), get_evaluation_budget(config)
    joined = _last_run(config, history) if run is None else Joined(run.name, run, {}, config.state_dir)
    return Balance(
        registry=config.registry,
        terms=history.terms,
        spent_epsilon=history.compute_epsilon(committed_only=True),
        reserved_epsilon=history.compute_epsilon(),
        runs=tuple(_run(history, name) for name in dict.fromkeys(charge.run for charge in history.charges.values())),
        affordable=None if joined is None else _affordable(config, history, joined),
        amendment_due=history.terms != read_terms(config),
        evaluation=None if share is None else evaluation_share(share, history),
        used_share=history.compute_share(),
        filter=_describe_filter(history),
        earmarks=tuple(history.earmarks),
        held_share=history.compute_share(history.list_earmarked()) - history.compute_share(),
    )


def get_evaluation_budget(config: SiteConfig) -> NoisedEvaluation | None:
    """Returns the part of the budget that a site's file holds for evaluations; None where they are local."""
    return None if config.evaluation == "local" else config.evaluation


def find_largest_epsilon(config: SiteConfig, make: Callable[[float], Mechanism], wanted: float) -> float:
    """Returns the wanted epsilon if a site's budget covers its release, else the largest that it covers.

    Args:
        config: the site file.
        make: epsilon -> its release; a smaller epsilon costs less.
        wanted: the wanted epsilon, above 0.

    Returns:
        The epsilon, a smaller one in whole hundredths; 0 where not even 0.01 is covered.

    Raises:
        BadInput: there are two ledgers of the site's population.
        LedgerDamaged: its ledger does not verify.
    """
    history = history_of(config)
    held = [*list_unspent(get_evaluation_budget(config), history), *history.list_earmarked()]

    def covers(epsilon: float) -> bool:
        return history.is_within_cap([make(epsilon), *held])

    if covers(wanted):
        return wanted
    low, high = 0, math.ceil(100.0 * wanted)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if covers(middle / 100.0) else (low, middle)
    return low / 100.0


def explain_largest_epsilon(largest: float) -> str:
    """Returns the end of a refusal: the largest epsilon that a budget covers, by `find_largest_epsilon`."""
    return f"the largest epsilon that fits is {largest:g}" if largest else "no epsilon from 0.01 on fits"


def evaluation_share(share: NoisedEvaluation, history: History) -> EvaluationBudget:
    """Returns the state of the evaluation budget after a history."""
    charged = [charge.mechanism for charge in history.charges.values() if charge.purpose == EVALUATION]
    return EvaluationBudget(
        share=share.share,
        evaluations=share.evaluations,
        left=count_evaluations_left(share, history),
        noise_multiplier=compute_evaluation_noise(share, history.terms),
        spent_epsilon=compute_epsilon(charged, history.terms.delta),
    )


def count_affordable_rounds(history: History, plan: Plan, share: NoisedEvaluation | None = None) -> int:
    """Returns the number of rounds that the rest of the budget covers, at most MAX_ROUNDS; 0 without privacy.

    Args:
        history: charges so far.
        plan: public numbers of one round.
        share: part of the budget held for evaluations; None for none.

    What is unspent of a share for evaluations stays held back.
    """
    held = [*list_unspent(share, history), *history.list_earmarked()]

    def covers(rounds: int) -> bool:
        return history.is_within_cap([Mechanism.of(plan.over(rounds)), *held])

    if not plan.private or not covers(1):
        return 0
    low, high = 1, 2
    while high <= MAX_ROUNDS and covers(high):
        low, high = high, 2 * high
    high = min(high, MAX_ROUNDS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if covers(middle) else (low, middle)
    return low


def as_json(account: Balance) -> dict[str, Any]:
    """The account as plain values; an infinite epsilon is null, and `infinite` says so."""
    affordable = account.affordable
    return {
        "registry": account.registry,
        "unit": account.terms.unit.value,
        "relation": account.terms.relation,
        "delta": account.terms.delta,
        "budget_epsilon": account.terms.epsilon_cap,
        "spent_epsilon": shown(account.spent_epsilon),
        "reserved_epsilon": shown(account.reserved_epsilon),
        "left_epsilon": round_down(account.left_epsilon),
        "infinite": math.isinf(account.reserved_epsilon),
        "amendment_due": account.amendment_due,
        "filter": account.filter,
        "used_share": shown(account.used_share),
        "earmarks": list(account.earmarks),
        "held_share": shown(account.held_share),
        "runs": [
            {
                "run": run.run,
                "epsilon": shown(run.epsilon),
                "infinite": math.isinf(run.epsilon),
                "rounds": run.rounds,
                "evaluations": run.evaluations,
                "charges": run.charges,
                "open": run.open,
            }
            for run in account.runs
        ],
        "affordable": None
        if affordable is None
        else {
            "run": affordable.run,
            "rounds": affordable.rounds,
            "noise_multiplier": affordable.plan.noise_multiplier,
            "sampling_rate": affordable.plan.sampling_rate,
            "steps": affordable.plan.steps,
        },
        "evaluation": "local"
        if account.evaluation is None
        else {**asdict(account.evaluation), "spent_epsilon": shown(account.evaluation.spent_epsilon)},
    }


def shown(epsilon: float) -> float | None:
    """An epsilon for JSON: rounded up; None where it is infinite."""
    return round_up(epsilon, 4) if math.isfinite(epsilon) else None


def round_down(value: float, digits: int = 4) -> float:
    """Returns a rest for display, never larger than it is."""
    return -round_up(-value, digits) + 0.0


def _run(history: History, name: str) -> RunSpent:
    own = [charge for charge in history.charges.values() if charge.run == name]
    return RunSpent(
        run=name,
        epsilon=history.compute_run_epsilon(name),
        rounds=len({charge.round for charge in own if charge.purpose != EVALUATION}),
        evaluations=len({charge.round for charge in own if charge.purpose == EVALUATION}),
        charges=len(own),
        open=sum(not charge.committed for charge in own),
    )


def _describe_filter(history: History) -> str | None:
    chosen = history.find_filter()
    if chosen is None or chosen.order is None:
        return None if chosen is None else chosen.kind
    return f"{chosen.kind} at order {chosen.order}"


def _last_run(config: SiteConfig, history: History) -> Joined | None:
    """The run charged last that is still on disk and trains something."""
    for charge in reversed(list(history.charges.values())):
        folder = config.locate_run(charge.run)
        if (folder / "offer.json").exists():
            offer = parse_offer((folder / "offer.json").read_bytes(), str(folder / "offer.json"))
            run = offer.run_config(folder)
            if run.choice is None:
                return Joined(charge.run, run, offer.backbones, folder, read_first_round(folder))
    return None


def _affordable(config: SiteConfig, history: History, joined: Joined) -> Affordable:
    plan = make_plan(config, joined)
    return Affordable(joined.run_id, count_affordable_rounds(history, plan, get_evaluation_budget(config)), plan)
