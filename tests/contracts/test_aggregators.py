"""The law of every aggregator in the folder: order is irrelevant; a sum is enough where a sum is all that is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from common.plugins import kinds, plugin_class
from server.rounds.aggregators import Aggregator, Weighted, open_aggregator

KINDS = kinds("server.rounds.aggregators")
values = npst.arrays(np.float32, (2, 3), elements=st.floats(-10, 10, width=32))
contributions = st.lists(
    st.builds(Weighted, st.floats(0.5, 1000), st.fixed_dictionaries({"w": values})), min_size=1, max_size=5
)
PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}


def aggregator(kind: str) -> Aggregator:
    """A kind with the settings of its own example; called inside tests, so that a broken kind fails alone."""
    cls: Any = plugin_class("server.rounds.aggregators", kind)
    return open_aggregator(cls.example(), "aggregation")


@pytest.mark.parametrize("kind", KINDS)
@given(deltas=contributions, order=st.randoms(use_true_random=False))
def test_the_order_of_sites_is_irrelevant(kind: str, deltas: list[Weighted], order: Any) -> None:
    rule = aggregator(kind)
    mixed = list(deltas)
    order.shuffle(mixed)
    first, _ = rule.update(PARAMS, rule.start(PARAMS), deltas)
    second, _ = rule.update(PARAMS, rule.start(PARAMS), mixed)
    assert np.array_equal(first["w"], second["w"])


@pytest.mark.parametrize("kind", KINDS)
@given(deltas=contributions)
def test_combining_the_sum_equals_combining_the_parts(kind: str, deltas: list[Weighted]) -> None:
    rule = aggregator(kind)
    if not rule.needs_sum:
        pytest.skip("this kind reads each update")
    total = sum(item.weight for item in deltas)
    mean = sum(item.weight * item.delta["w"].astype(np.float64) for item in deltas) / total
    parts, _ = rule.update(PARAMS, rule.start(PARAMS), deltas)
    whole, _ = rule.update(PARAMS, rule.start(PARAMS), [Weighted(total, {"w": mean})])
    np.testing.assert_allclose(parts["w"], whole["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_modified_and_shapes_are_kept(kind: str) -> None:
    rule = aggregator(kind)
    before = PARAMS["w"].copy()
    new, state = rule.update(PARAMS, rule.start(PARAMS), [Weighted(1.0, {"w": np.ones((2, 3), np.float32)})])
    again, _ = rule.update(new, state, [Weighted(1.0, {"w": np.ones((2, 3), np.float32)})])
    assert np.array_equal(PARAMS["w"], before)
    assert again["w"].shape == (2, 3) and again["w"].dtype == np.float32


def test_the_mean_is_weighted_by_public_size() -> None:
    rule = open_aggregator({"kind": "mean", "learning_rate": 1.0}, "aggregation")
    deltas = [Weighted(1.0, {"w": np.array([0.0], np.float32)}), Weighted(3.0, {"w": np.array([4.0], np.float32)})]
    new, _ = rule.update({"w": np.array([10.0], np.float32)}, {}, deltas)
    assert new["w"].tolist() == [13.0]


def test_fedadam_follows_the_papers_recursion() -> None:
    rule = open_aggregator(
        {"kind": "fedadam", "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}, "aggregation"
    )
    x, m, v = 1.0, 0.0, 0.01**2
    params = {"w": np.array([x], np.float32)}
    state = rule.start(params)
    for delta in (0.5, -0.25, 0.125):
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2
        x += 0.1 * m / (v**0.5 + 0.01)
        params, state = rule.update(params, state, [Weighted(2.0, {"w": np.array([delta], np.float32)})])
    assert params["w"][0] == pytest.approx(x, rel=1e-5)
