"""Groups of sites that count the same: weights from declared sizes and names alone, and the noise that they cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.model.guessing import Totals
from common.model.momentum import Momentum
from common.run import Adjustment, RunConfig
from common.types import BadInput
from common.yaml import parse
from server.rounds.aggregators import Weighted, open_aggregator
from tests.tiny import run_config

SIZES = {"east": 450.0, "north": 100.0, "south": 50.0, "west": 50.0}
MEAN = {"kind": "mean", "learning_rate": 1.0}


def weigh(balance: Any) -> dict[str, float]:
    return Adjustment(balance=balance).weigh_sites(SIZES)


def test_each_site_or_each_group_has_the_same_weight_and_all_have_that_of_all_units() -> None:
    assert weigh(None) == SIZES
    assert weigh("sites") == pytest.approx(dict.fromkeys(SIZES, 162.5))
    # West is in no group: one of its own. Within a group units count the same.
    found = weigh({"coast": ["east", "south"], "far": ["north", "gone"]})
    total = 650.0 / 3
    assert found == pytest.approx({"east": 0.9 * total, "south": 0.1 * total, "north": total, "west": total})


def test_a_group_and_a_site_of_one_name_are_two() -> None:
    assert weigh({"west": ["east", "north", "south"]})["west"] == pytest.approx(325.0)


@pytest.mark.parametrize("balance", [None, "sites", {"coast": ["east", "south"], "far": ["north"]}])
def test_the_steps_follow_from_the_noise_that_the_weights_make(balance: Any) -> None:
    """The deviation of the mean update's noise is noise sqrt(sum r^2) / N, which is what `heavy_ball` divides by."""
    weights = weigh(balance)
    noise, rng, draws = 3.0, np.random.default_rng(0), 20_000
    updates = {site: noise / size * rng.standard_normal(draws) for site, size in SIZES.items()}
    total = sum(weights.values())
    mean = sum(weights[site] / total * updates[site] for site in SIZES)
    factors = [weights[site] / size for site, size in SIZES.items()]
    said = noise * math.sqrt(sum(factor**2 for factor in factors)) / total
    assert np.std(mean) == pytest.approx(said, rel=0.02)
    units = Adjustment(balance=balance).count_effective_units(SIZES)
    assert noise * math.sqrt(len(SIZES)) / units == pytest.approx(said)
    assert units <= total * (1 + 1e-12)


def test_a_balanced_sum_takes_the_steps_of_its_own_noise() -> None:
    """One update that is the weighted mean of all, with the variance of its noise, has the same result."""
    settings = {"kind": "heavy_ball", "rounds": 8, "noise": 500.0}
    aggregator = open_aggregator(settings, "aggregation")
    rng = np.random.default_rng(1)
    params = {"weight": rng.normal(size=(3, 4)).astype(np.float32)}
    weights = weigh("sites")
    deltas = [
        Weighted(
            weights[site], {"weight": rng.normal(size=(3, 4)).astype(np.float32)}, (weights[site] / SIZES[site]) ** 2
        )
        for site in SIZES
    ]
    new, _ = aggregator.update(params, aggregator.start(params), deltas)
    step, _ = Momentum(rounds=8, noise=500.0).choose_step(650.0, sum(each.sites for each in deltas))
    plain, _ = Momentum(rounds=8, noise=500.0).choose_step(650.0, 4)
    assert step < plain
    mean = np.mean([each.delta["weight"] for each in deltas], axis=0)
    np.testing.assert_allclose(new["weight"], params["weight"] + step * mean, rtol=1e-4, atol=1e-6)


def test_the_outlook_of_a_run_knows_of_the_noise() -> None:
    sizes = {"east": 900, "west": 100}
    every = Totals.of(run_config(), "colour", sizes)
    balanced = Totals.of(run_config(aggregation={**MEAN, "balance": "sites"}), "colour", sizes)
    assert every == Totals(1000, 2)
    # r is 5 / 9 and 5: sqrt((r^2 + r^2) / 2) = 3.557.
    assert balanced == Totals(281, 2)


def test_a_run_that_balances_nothing_is_offered_as_ever() -> None:
    """Sites approve a digest of it."""
    assert run_config(aggregation=MEAN).model_dump(mode="json")["aggregation"] == MEAN
    run = run_config(aggregation={**MEAN, "balance": {"coast": ["east"]}})
    assert parse(RunConfig, run.model_dump(mode="json"), base=Path.cwd()) == run
    assert run.aggregation_of("size").settings() == MEAN


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"balance": "units"}, "aggregation.balance"),
        ({"balance": {}}, "aggregation.balance"),
        ({"balance": {"a": ["east"], "b": ["east"]}}, "balance: expected each site in one group, got east in more"),
        ({"tasks": {"size": {"balance": {"a": ["east", "east"]}}}}, "balance: expected each site in one group"),
    ],
)
def test_what_names_no_groups_is_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        run_config(aggregation={**MEAN, **settings})
    assert "\n" not in str(refused.value)


def test_a_secure_sum_has_no_sites_to_balance() -> None:
    secure = {
        "trust": "secure_sum",
        "colluding": 1,
        "cohort": {"min_sites": 3},
        "solver": {"kind": "head_sum", "clip_norm": 1.0},
    }
    private = {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}
    run_config(aggregation=MEAN, privacy=private, **secure)
    with pytest.raises(BadInput, match="aggregation.balance: expected none with `trust: secure_sum`"):
        run_config(aggregation={**MEAN, "balance": "sites"}, privacy=private, **secure)
