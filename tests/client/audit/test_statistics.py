"""Statistics of the audit against references: exact Gaussian scores, SciPy's exact intervals, a direct sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from client.audit.statistics import (
    Canaries,
    bound_rate,
    compute_lower_epsilon,
    compute_one_run_epsilon,
    compute_one_run_p_value,
    find_participation_problems,
    is_noise_sufficient,
    is_spread_poisson,
    measure_noise_scale,
    score_canaries,
)
from common.privacy.gaussian import gdp_epsilon, gdp_mu

DELTA = 1e-5


def canaries(mu: float, seed: int, count: int = 1000) -> Canaries:
    """Scores of canaries of a mechanism that is exactly mu-GDP."""
    rng = np.random.default_rng(seed)
    included = rng.random(count) < 0.5
    return Canaries(rng.normal(size=count) + mu * included, included)


# --- epsilon ---------------------------------------------------------------------------------------------------------


def test_the_score_is_the_log_likelihood_ratio_over_all_steps() -> None:
    sigma, rate = 0.7, 0.3
    signal_SM = np.random.default_rng(0).normal(size=(5, 4))
    inside = (1 - rate) * norm.pdf(signal_SM, 0, sigma) + rate * norm.pdf(signal_SM, 1, sigma)
    expected = np.log(inside / norm.pdf(signal_SM, 0, sigma)).sum(axis=0)
    assert score_canaries(signal_SM, sigma, rate) == pytest.approx(expected)
    full = (norm.logpdf(signal_SM, 1, sigma) - norm.logpdf(signal_SM, 0, sigma)).sum(axis=0)
    assert score_canaries(signal_SM, sigma, 1.0) == pytest.approx(full)


def test_scores_stay_finite_where_noise_is_small() -> None:
    assert np.isfinite(score_canaries(np.full((3, 2), 50.0), 1e-2, 0.1)).all()


@given(trials=st.integers(1, 60), data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_upper_rate_is_the_exact_interval_of_clopper_and_pearson(trials: int, data: st.DataObject) -> None:
    events = data.draw(st.integers(0, trials))
    exact = binomtest(events, trials, alternative="less").proportion_ci(0.99, method="exact").high
    assert bound_rate(np.array([events]), trials, 0.01)[0] == pytest.approx(exact)


def test_the_gate_raises_no_more_false_alarms_than_it_says() -> None:
    """1500 audits of a mechanism that is exactly as private as it claims."""
    mu = 1.666
    claimed = gdp_epsilon(mu, DELTA)
    alarms = {
        confidence: sum(
            compute_lower_epsilon(canaries(mu, seed), delta=DELTA, confidence=confidence, trade_off="gaussian")
            > claimed
            for seed in range(1500)
        )
        for confidence in (0.95, 0.999)
    }
    assert binom.sf(alarms[0.95] - 1, 1500, 0.05) > 1e-4
    assert binom.sf(alarms[0.999] - 1, 1500, 0.001) > 1e-4


def test_half_the_noise_is_refuted_nearly_always() -> None:
    claimed = gdp_epsilon(1.666, DELTA)
    caught = [
        compute_lower_epsilon(canaries(2 * 1.666, seed), delta=DELTA, confidence=0.999, trade_off="gaussian") > claimed
        for seed in range(200)
    ]
    assert np.mean(caught) > 0.95


def test_more_confidence_never_shows_more() -> None:
    for seed in range(50):
        for trade_off in ("gaussian", "any"):
            low, high = (
                compute_lower_epsilon(canaries(1.0, seed), delta=DELTA, confidence=confidence, trade_off=trade_off)  # type: ignore[arg-type]
                for confidence in (0.95, 0.999)
            )
            assert low >= high


@pytest.mark.parametrize("trade_off", ["gaussian", "any"])
def test_scores_without_information_show_nothing(trade_off: str) -> None:
    same = Canaries(np.zeros(400), np.arange(400) % 2 == 0)
    assert compute_lower_epsilon(same, delta=DELTA, confidence=0.95, trade_off=trade_off) == 0.0  # type: ignore[arg-type]
    assert compute_one_run_epsilon(same, delta=DELTA, confidence=0.95) == 0.0


def test_without_a_distribution_the_bound_is_weaker_but_never_false() -> None:
    mu = gdp_mu(8.0, DELTA)
    found = [compute_one_run_epsilon(canaries(mu, seed), delta=DELTA, confidence=0.999) for seed in range(100)]
    assert 1.0 < np.median(found) < max(found) < 8.0


def test_the_one_run_p_value_of_pure_privacy_is_a_binomial_tail() -> None:
    accuracy = math.exp(1.0) / (1.0 + math.exp(1.0))
    expected = sum(binom.pmf(count, 60, accuracy) for count in range(55, 61))
    assert compute_one_run_p_value(200, 60, 55, 1.0, 0.0) == pytest.approx(expected)
    assert compute_one_run_p_value(200, 60, 55, 1.0, 1e-3) > expected


# --- conformance -----------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(1).normal(size=(12, 6, 30))
ROWS = {"grade": 4, "backbone.trunk": 2}


def test_independent_noise_of_the_claimed_scale_conforms() -> None:
    assert measure_noise_scale(NOISE, ROWS).problems == ()


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.88, 1.15, 2.0])
def test_noise_of_another_scale_is_named_with_its_ratio(factor: float) -> None:
    found = measure_noise_scale(factor * NOISE, ROWS)
    assert found.ratio == pytest.approx(factor, rel=0.05)
    assert "times the standard deviation" in found.problems[0]


def test_noise_of_another_scale_in_one_entry_is_named_where_all_together_pass() -> None:
    noise = np.random.default_rng(3).normal(size=(10, 500, 32))
    noise[:, -2:] *= 0.8
    assert measure_noise_scale(noise, {"all": 500}).problems == ()
    (problem,) = measure_noise_scale(noise, {"grade": 498, "backbone.trunk": 2}).problems
    assert "of backbone.trunk has 0." in problem


@pytest.mark.parametrize(("axis", "what"), [(0, "step to step"), (1, "weight to weight"), (2, "feature to feature")])
def test_noise_that_is_used_again_is_named_by_where(axis: int, what: str) -> None:
    again = np.broadcast_to(np.take(NOISE, [0], axis=axis), NOISE.shape)
    # Scaled so that its size is right: only the repetition is left to be seen.
    assert any(what in problem for problem in measure_noise_scale(again / np.sqrt(np.mean(again**2)), ROWS).problems)


def test_a_key_that_is_used_for_two_rounds_is_seen_among_many() -> None:
    noise = np.random.default_rng(2).normal(size=(20, 6, 60))
    noise[1::2] = noise[::2]
    assert measure_noise_scale(noise, ROWS).problems == ("released noise repeats itself from step to step",)


def test_too_little_noise_is_seen_and_more_is_allowed() -> None:
    assert is_noise_sufficient(NOISE) and is_noise_sufficient(3 * NOISE) and not is_noise_sufficient(0.8 * NOISE)


@pytest.mark.parametrize("rate", [0.5, 0.05, 0.004])
def test_poisson_sampling_conforms(rate: float) -> None:
    for seed in range(20):
        took_part = np.random.default_rng(seed).random((60, 200)) < rate
        assert list(find_participation_problems(took_part, rate)) == []
        assert is_spread_poisson(took_part.sum(axis=0).astype(float), 60, rate)


def test_shuffled_epochs_are_not_poisson() -> None:
    rng = np.random.default_rng(0)
    epochs = [np.argsort(rng.random(200)) // 50 for _ in range(15)]
    took_part = np.array([epoch == batch for epoch in epochs for batch in range(4)])
    problems = "; ".join(find_participation_problems(took_part, 0.25))
    assert "how often a unit" in problems and "the size of a sample" in problems
    assert not is_spread_poisson(took_part.sum(axis=0).astype(float), 60, 0.25)


def test_one_coin_for_all_units_is_not_poisson() -> None:
    coins = np.random.default_rng(0).permutation(60)[:, None] < 30
    assert any(
        "size of a sample" in problem for problem in find_participation_problems(np.repeat(coins, 200, axis=1), 0.5)
    )


def test_another_rate_is_named() -> None:
    took_part = np.random.default_rng(0).random((60, 200)) < 0.3
    assert "0.25 is accounted for" in next(find_participation_problems(took_part, 0.25))


def test_full_batch_means_every_unit_in_every_step() -> None:
    everyone = np.ones((3, 5), dtype=np.bool_)
    assert list(find_participation_problems(everyone, 1.0)) == []
    everyone[1, 2] = False
    assert "left out" in next(find_participation_problems(everyone, 1.0))
