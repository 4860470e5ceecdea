"""Checks of what a choice asks of its sites, by public numbers before anything is encoded: sizes, then budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from client.config import SiteConfig
from client.protocol.balance import explain_largest_epsilon, find_largest_epsilon
from common.privacy.accounting import Mechanism
from common.privacy.gaussian import gdp_epsilon
from common.run import Name
from common.scorers import Scorer, compute_min_epsilon, compute_min_size
from common.types import BadInput, BudgetExhausted
from simulations.choice.moments import MIN_SIGNAL, MomentQuestion, compute_signal

MakeRelease = Callable[[float], Mechanism]
"""Epsilon -> the release that costs it."""


def select_voters(sites: Sequence[SiteConfig], task: Name, scorer: Scorer, epsilon: float) -> list[SiteConfig]:
    """Returns the sites that declare enough units to vote.

    Args:
        sites: the sites that have the task.
        task: name of the task.
        scorer: what a vote minimises.
        epsilon: pure epsilon of a vote.

    Raises:
        BadInput: no site declares enough units.
        BudgetExhausted: a site's budget does not cover its vote.
    """

    def make(each: float) -> Mechanism:
        return Mechanism.of_choice(each, scorer.sensitivity)

    least = compute_min_size(scorer, epsilon)
    voting = [site for site in sites if site.tasks[task].public_size >= least]
    if not voting:
        largest = max(sites, key=lambda site: site.tasks[task].public_size)
        size = largest.tasks[task].public_size
        needed = compute_min_epsilon(scorer, size)
        raise BadInput(
            f"--epsilon {epsilon:g}: expected a site that declares at least {least:,} units, below which a vote is "
            f"mostly noise, got at most {size:,}, for which epsilon {needed:g} is needed, "
            f"{_compare(largest, make, needed, lambda each: compute_min_size(scorer, each))}; rank on public records "
            "with --proxy"
        )
    _check_budgets(voting, make, epsilon)
    return voting


def check_sums(sites: Sequence[SiteConfig], question: MomentQuestion) -> None:
    """Checks that sums over all sites stand out of their noise, and that each site can pay its part.

    Args:
        sites: the sites that have the task.
        question: the question.

    Raises:
        BadInput: noise would decide.
        BudgetExhausted: a site's budget does not cover its part.
    """

    def make(epsilon: float) -> Mechanism:
        return replace(question, epsilon=epsilon).mechanism

    sizes = [site.tasks[question.name].public_size for site in sites]

    def count_needed(epsilon: float) -> int:
        return math.ceil(sum(sizes) * MIN_SIGNAL / compute_signal(replace(question, epsilon=epsilon), sizes))

    signal = compute_signal(question, sizes)
    if signal < MIN_SIGNAL:
        needed = math.ceil(100.0 * gdp_epsilon(question.mu * MIN_SIGNAL / signal, question.delta)) / 100.0
        raise BadInput(
            f"--epsilon {question.epsilon:g}: expected sites that declare at least {count_needed(question.epsilon):,} "
            f"units together, below which the sums are mostly noise, got {sum(sizes):,}, for which epsilon {needed:g} "
            f"is needed, {_compare(sites[0], make, needed, count_needed)}; rank on public records with --proxy"
        )
    _check_budgets(sites, make, question.epsilon)


def _compare(site: SiteConfig, make: MakeRelease, needed: float, count: Callable[[float], int]) -> str:
    """Returns whether a site's budget covers an epsilon that is needed, and which size is needed at what it covers."""
    covered = find_largest_epsilon(site, make, needed)
    budget = f"the budget of epsilon {site.budget.epsilon:g} of {site.name}"
    if covered == needed:
        return f"which {budget} covers"
    if covered == 0.0:
        return f"and {budget} covers none"
    return f"more than the {covered:g} that {budget} covers, at which {count(covered):,} units are needed"


def _check_budgets(sites: Sequence[SiteConfig], make: MakeRelease, epsilon: float) -> None:
    largest = {site.name: find_largest_epsilon(site, make, epsilon) for site in sites}
    site = min(sites, key=lambda each: largest[each.name])
    if largest[site.name] < epsilon:
        held = "" if site.evaluation == "local" else ", of which a part is held for evaluations,"
        raise BudgetExhausted(
            f"--epsilon {epsilon:g}: the budget of epsilon {site.budget.epsilon:g} of {site.name}{held} does not cover "
            f"it; {explain_largest_epsilon(largest[site.name])}"
        )
