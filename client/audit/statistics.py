"""Statistics of the privacy audit: bounds on epsilon from canaries' scores, and tests of noise and participation.

A claim can only be refuted here: each bound holds with its confidence, and each conformance test raises a false alarm
with at most the stated probability. `client/audit/attack.py` measures what these functions are given.

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


def score_canaries(signal_SM: Floats, noise_multiplier: float, sampling_rate: float) -> Floats:
    """Returns score_M, the log-likelihood ratio of "this canary was among the records" to "it was not".

    Args:
        signal_SM: released sums along each canary's own direction, in units of the clip norm: normal with the noise
            multiplier as standard deviation, around 1 in the steps in which the canary takes part, else around 0.
        noise_multiplier: claimed noise multiplier.
        sampling_rate: claimed sampling rate.
    """
    exponent_SM = (signal_SM - 0.5) / noise_multiplier**2
    if sampling_rate == 1.0:
        return np.asarray(exponent_SM.sum(axis=0))
    mixed_SM = np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + exponent_SM)
    return np.asarray(mixed_SM.sum(axis=0))


@dataclass(frozen=True)
class Canaries:
    """Scores of canaries, and whether each was among the records (an independent coin of 1/2 for each).

    Thresholds are chosen on the first half and judged on the second, so that choosing costs no confidence.
    """

    score_M: Floats
    included_M: Bools

    def split_in_halves(self) -> tuple[Canaries, Canaries]:
        """Returns the canaries that choose thresholds and those that judge."""
        half = len(self.score_M) // 2
        return Canaries(self.score_M[:half], self.included_M[:half]), Canaries(
            self.score_M[half:], self.included_M[half:]
        )


def bound_rate(events: NDArray[np.int64], trials: int, error: float) -> Floats:
    """Returns Clopper-Pearson upper bounds on a probability, each wrong with probability at most `error`.

    Args:
        events: how often the event occurred, for each bound.
        trials: number of independent trials.
        error: probability with which a bound may be wrong.
    """
    if trials == 0:
        return np.ones(len(events))
    return np.where(events < trials, beta.ppf(1.0 - error, events + 1, np.maximum(trials - events, 1)), 1.0)


def compute_lower_epsilon(
    canaries: Canaries, *, delta: float, confidence: float, trade_off: Literal["gaussian", "any"]
) -> float:
    """Returns a lower bound on epsilon at `delta`, false with probability at most 1 - confidence.

    It assumes that canaries do not disturb each other, which orthogonal ones do not.

    Args:
        canaries: the canaries' scores and the truth.
        delta: delta of the claim.
        confidence: probability with which the bound holds, such as 0.999.
        trade_off: `gaussian` for full batch, where the mechanism is Gaussian and one point of its trade-off curve gives
            all of it: mu >= Phi^-1(1 - FPR) - Phi^-1(FNR) (Nasr et al. 2023); `any` for everything else:
            epsilon >= log((1 - delta - FNR) / FPR) and the same with the errors exchanged (Kairouz et al. 2015).
    """
    choosing, judging = canaries.split_in_halves()
    bound = _bound_mu if trade_off == "gaussian" else _bound_any_epsilon
    thresholds = np.unique(choosing.score_M)
    # The same threshold at every confidence, so that more confidence never shows more.
    best = int(np.argmax(bound(*_bound_error_rates(choosing, thresholds, _CHOOSING_ERROR), delta)))
    # Half each: both error rates are bounded at once.
    rates = _bound_error_rates(judging, thresholds[best : best + 1], (1.0 - confidence) / 2.0)
    value = float(bound(*rates, delta)[0])
    return gdp_epsilon(value, delta) if trade_off == "gaussian" and value > 0.0 else max(value, 0.0)


_CHOOSING_ERROR = 0.01


def _bound_error_rates(canaries: Canaries, thresholds: Floats, error: float) -> tuple[Floats, Floats]:
    """Returns upper bounds on FPR and FNR of calling every score from a threshold on "included", for each threshold."""
    inside = np.sort(canaries.score_M[canaries.included_M])
    outside = np.sort(canaries.score_M[~canaries.included_M])
    accused = len(outside) - np.searchsorted(outside, thresholds, side="left")
    missed = np.searchsorted(inside, thresholds, side="left")
    return bound_rate(accused, len(outside), error), bound_rate(missed, len(inside), error)


def _bound_mu(accused: Floats, missed: Floats, delta: float) -> Floats:
    del delta
    informed = (accused < 1.0) & (missed < 1.0)
    return np.where(informed, -ndtri(np.where(informed, accused, 0.5)) - ndtri(np.where(informed, missed, 0.5)), 0.0)


def _bound_any_epsilon(accused: Floats, missed: Floats, delta: float) -> Floats:
    ratios = np.maximum((1.0 - delta - missed) / accused, (1.0 - delta - accused) / missed)
    return np.asarray(np.log(np.maximum(ratios, 1.0)))


def compute_one_run_epsilon(canaries: Canaries, *, delta: float, confidence: float) -> float:
    """Returns the lower bound on epsilon of Steinke, Nasr, Jagielski (2023), Theorem 5.2.

    Nothing is assumed about the distribution of scores. The fraction of canaries to guess about, the rest being
    abstained from, is chosen on the first half.

    Args:
        canaries: the canaries' scores and the truth.
        delta: delta of the claim.
        confidence: probability with which the bound holds.
    """
    choosing, judging = canaries.split_in_halves()
    error = 1.0 - confidence
    fractions = (0.02, 0.05, 0.1, 0.2, 0.5)
    best = max(fractions, key=lambda fraction: _bound_by_guesses(choosing, fraction, delta, error))
    return _bound_by_guesses(judging, best, delta, error)


def _bound_by_guesses(canaries: Canaries, fraction: float, delta: float, error: float) -> float:
    total = len(canaries.score_M)
    each = int(fraction * total)
    order = np.argsort(canaries.score_M, kind="stable")
    right = int((~canaries.included_M[order[:each]]).sum() + canaries.included_M[order[total - each :]].sum())
    low, high = 0.0, 1.0
    while compute_one_run_p_value(total, 2 * each, right, high, delta) < error:
        low, high = high, high + 1.0
    for _ in range(20):
        middle = (low + high) / 2.0
        refuted = compute_one_run_p_value(total, 2 * each, right, middle, delta) < error
        low, high = (middle, high) if refuted else (low, middle)
    return low if compute_one_run_p_value(total, 2 * each, right, low, delta) < error else 0.0


def compute_one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Returns an upper bound on the probability of so many right guesses under (epsilon, delta)-DP.

    See Steinke et al. (2023), Appendix D.

    Args:
        canaries: number of canaries.
        guesses: number of canaries that were guessed about.
        right: number of right guesses.
        epsilon: epsilon of the hypothesis.
        delta: delta of the hypothesis.
    """
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, accuracy))
    nearly = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    slack = float((nearly / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + slack * delta * 2 * canaries)


# --- conformance -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseScale:
    """Scale of released noise, and every way in which it differs from its claim.

    Attributes:
        ratio: measured standard deviation / claimed one.
        problems: one sentence for each test that fails.
    """

    ratio: float
    problems: tuple[str, ...]


def measure_noise_scale(noise_SWF: Floats, rows: Mapping[str, int]) -> NoiseScale:
    """Tests that released noise, divided by its claimed standard deviation, is standard normal and independent.

    The scale is tested over all parameter groups together and for each: a small trunk's noise is a small part of all.

    Sums along an axis, divided by the root of its length, have variance 1 too where noise is drawn anew along it: a
    key used again shows over steps, one draw for all classes over weights.

    Args:
        noise_SWF: noise of all parameter groups, one after the other along W, / its claimed standard deviation.
        rows: parameter group -> its number of rows, in that order.
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
            group_ratio = float(np.sqrt(np.mean(part**2)))
            problems.append(
                f"released noise of {name} has {group_ratio:.3g} times the standard deviation that is accounted for"
            )
    for axis, between in enumerate(("from step to step", "from weight to weight", "from feature to feature")):
        length = noise_SWF.shape[axis]
        if length > 1 and not _is_standard(noise_SWF.sum(axis=axis) / math.sqrt(length)):
            problems.append(f"released noise repeats itself {between}")
    return NoiseScale(ratio, tuple(problems))


def _is_standard(values: Floats) -> bool:
    energy = float(np.sum(values**2))
    return bool(chi2.ppf(FALSE_ALARM, values.size) <= energy <= chi2.isf(FALSE_ALARM, values.size))


def is_noise_sufficient(noise: Floats) -> bool:
    """Returns whether values are no smaller than standard normals are, whatever their distribution is."""
    return bool(np.sum(noise**2) >= chi2.ppf(FALSE_ALARM, noise.size))


def find_participation_problems(took_part_SM: Bools, sampling_rate: float) -> Iterator[str]:
    """Yields a sentence for each way in which participation differs from one independent coin for each unit and step.

    Args:
        took_part_SM: whether each unit was in each step's sample.
        sampling_rate: claimed sampling rate.
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
    for counts, trials, quantity in (
        (took_part_SM.sum(axis=0), steps, "how often a unit takes part"),
        (took_part_SM.sum(axis=1), units, "the size of a sample"),
    ):
        low, high = _compute_dispersion_tails(counts.astype(np.float64), trials, sampling_rate)
        if min(low, high) < FALSE_ALARM:
            yield f"{quantity} does not vary as with Poisson sampling"


def is_spread_poisson(counts_M: Floats, trials: int, sampling_rate: float) -> bool:
    """Returns whether units' counts vary at least as much as with independent coins.

    Args:
        counts_M: in how many steps each unit took part.
        trials: number of steps.
        sampling_rate: claimed sampling rate.
    """
    return sampling_rate == 1.0 or _compute_dispersion_tails(counts_M, trials, sampling_rate)[0] >= FALSE_ALARM


def _compute_dispersion_tails(counts: Floats, trials: int, rate: float) -> tuple[float, float]:
    """Returns both tail probabilities of the counts' squared deviations.

    They follow from the gamma law with the exact mean and variance of the deviations.
    """
    variance = trials * rate * (1.0 - rate)
    statistic = float(np.sum((counts - trials * rate) ** 2) / variance)
    # Fourth moment of a binomial: small means have heavier tails than chi-square.
    spread = len(counts) * (2.0 + (1.0 - 6.0 * rate * (1.0 - rate)) / variance)
    law = gamma(a=len(counts) ** 2 / spread, scale=spread / len(counts))
    return float(law.cdf(statistic)), float(law.sf(statistic))
