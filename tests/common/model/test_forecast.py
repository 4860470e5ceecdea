"""Forecasts: what more privacy, fewer units and other tasks make of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.model.forecast import Forecast, Rehearsal, forecast_loss, rehearse
from common.model.momentum import Momentum
from common.run import RunConfig
from common.yaml import parse

RUN: dict[str, Any] = {
    "name": "forecast",
    "seed": 1,
    "rounds": 12,
    "backbone": {"kind": "identity", "dim": 16},
    "tasks": {"kind": {"kind": "classification", "labels": ["a", "b", "c"]}},
    "solver": {"kind": "auto"},
    "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
}


def forecast(epsilon: float, num_units: float = 400.0, num_sites: int = 4) -> Forecast:
    run = parse(RunConfig, {**RUN, "privacy": {**RUN["privacy"], "target_epsilon": epsilon}}, base=Path.cwd())
    found = forecast_loss(run, "kind", 16, num_units, num_sites)
    assert found is not None
    return found


def test_more_noise_costs_more() -> None:
    losses = [forecast(epsilon).most for epsilon in (0.3, 1.0, 8.0)]
    assert losses[0] > losses[1] + 0.05 and losses[1] > losses[2] + 0.02
    assert forecast(1.0, num_units=4000.0).most < losses[1] / 2
    assert forecast(1.0, num_sites=16).most > losses[1]


def test_without_noise_nothing_is_lost() -> None:
    silent = Rehearsal(Momentum(rounds=24, step=6.0, noise=1e-6), 0.5, 3, 16, 400.0, 1.0, mean_deviation=1e-6)
    assert rehearse(silent).most < 0.02 and rehearse(silent).share_kept > 0.98


def test_noise_alone_is_as_good_as_guessing() -> None:
    deaf = Rehearsal(Momentum(rounds=24, step=6.0, noise=1e6), 0.5, 3, 16, 400.0, 1.0)
    assert rehearse(deaf).share_kept < 0.25 and rehearse(deaf).least > 0.3


def test_a_mean_that_is_not_measured_costs_as_one_that_noise_hides() -> None:
    numbers = Rehearsal(Momentum(rounds=24, step=6.0, noise=20.0), 0.5, 3, 16, 400.0, 1.0, mean_deviation=1.0)
    without = rehearse(replace(numbers, mean_deviation=math.inf))
    assert rehearse(replace(numbers, mean_deviation=1e9)) == without
    assert rehearse(numbers).most < without.most


def test_the_same_numbers_have_the_same_forecast_and_it_is_one() -> None:
    first = forecast(1.0)
    assert forecast(1.0) == first and 0.0 <= first.least <= first.most <= 1.0 and 0.0 <= first.share_kept <= 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": "non_private"},
        {"tasks": {"kind": {"kind": "regression", "range": [0, 1]}}},
        {"tasks": {"kind": {"kind": "classification", "labels": ["a", "b"], "head": {"hidden": 4}}}},
        {
            "solver": {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0},
            "aggregation": {"kind": "mean"},
        },
    ],
)
def test_what_cannot_be_rehearsed_has_no_forecast(changes: dict[str, Any]) -> None:
    run = parse(RunConfig, {**RUN, **changes}, base=Path.cwd())
    assert forecast_loss(run, "kind", 16, 400.0, 4) is None
