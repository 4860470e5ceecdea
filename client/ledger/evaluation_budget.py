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
from client.ledger.history import EVALUATION, History, Terms
from common.privacy.accounting import Mechanism
from common.privacy.gaussian import gdp_mu

_TOLERANCE = 1.0 + 1e-9
"""Rounding of sums, so that the last of `evaluations` equal parts is not refused."""


def noise_multiplier(share: NoisedEvaluation, terms: Terms) -> float:
    """Of one evaluation under a ledger's terms."""
    return math.sqrt(share.evaluations / share.share) / gdp_mu(terms.epsilon_cap, terms.delta)


def evaluation_mechanism(share: NoisedEvaluation, terms: Terms, num_tasks: int) -> Mechanism:
    """One evaluation of so many tasks: each task's statistics of a unit have length 1 at most, jointly its root."""
    return Mechanism(
        kind="gaussian",
        noise_multiplier=noise_multiplier(share, terms),
        sampling_rate=1.0,
        steps=1,
        sensitivity=math.sqrt(num_tasks),
    )


def within_share(share: NoisedEvaluation, history: History, mechanism: Mechanism) -> bool:
    """Whether the share covers one more evaluation beside those that were charged."""
    return _spent(history) + _square(mechanism) <= _whole(share, history.terms) * _TOLERANCE


def evaluations_left(share: NoisedEvaluation, history: History) -> int:
    """How many evaluations the share still pays for."""
    left = _whole(share, history.terms) * _TOLERANCE - _spent(history)
    return max(0, math.floor(left / _square(evaluation_mechanism(share, history.terms, 1))))


def unspent(share: NoisedEvaluation | None, history: History) -> list[Mechanism]:
    """What training has to leave affordable: the share's rest as one release; nothing where there is no share."""
    if share is None:
        return []
    left = _whole(share, history.terms) - _spent(history)
    if left <= _whole(share, history.terms) * (_TOLERANCE - 1.0):
        return []
    return [Mechanism("gaussian", left**-0.5, 1.0, 1, 1.0)]


def _whole(share: NoisedEvaluation, terms: Terms) -> float:
    return share.share * gdp_mu(terms.epsilon_cap, terms.delta) ** 2


def _spent(history: History) -> float:
    """mu^2 of all evaluations that were charged, of whatever run and under whatever share."""
    return math.fsum(_square(charge.mechanism) for charge in history.charges.values() if charge.purpose == EVALUATION)


def _square(mechanism: Mechanism) -> float:
    return mechanism.steps / mechanism.noise_multiplier**2
