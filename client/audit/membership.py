"""Membership inference on a finished model: how well scores tell units that trained it from others, and what may be.

The promise bounds every attack. With full-batch Gaussian noise the releases of a run are together one Gaussian
mechanism, and no test of "this unit took part" has a larger true positive rate than Phi(Phi^-1(FPR) + mu) (Dong, Roth,
Su 2022); otherwise none has more than (epsilon, delta) allows (Kairouz, Oh, Viswanath 2015, Theorem 2.1). The bounds
hold for each unit, and so for the mean over units which the attacks measure.

# Shapes: M members, N others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from client.audit.statistics import Floats, bound_rate
from common.events import Interval
from common.exports.parts.evidence import AttackRate
from common.privacy.accounting import Mechanism
from common.types import BadInput

FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
_NORMAL_95 = 1.959963984540054
_TAIL = 0.025


@dataclass(frozen=True)
class Scores:
    """Scores of an attack, one for each unit; the larger, the more the attack takes the unit for a member.

    Attributes:
        member_M: scores of units that took part in training.
        other_N: scores of units that did not.
        threshold: score above which the attack says "member"; chosen without looking at who is one.
    """

    member_M: Floats
    other_N: Floats
    threshold: float

    def __post_init__(self) -> None:
        if min(len(self.member_M), len(self.other_N)) < 2:
            raise BadInput("expected at least two members and two held-out units to attack, got fewer")
        if not (np.isfinite(self.member_M).all() and np.isfinite(self.other_N).all()):
            raise BadInput("expected finite scores of an attack, got others")


@dataclass(frozen=True)
class Promise:
    """The trade-off between the error rates of any attack on one unit that a run's releases allow.

    Attributes:
        epsilon: epsilon of the releases; infinite without noise.
        delta: its delta.
        mu: parameter of the Gaussian mechanism that they are together; None where records were sampled.
    """

    epsilon: float
    delta: float
    mu: float | None = None

    @classmethod
    def of(cls, mechanisms: Sequence[Mechanism], epsilon: float, delta: float) -> Promise:
        """Returns the promise of releases.

        Args:
            mechanisms: the releases.
            epsilon: their epsilon, composed.
            delta: its delta.
        """
        whole = all(each.kind == "gaussian" and each.sampling_rate == 1.0 for each in mechanisms)
        terms = [each.steps / each.noise_multiplier**2 for each in mechanisms] if whole else []
        return cls(epsilon, delta, math.sqrt(math.fsum(terms)) if whole else None)

    def bound_rate(self, false_positive_rate: float) -> float:
        """Returns the largest true positive rate at a false positive rate."""
        return float(self._bound_rates(np.array([false_positive_rate]))[0])

    @cached_property
    def auc(self) -> float:
        """The largest area under the curve of true over false positive rates."""
        if self.mu is not None:
            return float(ndtr(self.mu / math.sqrt(2.0)))
        rates = np.linspace(0.0, 1.0, 100_001)
        bounds = self._bound_rates(rates)
        # The bound is concave: chords lie below it, so the larger end of each step is taken.
        return min(1.0, float(np.sum(bounds[1:]) / (len(rates) - 1)))

    def _bound_rates(self, rates: Floats) -> Floats:
        if self.mu is not None:
            inner = np.clip(rates, 1e-300, 1.0)
            bounds = np.where(rates <= 0.0, 0.0, np.where(rates >= 1.0, 1.0, ndtr(ndtri(inner) + self.mu)))
            return np.asarray(bounds)
        if math.isinf(self.epsilon):
            return np.ones_like(rates)
        # Above 700 the exponential overflows, and every rate is allowed.
        steep = rates * math.exp(min(self.epsilon, 700.0)) + self.delta
        flat = 1.0 - math.exp(-self.epsilon) * (1.0 - self.delta - rates)
        return np.minimum(1.0, np.minimum(steep, flat))


def compute_auc(scores: Scores) -> tuple[float, Interval]:
    """Returns the probability that a member's score is above another's, and its 95 % interval (DeLong et al. 1988)."""
    members, others = len(scores.member_M), len(scores.other_N)
    ranks = rankdata(np.concatenate([scores.member_M, scores.other_N]))
    above_M = (ranks[:members] - rankdata(scores.member_M)) / others
    below_N = 1.0 - (ranks[members:] - rankdata(scores.other_N)) / members
    auc = float(above_M.mean())
    variance = float(above_M.var(ddof=1) / members + below_N.var(ddof=1) / others)
    if variance <= 0.0:
        # Separated, or all equal: the spread that scores without any meaning would have says more than none.
        variance = (members + others + 1) / (12.0 * members * others)
    half = _NORMAL_95 * math.sqrt(variance)
    return auc, (max(0.0, auc - half), min(1.0, auc + half))


def compute_rates(scores: Scores, promise: Promise | None) -> tuple[AttackRate, ...]:
    """Returns the part of the members that is recognised where few others are taken for members.

    Args:
        scores: the attack's scores.
        promise: what the run promises; None without privacy.
    """
    return tuple(_compute_rate(scores, wanted, promise) for wanted in FALSE_POSITIVE_RATES)


def _compute_rate(scores: Scores, wanted: float, promise: Promise | None) -> AttackRate:
    allowed = math.floor(wanted * len(scores.other_N) + 1e-9)
    threshold = np.sort(scores.other_N)[::-1][allowed]
    alarms = int((scores.other_N > threshold).sum())
    hits = int((scores.member_M > threshold).sum())
    bound = None if promise is None else promise.bound_rate(max(wanted, alarms / len(scores.other_N)))
    return AttackRate(wanted, alarms, hits / len(scores.member_M), bound_part(hits, len(scores.member_M)), bound)


def bound_part(hits: int, trials: int) -> Interval:
    """Returns the 95 % interval of Clopper and Pearson of a probability, from the number of hits in so many trials."""
    upper = float(bound_rate(np.array([hits]), trials, _TAIL)[0])
    return 1.0 - float(bound_rate(np.array([trials - hits]), trials, _TAIL)[0]), upper


def is_contradicted(scores: Scores, promise: Promise | None) -> bool:
    """Returns whether scores show more than the promise allows: at their own threshold, or in their area.

    Each of the two is wrong in at most 5 % of cases where the promise holds.

    Args:
        scores: the attack's scores.
        promise: what the run promises; None without privacy.
    """
    if promise is None:
        return False
    hits, alarms = int((scores.member_M > scores.threshold).sum()), int((scores.other_N > scores.threshold).sum())
    lower = bound_part(hits, len(scores.member_M))[0]
    upper = bound_part(alarms, len(scores.other_N))[1]
    return lower > promise.bound_rate(upper) or compute_auc(scores)[1][0] > promise.auc
