"""Statistics of the privacy audit: what canaries' scores, released noise and participation say about a claimed epsilon.

A claim can only be refuted here: each bound holds with its confidence, and each conformance test raises a false alarm
with at most the stated probability. What is measured, and how, is `client/audit/audit.py`.

# Shapes: S steps, M canaries, W weights (rows) x F features (columns) that no record touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import beta, binom, chi2, gamma

from common.privacy.gaussian import gdp_epsilon

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FALSE_ALARM = 1e-7
"""Probability with which each tail of one conformance test alarms although everything is right."""


# --- epsilon from canaries -------------------------------------------------------------------------------------------


def canary_scores(signal_SM: Floats, noise_multiplier: float, sampling_rate: float) -> Floats:
    """score_M: log-likelihood ratio of "this canary was among the records" to "it was not".

    Args:
        signal_SM: released sums along each canary's own direction, in units of the clip norm: normal with the noise
            multiplier as standard deviation, around 1 in the steps in which the canary takes part, else around 0.
        noise_multiplier: as claimed.
        sampling_rate: as claimed.
    """
    exponent_SM = (signal_SM - 0.5) / noise_multiplier**2
    if sampling_rate == 1.0:
        return np.asarray(exponent_SM.sum(axis=0))
    mixed_SM = np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + exponent_SM)
    return np.asarray(mixed_SM.sum(axis=0))


@dataclass(frozen=True)
class Canaries:
    """Scores of canaries, and which of them were among the records (an independent coin of 1/2 for each).

    Thresholds are chosen on the first half and judged on the second, so that choosing costs no confidence.
    """

    score_M: Floats
    included_M: Bools

    def halves(self) -> tuple[Canaries, Canaries]:
        """The canaries that choose and those that judge."""
        half = len(self.score_M) // 2
        return Canaries(self.score_M[:half], self.included_M[:half]), Canaries(
            self.score_M[half:], self.included_M[half:]
        )


def upper_rate(events: NDArray[np.int64], trials: int, error: float) -> Floats:
    """Clopper-Pearson: an upper bound on a probability, wrong with probability at most `error`."""
    if trials == 0:
        return np.ones(len(events))
    return np.where(events < trials, beta.ppf(1.0 - error, events + 1, np.maximum(trials - events, 1)), 1.0)


def lower_epsilon(
    canaries: Canaries, *, delta: float, confidence: float, trade_off: Literal["gaussian", "any"]
) -> float:
    """A lower bound on epsilon at `delta`, false with probability at most 1 - confidence.

    It assumes that canaries do not disturb each other, which orthogonal ones do not.

    Args:
        canaries: scores and the truth.
        delta: of the claim.
        confidence: such as 0.999.
        trade_off: `gaussian` for full batch, where the mechanism is Gaussian and one point of its trade-off curve gives
            all of it: mu >= Phi^-1(1 - FPR) - Phi^-1(FNR) (Nasr et al. 2023); `any` for everything else:
            epsilon >= log((1 - delta - FNR) / FPR) and the same with the errors exchanged (Kairouz et al. 2015).
    """
    choosing, judging = canaries.halves()
    bound = _lower_mu if trade_off == "gaussian" else _lower_any
    thresholds = np.unique(choosing.score_M)
    # The same threshold at every confidence, so that more confidence never shows more.
    best = int(np.argmax(bound(*_error_rates(choosing, thresholds, _CHOOSING_ERROR), delta)))
    # Half each: both error rates are bounded at once.
    rates = _error_rates(judging, thresholds[best : best + 1], (1.0 - confidence) / 2.0)
    value = float(bound(*rates, delta)[0])
    return gdp_epsilon(value, delta) if trade_off == "gaussian" and value > 0.0 else max(value, 0.0)


_CHOOSING_ERROR = 0.01


def _error_rates(canaries: Canaries, thresholds: Floats, error: float) -> tuple[Floats, Floats]:
    """For each threshold upper bounds on both errors of calling every score from it on "included": (FPR, FNR)."""
    inside = np.sort(canaries.score_M[canaries.included_M])
    outside = np.sort(canaries.score_M[~canaries.included_M])
    accused = len(outside) - np.searchsorted(outside, thresholds, side="left")
    missed = np.searchsorted(inside, thresholds, side="left")
    return upper_rate(accused, len(outside), error), upper_rate(missed, len(inside), error)


def _lower_mu(accused: Floats, missed: Floats, delta: float) -> Floats:
    del delta
    informed = (accused < 1.0) & (missed < 1.0)
    return np.where(informed, -ndtri(np.where(informed, accused, 0.5)) - ndtri(np.where(informed, missed, 0.5)), 0.0)


def _lower_any(accused: Floats, missed: Floats, delta: float) -> Floats:
    ratios = np.maximum((1.0 - delta - missed) / accused, (1.0 - delta - accused) / missed)
    return np.asarray(np.log(np.maximum(ratios, 1.0)))


def one_run_epsilon(canaries: Canaries, *, delta: float, confidence: float) -> float:
    """The lower bound of Steinke, Nasr, Jagielski (2023), Theorem 5.2: nothing is assumed about the distribution.

    The share of canaries to guess about, the rest being abstained from, is chosen on the first half.
    """
    choosing, judging = canaries.halves()
    error = 1.0 - confidence
    shares = (0.02, 0.05, 0.1, 0.2, 0.5)
    best = max(shares, key=lambda share: _one_run(choosing, share, delta, error))
    return _one_run(judging, best, delta, error)


def _one_run(canaries: Canaries, share: float, delta: float, error: float) -> float:
    total = len(canaries.score_M)
    each = int(share * total)
    order = np.argsort(canaries.score_M, kind="stable")
    right = int((~canaries.included_M[order[:each]]).sum() + canaries.included_M[order[total - each :]].sum())
    low, high = 0.0, 1.0
    while one_run_p_value(total, 2 * each, right, high, delta) < error:
        low, high = high, high + 1.0
    for _ in range(20):
        middle = (low + high) / 2.0
        refuted = one_run_p_value(total, 2 * each, right, middle, delta) < error
        low, high = (middle, high) if refuted else (low, middle)
    return low if one_run_p_value(total, 2 * each, right, low, delta) < error else 0.0


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of so many right guesses under (epsilon, delta)-DP (Steinke et al. 2023, Appendix D)."""
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, accuracy))
    nearly = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    slack = float((nearly / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + slack * delta * 2 * canaries)


# --- conformance -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseScale:
    """Released noise against its claim.

    Attributes:
        ratio: measured standard deviation / claimed one.
        problems: one sentence for each test that fails.
    """

    ratio: float
    problems: tuple[str, ...]


def noise_scale(noise_SWF: Floats, rows: Mapping[str, int]) -> NoiseScale:
    """Whether released noise, divided by its claimed standard deviation, is standard normal and independent.

    The scale is looked at of all entries together and of each: in a large head's noise a small trunk's would drown.

    Sums along an axis, divided by the root of its length, have variance 1 too where noise is drawn anew along it: a
    key used again shows over steps, one draw for all classes over weights.

    Args:
        noise_SWF: of all entries, one after the other along W.
        rows: entry -> its rows, in that order.
    """
    ratio = float(np.sqrt(np.mean(noise_SWF**2)))
    if not _is_standard(noise_SWF):
        return NoiseScale(
            ratio, (f"released noise has {ratio:.3g} times the standard deviation that is accounted for",)
        )
    problems = []
    parts = np.split(noise_SWF, np.cumsum(list(rows.values()))[:-1], axis=1)
    for name, part in zip(rows, parts, strict=True):
        if not _is_standard(part):
            own = float(np.sqrt(np.mean(part**2)))
            problems.append(
                f"released noise of {name} has {own:.3g} times the standard deviation that is accounted for"
            )
    for axis, what in enumerate(("from step to step", "from weight to weight", "from feature to feature")):
        length = noise_SWF.shape[axis]
        if length > 1 and not _is_standard(noise_SWF.sum(axis=axis) / math.sqrt(length)):
            problems.append(f"released noise repeats itself {what}")
    return NoiseScale(ratio, tuple(problems))


def _is_standard(values: Floats) -> bool:
    energy = float(np.sum(values**2))
    return bool(chi2.ppf(FALSE_ALARM, values.size) <= energy <= chi2.isf(FALSE_ALARM, values.size))


def enough_noise(noise: Floats) -> bool:
    """Whether values are no smaller than standard normals are, whatever they are beyond that."""
    return bool(np.sum(noise**2) >= chi2.ppf(FALSE_ALARM, noise.size))


def participation_problems(took_part_SM: Bools, sampling_rate: float) -> Iterator[str]:
    """What is not as with one independent coin for each unit and step; one sentence each.

    Args:
        took_part_SM: whether each unit was in each step's sample.
        sampling_rate: as claimed.
    """
    if sampling_rate == 1.0:
        if not took_part_SM.all():
            yield "full batch is claimed, and a unit was left out of a step"
        return
    steps, units = took_part_SM.shape
    total = int(took_part_SM.sum())
    tails = binom.cdf(total, steps * units, sampling_rate), binom.sf(total - 1, steps * units, sampling_rate)
    if min(tails) < FALSE_ALARM:
        yield f"units take part with rate {total / (steps * units):.3g}, and {sampling_rate:.3g} is accounted for"
        return
    for counts, trials, what in (
        (took_part_SM.sum(axis=0), steps, "how often a unit takes part"),
        (took_part_SM.sum(axis=1), units, "the size of a sample"),
    ):
        low, high = _dispersion_tails(counts.astype(np.float64), trials, sampling_rate)
        if min(low, high) < FALSE_ALARM:
            yield f"{what} does not vary as with Poisson sampling"


def spread_is_poisson(counts_M: Floats, trials: int, sampling_rate: float) -> bool:
    """Whether units' counts vary at least as much as with independent coins."""
    return sampling_rate == 1.0 or _dispersion_tails(counts_M, trials, sampling_rate)[0] >= FALSE_ALARM


def _dispersion_tails(counts: Floats, trials: int, rate: float) -> tuple[float, float]:
    """Tail probabilities of the counts' squared deviations; the gamma law with their exact mean and variance."""
    variance = trials * rate * (1.0 - rate)
    statistic = float(np.sum((counts - trials * rate) ** 2) / variance)
    # Fourth moment of a binomial: small means have heavier tails than chi-square.
    spread = len(counts) * (2.0 + (1.0 - 6.0 * rate * (1.0 - rate)) / variance)
    law = gamma(a=len(counts) ** 2 / spread, scale=spread / len(counts))
    return float(law.cdf(statistic)), float(law.sf(statistic))
