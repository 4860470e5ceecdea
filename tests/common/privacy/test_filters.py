"""Privacy filters against dp_accounting's divergences, conversion and privacy loss distributions."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.filters import TOLERANCE, calibrate_noise_multiplier, choose_filter
from common.privacy.gaussian import gdp_epsilon, gdp_mu
from common.privacy.renyi import ORDERS_O, compute_capacity, compute_divergence

DELTA = 1e-5


def gaussian(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism("gaussian", sigma, rate, steps, 1.0)


@pytest.mark.parametrize("order", [2, 3, 17, 64, 256])
@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.01), (1.1, 0.25), (7.0, 0.9), (3.0, 1.0), (100.0, 0.001)])
def test_divergence_and_conversion_are_those_of_dp_accounting(order: int, sigma: float, rate: float) -> None:
    accountant = RdpAccountant([order])
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), 10)
    divergence = compute_divergence(sigma, rate, order)
    assert 10 * divergence == pytest.approx(accountant._rdp[0], rel=1e-9, abs=3e-12)
    assert 10 * divergence >= accountant._rdp[0] * (1 - 1e-12)
    expected = accountant.get_epsilon(DELTA)
    found = 10 * divergence - compute_capacity(order, 0.0, DELTA)
    assert max(0.0, found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rate", [0.9, 0.25, 0.01])
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_calibrated_noise_is_covered_little_less_is_not_and_the_truth_is_below(target: float, rate: float) -> None:
    sigma = calibrate_noise_multiplier(target, DELTA, rate, 60)
    release, less = gaussian(sigma, rate, 60), gaussian(sigma / 1.00001, rate, 60)
    assert choose_filter(release, None, target, DELTA).covers([release])
    assert not choose_filter(less, None, target, DELTA).covers([less])
    truth = pld.from_gaussian_mechanism(sigma, value_discretization_interval=1e-3, sampling_prob=rate).self_compose(60)
    assert truth.get_epsilon_for_delta(DELTA) <= target
    assert compute_epsilon([release], DELTA) <= target


def test_full_batch_releases_cost_exactly_gaussian_dp() -> None:
    history = [gaussian(2.0, steps=5), gaussian(8.0, steps=9)]
    exact = gdp_epsilon(math.sqrt(5 / 4 + 9 / 64), DELTA)
    chosen = choose_filter(history[0], None, exact, DELTA)
    assert chosen.kind == "gdp"
    assert chosen.covers(history)
    assert not chosen.covers([*history, gaussian(1e3)])


def test_a_full_batch_filter_counts_a_sampled_release_as_full_batch() -> None:
    chosen = choose_filter(gaussian(2.0), None, 8.0, DELTA)
    assert chosen.compute_cost(gaussian(4.0, 0.01, 3)) == chosen.compute_cost(gaussian(4.0, 1.0, 3)) == 3 / 16


def test_a_renyi_filter_charges_full_batch_releases_their_divergence() -> None:
    chosen = choose_filter(gaussian(2.0, 0.1), None, 8.0, DELTA)
    assert chosen.order is not None
    assert chosen.compute_cost(gaussian(4.0, 1.0, 3)) == pytest.approx(3 * chosen.order / 32)


def test_no_later_release_changes_the_order() -> None:
    """An order chosen after outputs were seen would not be a filter; the best for the whole history differs here."""
    first, later = gaussian(1.0, 0.01, 1), gaussian(30.0, 0.5, 2000)
    chosen = choose_filter(first, None, 3.0, DELTA)
    other = choose_filter(later, None, 3.0, DELTA)
    assert chosen.order != other.order
    assert chosen == choose_filter(first, None, 3.0, DELTA)


def test_without_noise_nothing_is_covered() -> None:
    noiseless = Mechanism("none", 0.0, 1.0, 1, None)
    assert not choose_filter(gaussian(1.0), None, 1e6, DELTA).covers([noiseless])
    assert choose_filter(None, None, 1.0, DELTA).covers([])


def test_a_budget_may_be_used_up_to_its_last_bit_but_no_further() -> None:
    sigma = 10.0 / gdp_mu(3.0, DELTA)
    chosen = choose_filter(None, "gdp", 3.0, DELTA)
    assert chosen.compute_share([gaussian(sigma, steps=100)]) * TOLERANCE >= 1.0
    assert chosen.covers([gaussian(sigma, steps=100)])
    assert not chosen.covers([gaussian(sigma, steps=101)])


def test_orders_are_whole_and_rise() -> None:
    assert all(isinstance(order, int) and order >= 2 for order in ORDERS_O)
    assert list(ORDERS_O) == sorted(set(ORDERS_O))
