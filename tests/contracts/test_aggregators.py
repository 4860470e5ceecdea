"""The law of every aggregator in the folder: order is irrelevant; a sum is enough where a sum is all that is needed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.stats import trim_mean

from common.model.momentum import Momentum
from common.plugins import kinds, plugin_class
from common.types import BadInput
from server.rounds.aggregators import Aggregator, Weighted, open_aggregator

KINDS = kinds("server.rounds.aggregators")
values = npst.arrays(np.float32, (2, 3), elements=st.floats(-10, 10, width=32))
contribution = st.builds(Weighted, st.floats(0.5, 1000), st.fixed_dictionaries({"w": values}))
PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}


def aggregator(kind: str) -> Aggregator:
    """A kind with the settings of its own example; called inside tests, so that a broken kind fails alone."""
    cls: Any = plugin_class("server.rounds.aggregators", kind)
    return open_aggregator(cls.example(), "aggregation")


def draw(data: st.DataObject, rule: Aggregator) -> list[Weighted]:
    """As many updates as the kind needs, or some more; some are alike, so that there are ties."""
    drawn = data.draw(st.lists(contribution, min_size=rule.min_updates, max_size=rule.min_updates + 4))
    return [*drawn, *data.draw(st.lists(st.sampled_from(drawn), max_size=3))]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_the_order_of_sites_is_irrelevant(kind: str, data: st.DataObject, order: Any) -> None:
    rule = aggregator(kind)
    deltas = draw(data, rule)
    mixed = list(deltas)
    order.shuffle(mixed)
    first, _ = rule.update(PARAMS, rule.start(PARAMS), deltas)
    second, _ = rule.update(PARAMS, rule.start(PARAMS), mixed)
    assert np.array_equal(first["w"], second["w"])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_combining_the_sum_equals_combining_the_parts(kind: str, data: st.DataObject) -> None:
    rule = aggregator(kind)
    deltas = draw(data, rule)
    if not rule.needs_sum:
        pytest.skip("this kind reads each update")
    total = sum(item.weight for item in deltas)
    mean = sum(item.weight * item.delta["w"].astype(np.float64) for item in deltas) / total
    parts, _ = rule.update(PARAMS, rule.start(PARAMS), deltas)
    whole, _ = rule.update(PARAMS, rule.start(PARAMS), [Weighted(total, {"w": mean}, len(deltas))])
    np.testing.assert_allclose(parts["w"], whole["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_modified_and_shapes_are_kept(kind: str) -> None:
    rule = aggregator(kind)
    before = PARAMS["w"].copy()
    one = Weighted(1.0, {"w": np.ones((2, 3), np.float32)})
    new, state = rule.update(PARAMS, rule.start(PARAMS), [one] * rule.min_updates)
    again, _ = rule.update(new, state, [one] * rule.min_updates)
    assert one.delta["w"].all() and np.array_equal(PARAMS["w"], before)
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


@pytest.mark.parametrize(("noise", "momentum"), [(2.0, 0.0), (0.05, 0.85)])
def test_the_heavy_ball_is_torchs_descent_with_momentum_along_the_weighted_mean(noise: float, momentum: float) -> None:
    rule = open_aggregator({"kind": "heavy_ball", "rounds": 8, "noise": noise, "step": 2.0}, "aggregation")
    rng, params = np.random.default_rng(0), {"w": np.zeros(3, np.float32)}
    step, chosen = Momentum(rounds=8, noise=noise, step=2.0).choose_step(4.0, 2)
    assert chosen == pytest.approx(momentum, abs=0.15) and (chosen > 0.0) == (momentum > 0.0)
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([weight], lr=step, momentum=chosen)
    state = rule.start(params)
    for _ in range(5):
        first, second = rng.normal(size=(2, 3)).astype(np.float32)
        params, state = rule.update(params, state, [Weighted(1.0, {"w": first}), Weighted(3.0, {"w": second})])
        weight.grad = -torch.from_numpy((first.astype(np.float64) + 3.0 * second) / 4.0)
        reference.step()
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sites_that_agree_move_the_head_in_their_direction(kind: str) -> None:
    rule = aggregator(kind)
    assert rule.min_updates >= 1
    change = np.array([[1.0, -2.0, 0.5], [-0.25, 4.0, -1.0]], np.float32)
    new, _ = rule.update(PARAMS, rule.start(PARAMS), [Weighted(3.0, {"w": change})] * (rule.min_updates + 1))
    assert (np.sign(new["w"] - PARAMS["w"]) == np.sign(change)).all()


# --- rules that bound what a few sites can do ------------------------------------------------------------------------


def weigh(changes: np.ndarray) -> list[Weighted]:
    """Updates of very different weights, which these rules do not read."""
    return [Weighted(10.0**index, {"w": change}) for index, change in enumerate(changes.astype(np.float32))]


def apply(spec: dict[str, Any], changes: np.ndarray) -> np.ndarray:
    """The change that a rule makes of head zero."""
    rule = open_aggregator(spec, "aggregation")
    params = {"w": np.zeros(changes.shape[1:], np.float32)}
    new, _ = rule.update(params, rule.start(params), weigh(changes))
    return new["w"]


updates = npst.arrays(np.float32, st.tuples(st.integers(5, 9), st.just(4)), elements=st.floats(-10, 10, width=32))


@given(changes=updates)
def test_the_median_is_numpys_and_ignores_what_sites_say_of_their_size(changes: np.ndarray) -> None:
    got = apply({"kind": "median"}, changes)
    np.testing.assert_allclose(got, np.median(changes.astype(np.float64), axis=0), rtol=1e-6, atol=1e-6)


@given(changes=updates, trim=st.integers(1, 2))
def test_the_trimmed_mean_is_scipys(changes: np.ndarray, trim: int) -> None:
    got = apply({"kind": "trimmed_mean", "trim": trim}, changes)
    # SciPy takes a fraction, and cuts off what is not whole.
    expected = trim_mean(changes.astype(np.float64), (trim + 0.5) / len(changes), axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def choose_by_brute_force(changes: np.ndarray, byzantine: int) -> list[tuple[float, int]]:
    """Krum's scores by trying every set of n - f - 2 others, lowest first."""
    scores = []
    for index, change in enumerate(changes):
        others = [other for other in range(len(changes)) if other != index]
        sets = itertools.combinations(others, len(changes) - byzantine - 2)
        scores.append((min(sum(float(np.sum((changes[o] - change) ** 2)) for o in chosen) for chosen in sets), index))
    return sorted(scores)


