"""The part of a budget that evaluations of held-out units may spend, and nothing else may.

In Gaussian DP costs add up as mu^2 (Dong, Roth, Su 2022). With mu(cap) that of the whole budget, the share is

    share * mu(cap)^2, in `evaluations` equal releases: mu_e^2 = share * mu(cap)^2 / evaluations,

each one full-batch Gaussian of noise multiplier 1 / mu_e = sqrt(evaluations / share) / mu(cap).

Rules: an evaluation beyond the share is refused, however much else is left; a training charge is refused unless the
share's unspent part still fits under the cap beside it. All of it is composed with the whole history, as ever.
"""

from __future__ import annotations

import math

from client.config import NoisedEvaluation
from client.ledger.events import EVALUATION, Terms
from client.ledger.history import History
from common.privacy.accounting import Mechanism
from common.privacy.gaussian import gdp_mu

_TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that the last of `evaluations` equal parts is not refused."""


def compute_evaluation_noise(evaluation_budget: NoisedEvaluation, terms: Terms) -> float:
    """Returns the noise multiplier of one evaluation under a ledger's terms."""
    ratio = evaluation_budget.evaluations / evaluation_budget.share
    return math.sqrt(ratio) / gdp_mu(terms.epsilon_cap, terms.delta)


def make_evaluation_mechanism(evaluation_budget: NoisedEvaluation, terms: Terms, num_tasks: int) -> Mechanism:
    """Returns the mechanism of one evaluation.

    Args:
        evaluation_budget: the part of the budget that evaluations may spend.
        terms: terms of the ledger that is charged.
        num_tasks: number of tasks evaluated together. Each task's statistics of one unit have an L2 norm of at most 1;
            all together of at most the root of their number.
    """
    return Mechanism(
        kind="gaussian",
        noise_multiplier=compute_evaluation_noise(evaluation_budget, terms),
        sampling_rate=1.0,
        steps=1,
        sensitivity=math.sqrt(num_tasks),
    )


def covers_evaluation(evaluation_budget: NoisedEvaluation, history: History, mechanism: Mechanism) -> bool:
    """Returns true if the part of the budget covers one more evaluation beside those that were charged.

    Args:
        evaluation_budget: the part of the budget held for evaluations.
        history: charges so far.
        mechanism: mechanism of the further evaluation.
    """
    whole = _compute_whole(evaluation_budget, history.terms)
    return _compute_spent(history) + _compute_cost(mechanism) <= whole * _TOLERANCE


def count_evaluations_left(evaluation_budget: NoisedEvaluation, history: History) -> int:
    """Returns the number of evaluations that the part of the budget still pays for."""
    left = _compute_whole(evaluation_budget, history.terms) * _TOLERANCE - _compute_spent(history)
    return max(0, math.floor(left / _compute_cost(make_evaluation_mechanism(evaluation_budget, history.terms, 1))))


def list_unspent(evaluation_budget: NoisedEvaluation | None, history: History) -> list[Mechanism]:
    """Returns what training has to leave affordable: the unspent part as one release; nothing where none is held."""
    if evaluation_budget is None:
        return []
    whole = _compute_whole(evaluation_budget, history.terms)
    left = whole - _compute_spent(history)
    if left <= whole * (_TOLERANCE - 1.0):
        return []
    return [Mechanism("gaussian", left**-0.5, 1.0, 1, 1.0)]


def _compute_whole(evaluation_budget: NoisedEvaluation, terms: Terms) -> float:
    """Returns mu^2 of all that evaluations may spend."""
    return evaluation_budget.share * gdp_mu(terms.epsilon_cap, terms.delta) ** 2


def _compute_spent(history: History) -> float:
    """Returns mu^2 of all evaluations that were charged, of whatever run and under whatever part of the budget."""
    charged = [charge.mechanism for charge in history.charges.values() if charge.purpose == EVALUATION]
    return math.fsum(map(_compute_cost, charged))


def _compute_cost(mechanism: Mechanism) -> float:
    """Returns mu^2 of a mechanism at full batch."""
    return mechanism.steps / mechanism.noise_multiplier**2
