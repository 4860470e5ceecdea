"""A secure sum's lattice, its price, and the way from whole numbers to an update and back."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.lattice import BOUND_BITS
from common.secure_sum.terms import MAX_SITES, SumRules
from common.secure_sum.vectors import (
    SUM_BITS,
    choose_lattice,
    count_values,
    flatten_whole,
    make_mechanism,
    make_update,
)
from common.types import BadInput, Plan, Unit


def make_plan(noise_multiplier: float = 2.0, clip_norm: float = 0.5) -> Plan:
    return Plan(1.0, 1, clip_norm, noise_multiplier, Unit.EXAMPLE)


@given(
    noise=st.floats(0.05, 1e6),
    clip_norm=st.floats(1e-3, 1e3),
    min_sites=st.integers(2, MAX_SITES),
    data=st.data(),
)
def test_the_honest_sites_noise_is_the_plans_and_no_sum_is_ambiguous(
    noise: float, clip_norm: float, min_sites: int, data: st.DataObject
) -> None:
    rules = SumRules(min_sites, data.draw(st.integers(0, min_sites - 2)))
    plan = make_plan(noise, clip_norm)
    lattice = choose_lattice(plan, rules)
    deviation = 2.0**lattice.log2_deviation * lattice.spacing
    assert math.sqrt(rules.honest) * deviation == pytest.approx(noise * clip_norm, rel=1e-12)
    assert lattice.bound * lattice.spacing == pytest.approx(clip_norm, rel=1e-12)
    # Fewer than 2**21 units a site (`check_unit_count`), and noise of at most 12.5 deviations.
    assert lattice.bound <= 2.0**SUM_BITS
    assert MAX_SITES * (2 ** (63 - BOUND_BITS) * lattice.bound + 12.5 * 2.0**lattice.log2_deviation) < 2.0**63


def test_a_plan_with_hardly_any_noise_is_refused() -> None:
    with pytest.raises(BadInput, match="more noise"):
        choose_lattice(make_plan(1e-3), SumRules(500, 0))


@pytest.mark.parametrize("rounds", [1, 48])
def test_the_price_is_that_of_the_whole_noise_as_dp_accounting_counts_it(rounds: int) -> None:
    """The site's own share is smaller; what becomes visible has the plan's noise."""
    rules, plan = SumRules(5, 1), make_plan(20.0)
    mechanism = make_mechanism(plan.over(rounds), rules)
    assert (mechanism.noise_share, mechanism.min_sites, mechanism.colluding) == (0.5, 5, 1)
    oracle = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    oracle.compose(dp_accounting.GaussianDpEvent(20.0), rounds)
    assert compute_epsilon([mechanism], 1e-5) == pytest.approx(oracle.get_epsilon(1e-5), rel=1e-3)
    assert make_mechanism(plan, None) == Mechanism.of(plan)


def test_numbers_come_back_where_they_came_from() -> None:
    heads = {
        "b": {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)},
        "a": {"weight": np.zeros((1, 3), np.float32)},
    }
    whole = {
        group: {
            name: np.arange(array.size, dtype=np.int64).reshape(array.shape) + 10 * place for name, array in own.items()
        }
        for place, (group, own) in enumerate(heads.items())
    }
    vector = flatten_whole(whole)
    assert len(vector) == count_values(heads) == 11
    update = make_update(vector, heads, spacing=0.5, size=4.0)
    for group, own in whole.items():
        for name, values in own.items():
            assert np.array_equal(update[group][name], (-values * 0.125).astype(np.float32))
            assert update[group][name].dtype == np.float32
