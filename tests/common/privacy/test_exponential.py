"""The exponential mechanism: its law, its words, and its price against privacy loss distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import chisquare, norm

from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.exponential import choose_least_cost, compute_choice_divergence, compute_choice_mu
from common.privacy.filters import choose_filter
from common.privacy.gaussian import gdp_delta, gdp_mu
from common.privacy.noise import NoiseStream
from common.types import BadInput

EPSILONS = [0.01, 0.1, 0.5, 1.0, 3.0, 8.0, 20.0]
Pair = tuple[dict[str, float], dict[str, float]]


def worst_pair(epsilon: float, shift: float) -> Pair:
    """Returns the two-point distributions with the losses `shift` and `shift - epsilon`: no choice tells more apart."""
    rare = -math.expm1(shift - epsilon) / (math.exp(shift) - math.exp(shift - epsilon))
    common = rare * math.exp(shift)
    return {"a": common, "b": 1.0 - common}, {"a": rare, "b": 1.0 - rare}


def test_candidates_are_chosen_with_the_probabilities_of_the_law() -> None:
    costs, sensitivity, epsilon = [0, 3, 7, 12], 10, 4.0
    stream = NoiseStream(bytes(32))
    counts = np.bincount([stream.choose_least_cost(costs, sensitivity, epsilon) for _ in range(4000)], minlength=4)
    weights = np.exp(-epsilon * np.array(costs) / sensitivity)
    assert chisquare(counts, 4000 * weights / weights.sum()).pvalue > 1e-3


def test_the_number_of_words_does_not_depend_on_costs() -> None:
    for costs in ([5], [0, 0, 0], [0, 10**9], [10**12, 0, 10**12 + 1]):
        read: list[int] = []

        def words(count: int, read: list[int] = read) -> np.ndarray:
            read.append(count)
            return np.full(count, 2**64 - 1, np.uint64)

        choose_least_cost(costs, 10, 0.5, words)
        assert read == [8]


def test_the_ends_of_the_uniform_integer_choose_the_first_and_the_last_that_have_weight() -> None:
    costs = [4, 0, 2, 10**9]
    assert choose_least_cost(costs, 10, 1.0, lambda count: np.zeros(count, np.uint64)) == 0
    # The last has a weight of exp(-10^8), which no integer of 256 bits holds.
    assert choose_least_cost(costs, 10, 1.0, lambda count: np.full(count, 2**64 - 1, np.uint64)) == 2


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_choice_tells_more_apart_than_its_gaussian(epsilon: float) -> None:
    shifts = np.linspace(0.0, epsilon, 1001)[1:-1]
    rare = -np.expm1(shifts - epsilon) / (np.exp(shifts) - np.exp(shifts - epsilon))
    # A test that rejects at the rare point errs with these two probabilities; a Gaussian's of mu must allow both.
    missed = np.exp(shifts - epsilon) * (1.0 - rare)
    needed = -norm.ppf(missed) - norm.ppf(rare)
    assert needed.max() <= compute_choice_mu(epsilon) <= needed.max() * (1.0 + 1e-5)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("order", [2, 8, 64])
def test_no_choice_has_a_larger_renyi_divergence_than_is_counted(epsilon: float, order: int) -> None:
    for shift in np.linspace(0.0, epsilon, 101)[1:-1]:
        p, q = worst_pair(epsilon, float(shift))
        for one, other in ((p, q), (q, p)):
            terms = [order * math.log(one[x]) + (1 - order) * math.log(other[x]) for x in "ab" if one[x] > 0.0]
            divergence = np.logaddexp.reduce(terms) / (order - 1)
            assert divergence <= compute_choice_divergence(epsilon, order) * (1.0 + 1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 4])
def test_choices_beside_gaussians_cost_at_least_what_dp_accounting_says(epsilon: float, count: int) -> None:
    delta, sigma = 1e-5, 2.0
    claimed = compute_epsilon(
        [*[Mechanism.of_choice(epsilon, 9.25)] * count, Mechanism("gaussian", sigma, 1.0, 1, 1.0)], delta
    )
    gaussian = pld.from_gaussian_mechanism(sigma, pessimistic_estimate=False, value_discretization_interval=1e-3)
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        p, q = ({key: math.log(value) for key, value in each.items()} for each in worst_pair(epsilon, part * epsilon))
        choice = pld.from_two_probability_mass_functions(
            p, q, pessimistic_estimate=False, value_discretization_interval=1e-3
        )
        true = gaussian.compose(choice.self_compose(count)).get_epsilon_for_delta(delta)
        assert true <= claimed
    # And not many times that.
    assert claimed <= true + 2.0 * count * epsilon


def test_a_vote_alone_costs_its_own_epsilon_and_many_cost_less_than_their_sum() -> None:
    vote = Mechanism.of_choice(0.5, 9.25)
    assert compute_epsilon([vote], 1e-5) == 0.5
    assert compute_epsilon([vote] * 40, 1e-5) < 0.6 * 40 * 0.5
    assert compute_epsilon([vote, Mechanism("none", 0.0, 1.0, 1, None)], 1e-5) == math.inf


def test_the_filters_count_a_vote() -> None:
    vote = Mechanism.of_choice(1.0, 9.25)
    gdp = choose_filter(vote, None, 3.0, 1e-5)
    assert gdp.kind == "gdp"
    assert gdp.compute_cost(vote) == pytest.approx((2.0 * norm.ppf(1.0 / (1.0 + math.exp(-0.5)))) ** 2, rel=1e-9)
    assert gdp.compute_share([vote]) == pytest.approx(gdp.compute_cost(vote) / gdp_mu(3.0, 1e-5) ** 2)
    renyi = choose_filter(vote, "renyi", 3.0, 1e-5)
    assert renyi.order is not None and renyi.compute_cost(vote) == pytest.approx(renyi.order / 8.0)
    # What the filter lets pass stays within the cap.
    number = math.floor(1.0 / gdp.compute_share([vote]))
    assert gdp_delta(3.0, math.sqrt(number) * compute_choice_mu(1.0)) <= 1e-5


def test_a_vote_is_of_one_site_over_all_of_its_units() -> None:
    with pytest.raises(BadInput, match="over all of its units"):
        Mechanism("exponential", 2.0, 0.1, 1, 9.25)
    with pytest.raises(BadInput, match="sensitivity"):
        Mechanism("exponential", 2.0, 1.0, 1, None)
    vote = Mechanism.of_choice(0.5, 9.25)
    assert Mechanism.from_dict(vote.to_dict()) == vote
