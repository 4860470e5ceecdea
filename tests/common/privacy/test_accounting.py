"""Accounting against dp_accounting's privacy loss distributions, which bound epsilon from both sides."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from common.privacy.accounting import Mechanism, compute_epsilon, round_up
from common.privacy.filters import calibrate_noise_multiplier
from common.privacy.gaussian import gdp_delta, gdp_epsilon, gdp_mu
from common.types import BadInput, Plan, Unit

ROOT = Path(__file__).resolve().parents[3]
History = list[tuple[float, float, int]]


def gaussian(sigma: float, rate: float, steps: int) -> Mechanism:
    return Mechanism("gaussian", sigma, rate, steps, 1.0)


def mechanisms(history: History) -> list[Mechanism]:
    return [gaussian(*item) for item in history]


def pld_epsilon(history: History, delta: float, *, pessimistic: bool) -> float:
    """Epsilon of the discretised losses, rounded up or down: the truth lies between."""
    parts = [
        pld.from_gaussian_mechanism(
            sigma, pessimistic_estimate=pessimistic, value_discretization_interval=5e-4, sampling_prob=rate
        ).self_compose(steps)
        for sigma, rate, steps in history
    ]
    return float(reduce(lambda left, right: left.compose(right), parts).get_epsilon_for_delta(delta))


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize(
    "history",
    [
        [(1.5, 0.1, 200)],
        [(5.0, 0.25, 80)],
        [(50.0, 0.01, 1000)],
        [(1.0, 0.9, 5)],
        [(2.0, 1.0, 5)],
        [(1.1, 0.05, 100), (8.0, 1.0, 20)],
        [(1.1, 0.05, 100), (2.0, 0.1, 7), (3.0, 0.2, 3), (8.0, 1.0, 20), (20.0, 1.0, 5)],
    ],
    ids=str,
)
def test_epsilon_is_never_below_the_truth_and_at_most_half_a_percent_above(history: History, delta: float) -> None:
    ours = compute_epsilon(mechanisms(history), delta)
    assert ours >= pld_epsilon(history, delta, pessimistic=False)
    assert ours <= 1.005 * pld_epsilon(history, delta, pessimistic=True) + 0.002


def test_twenty_rounds_cost_what_they_cost_together_not_one_round_for_ever() -> None:
    """PRIVACY.md section 4: an engine for each round reports 1.31 after each; together it is 5.07."""
    one, twenty = [(1.5, 0.1, 10)], [(1.5, 0.1, 200)]
    assert compute_epsilon(mechanisms(one), 1e-5) == pytest.approx(1.31, abs=0.015)
    assert compute_epsilon(mechanisms(one) * 20, 1e-5) == pytest.approx(5.07, abs=0.015)
    assert compute_epsilon(mechanisms(one) * 20, 1e-5) >= pld_epsilon(twenty, 1e-5, pessimistic=False)


@given(
    parts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    sigma=st.sampled_from([0.7, 1.5, 8.0]),
    rate=st.sampled_from([1.0, 0.2]),
)
@settings(max_examples=8, deadline=None)
def test_rounds_compose_exactly_like_one_long_run_in_any_order(parts: list[int], sigma: float, rate: float) -> None:
    rounds = [gaussian(sigma, rate, steps) for steps in parts]
    other = gaussian(2.0, 1.0, 3)
    together = compute_epsilon([other, gaussian(sigma, rate, sum(parts))], 1e-5)
    assert compute_epsilon([*rounds, other], 1e-5) == together
    assert compute_epsilon([other, *reversed(rounds)], 1e-5) == together


@given(st.lists(st.tuples(st.floats(0.3, 100), st.integers(1, 1000)), min_size=1, max_size=6))
@settings(deadline=None)
def test_full_batch_gaussians_compose_in_the_sum_of_squares(history: list[tuple[float, int]]) -> None:
    mu = math.sqrt(sum(steps / sigma**2 for sigma, steps in history))
    together = compute_epsilon([gaussian(sigma, 1.0, steps) for sigma, steps in history], 1e-6)
    assert together == pytest.approx(gdp_epsilon(mu, 1e-6), rel=1e-9)


@given(st.floats(1e-2, 30), st.floats(1e-12, 0.1))
@settings(deadline=None)
def test_gaussian_dp_solves_its_own_definition(mu: float, delta: float) -> None:
    solved = gdp_epsilon(mu, delta)
    # The definition with SciPy's normal distribution in place of ours in logarithms.
    naive = norm.cdf(-solved / mu + mu / 2) - math.exp(min(solved, 700)) * norm.cdf(-solved / mu - mu / 2)
    if solved > 0 and solved < 600:
        assert naive == pytest.approx(delta, rel=1e-6, abs=1e-14)
        assert gdp_delta(solved, mu) <= delta
        assert gdp_mu(solved, delta) == pytest.approx(mu, rel=1e-9)


def test_gaussian_dp_gives_the_published_mu() -> None:
    """PRIVACY.md: delta 1e-5."""
    assert gdp_mu(1.0, 1e-5) == pytest.approx(0.2681, abs=5e-5)
    assert gdp_mu(3.0, 1e-5) == pytest.approx(0.7191, abs=5e-5)
    assert gdp_mu(8.0, 1e-5) == pytest.approx(1.666, abs=5e-4)


@pytest.mark.parametrize("target", [0.01, 1.0, 8.0])
def test_calibrated_noise_keeps_the_target_and_little_less_would_not(target: float) -> None:
    sigma = calibrate_noise_multiplier(target, 1e-5, 1.0, 60)
    assert compute_epsilon([gaussian(sigma, 1.0, 60)], 1e-5) <= target
    assert compute_epsilon([gaussian(sigma / 1.0011, 1.0, 60)], 1e-5) > target


def test_many_different_mechanisms_get_a_bound_above_the_accurate_one() -> None:
    history = [gaussian(2.0 + at / 10, 0.1 + at / 100, 3) for at in range(5)]
    accurate, quick = compute_epsilon(history[:4], 1e-5), compute_epsilon(history[:4], 1e-5, quick=True)
    assert accurate < quick < 1.25 * accurate
    assert compute_epsilon(history, 1e-5) == compute_epsilon(history, 1e-5, quick=True) > accurate


def test_sampling_never_costs_more_than_taking_everyone() -> None:
    for rate, sigma in ((0.99, 1.0), (0.5, 20.0), (0.5, 1e4)):
        assert compute_epsilon([gaussian(sigma, rate, 5)], 1e-5) <= compute_epsilon([gaussian(sigma, 1.0, 5)], 1e-5)


@pytest.mark.parametrize("history", [[(1.0, 0.01, 10**9)], [(0.01, 0.5, 10)], [(1e6, 0.5, 3)]], ids=str)
def test_absurd_histories_still_get_a_bound(history: History) -> None:
    assert 0.0 <= compute_epsilon(mechanisms(history), 1e-5) < math.inf


def test_a_release_without_noise_is_infinite_and_nothing_is_free() -> None:
    noiseless = Mechanism.of(Plan(0.1, 1, None, 0.0, Unit.EXAMPLE))
    assert compute_epsilon([gaussian(10.0, 1.0, 1), noiseless], 1e-5) == math.inf
    assert compute_epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(BadInput, match="delta"):
        compute_epsilon([gaussian(1.0, 1.0, 1)], delta)
    with pytest.raises(BadInput, match="delta"):
        calibrate_noise_multiplier(1.0, delta, 1.0, 1)


@given(st.floats(0, 1e6))
def test_a_shown_epsilon_is_rounded_up(value: float) -> None:
    shown = round_up(value)
    assert value <= shown <= value + 0.0100001
    assert round_up(3.0) == 3.0
    assert round_up(math.inf) == math.inf


def test_a_mechanism_survives_its_dictionary() -> None:
    summed = Mechanism("gaussian", 1.5, 0.1, 10, 1.0, noise_share=0.5, min_sites=5, colluding=1)
    for mechanism in (gaussian(1.5, 0.1, 10), Mechanism("none", 0.0, 0.1, 3, None), summed):
        assert Mechanism.from_dict(mechanism.to_dict()) == mechanism


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2.5},
        {"steps": True},
        {"steps": 0},
        {"noise_multiplier": "1.5"},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"sensitivity": None},
        {"kind": "laplace"},
        {"epsilon": 1.0},
        {"noise_share": 0.5},
        {"noise_share": 0.5, "min_sites": 4, "colluding": 1},
    ],
    ids=str,
)
def test_a_wrong_mechanism_is_refused_not_coerced(change: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Mechanism.from_dict({**gaussian(1.5, 0.1, 10).to_dict(), **change})


def test_a_mechanism_with_a_missing_field_is_refused() -> None:
    values = gaussian(1.5, 0.1, 10).to_dict()
    del values["sampling_rate"]
    with pytest.raises(BadInput, match="sampling_rate"):
        Mechanism.from_dict(values)


def test_full_batch_accounting_imports_neither_opacus_nor_torch() -> None:
    code = (
        "import sys; from common.privacy.accounting import *; from common.privacy.filters import *; "
        "calibrate_noise_multiplier(3.0, 1e-5, 1.0, 20); "
        "compute_epsilon([Mechanism('gaussian', 1.0, 1.0, 5, 1.0)], 1e-5); "
        "sys.exit('opacus' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