@given(seed=st.integers(0, 999), num_sites=st.integers(7, 8), byzantine=st.integers(1, 2), selected=st.integers(1, 3))
def test_krum_selects_what_brute_force_selects(seed: int, num_sites: int, byzantine: int, selected: int) -> None:
    changes = np.random.default_rng(seed).normal(size=(num_sites, 5)).astype(np.float32).astype(np.float64)
    best = [index for _, index in choose_by_brute_force(changes, byzantine)[:selected]]
    got = apply({"kind": "krum", "byzantine": byzantine, "selected": selected}, changes)
    np.testing.assert_allclose(got, changes[best].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [{"kind": "median"}, {"kind": "trimmed_mean", "trim": 1}])
@given(changes=updates, hostile=st.floats(-1e9, 1e9, width=32), place=st.integers(0, 8))
def test_one_hostile_site_leaves_each_weight_between_changes_of_honest_sites(
    spec: dict[str, Any], changes: np.ndarray, hostile: float, place: int
) -> None:
    attacked = np.insert(changes, min(place, len(changes)), np.float32(hostile), axis=0)
    got = apply(spec, attacked)
    assert (got >= changes.min(axis=0) - 1e-5).all() and (got <= changes.max(axis=0) + 1e-5).all()


def test_krum_never_selects_an_update_that_is_far_from_all_others() -> None:
    changes = np.concatenate([np.random.default_rng(0).normal(size=(6, 5)), np.full((2, 5), 1e3)])
    assert np.abs(apply({"kind": "krum", "byzantine": 2, "selected": 2}, changes)).max() < 5


@pytest.mark.parametrize(
    ("spec", "needed"),
    [
        ({"kind": "median"}, 1),
        ({"kind": "trimmed_mean", "trim": 1}, 3),
        ({"kind": "trimmed_mean", "trim": 4}, 9),
        ({"kind": "krum", "byzantine": 1}, 5),
        ({"kind": "krum", "byzantine": 2}, 7),
        ({"kind": "krum", "byzantine": 1, "selected": 2}, 5),
        ({"kind": "krum", "byzantine": 1, "selected": 4}, 7),
    ],
)
def test_a_rule_needs_as_many_updates_as_its_proof(spec: dict[str, Any], needed: int) -> None:
    assert open_aggregator(spec, "aggregation").min_updates == needed


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ({"kind": "trimmed_mean"}, "trim"),
        ({"kind": "trimmed_mean", "trim": 0}, "trim"),
        ({"kind": "trimmed_mean", "trim": 1.5}, "trim"),
        ({"kind": "krum"}, "byzantine"),
        ({"kind": "krum", "byzantine": 0}, "byzantine"),
        ({"kind": "krum", "byzantine": 1, "selected": 0}, "selected"),
        ({"kind": "median", "trim": 1}, "trim"),
    ],
)
def test_a_wrong_integer_is_named(spec: dict[str, Any], key: str) -> None:
    with pytest.raises(BadInput, match=rf"aggregation\.{key}"):
        open_aggregator(spec, "aggregation")
