"""Schedules and decay towards the start: closed forms on small numbers, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.model.forecast import forecast_loss
from common.model.momentum import Momentum, adjust_step
from common.run import Adjustment, RunConfig, Schedule
from common.types import BadInput
from common.yaml import parse
from tests.tiny import run_config

MEAN = {"kind": "mean"}


def factors(rounds: int, **settings: Any) -> list[float]:
    schedule = Schedule(**settings)
    schedule.check_rounds(rounds)
    return [schedule.compute_factor(round_, rounds) for round_ in range(1, rounds + 1)]


def test_a_factor_rises_to_1_and_falls_to_its_end() -> None:
    assert factors(4) == [1.0] * 4
    assert factors(5, warm_up=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1.0, 1.0])
    assert factors(5, shape="linear", end=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert factors(6, shape="linear", end=0.5, warm_up=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1.0, 0.75, 0.5])
    cosine = factors(5, shape="cosine", end=0.2)
    assert cosine == pytest.approx(
        [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]
    )


def test_a_cosine_is_that_of_torch() -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=7, eta_min=0.1)
    expected = []
    for _ in range(8):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        torchs.step()
    assert factors(8, shape="cosine", end=0.1) == pytest.approx(expected)


def test_without_gradients_parameters_return_to_the_start_and_a_factor_alone_does_nothing() -> None:
    start, far = {"w": np.array([1.0, -2.0], np.float32)}, {"w": np.array([5.0, 6.0], np.float32)}
    adjustment, params = Adjustment(decay_to_start=0.25, schedule=Schedule(shape="linear")), far
    for round_ in range(1, 41):
        params = adjust_step(adjustment, params, params, start, round_=round_, rounds=40)
        expected = start["w"] + 0.75**round_ * (far["w"] - start["w"])
        np.testing.assert_allclose(params["w"], expected, rtol=1e-5)
        assert params["w"].dtype == np.float32
    np.testing.assert_allclose(params["w"], start["w"], atol=1e-4)
    still = adjust_step(Adjustment(schedule=Schedule(warm_up=3)), far, far, start, round_=1, rounds=9)
    assert np.array_equal(still["w"], far["w"])
    assert adjust_step(Adjustment(), start, far, start, round_=1, rounds=9) is far


def test_a_factor_shortens_the_step_and_nothing_else() -> None:
    old, new = {"w": np.array([1.0], np.float32)}, {"w": np.array([3.0], np.float32)}
    schedule = Schedule(warm_up=3)
    got = [adjust_step(Adjustment(schedule=schedule), old, new, old, round_=at, rounds=9)["w"][0] for at in (1, 2, 4)]
    assert got == [1.5, 2.0, 3.0]


@pytest.mark.parametrize("noise", [20.0, 90.0])
def test_the_noise_of_a_logit_is_that_of_noise_really_drawn(noise: float) -> None:
    rule, units, sites = Momentum(rounds=24, step=2.0, noise=noise), 2000, 3
    adjustment = Adjustment(schedule=Schedule(warm_up=4, shape="cosine"), decay_to_start=0.05)
    step, momentum = rule.choose_step(units, sites)
    rng = np.random.default_rng(0)
    start = {"w": np.zeros(20_000, np.float32)}
    velocity, params = np.zeros(20_000), start
    for round_ in range(1, 25):
        velocity = momentum * velocity + noise * rng.normal(size=(sites, 20_000)).sum(axis=0) / units
        new = {"w": params["w"] - step * velocity}
        params = adjust_step(adjustment, params, new, start, round_=round_, rounds=24)
    assert rule.compute_logit_noise(units, sites, adjustment) == pytest.approx(params["w"].std(), rel=0.03)
    assert rule.compute_logit_noise(units, sites, adjustment) < 0.9 * rule.compute_logit_noise(units, sites)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay_to_start": 1.0}, "decay_to_start: expected a number below 1"),
        ({"decay_to_start": -0.1}, "decay_to_start: .*a number of at least 0"),
        ({"schedule": {"warm_up": 2}}, r"aggregation.schedule: expected a schedule of at most the run's 2 round\(s\)"),
        ({"schedule": {"warm_up": 1, "shape": "linear"}}, r"of at most the run's 2 round\(s\), got one of 3"),
        ({"schedule": {"shape": "cosinus"}}, "nearest: 'cosine'"),
        ({"schedule": {"end": 0.5}}, "end: expected none beside `shape: constant`"),
        ({"schedule": {"shape": "linear", "end": 0.0}}, "end: .*a number above 0"),
        ({"tasks": {"size": {"decay_to_start": 2}}}, "aggregation.tasks.size.decay_to_start: .*a number below 1"),
        ({"tasks": {"size": {"schedule": {"warm_up": 9}}}}, "aggregation.tasks.size.schedule: expected a schedule of"),
    ],
)
def test_what_diverges_or_does_not_fit_is_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        run_config(aggregation={**MEAN, **settings})
    assert "\n" not in str(refused.value)


def test_a_task_may_have_its_own_and_the_aggregator_sees_none_of_it() -> None:
    own = {"size": {"decay_to_start": 0.5, "learning_rate": 2.0}}
    run = run_config(aggregation={**MEAN, "schedule": {"warm_up": 1}, "tasks": own})
    assert run.aggregation.select_adjustment("size") == Adjustment(decay_to_start=0.5, schedule=Schedule(warm_up=1))
    assert run.aggregation.select_adjustment("colour") == Adjustment(schedule=Schedule(warm_up=1))
    assert run.aggregation_of("size").settings() == {"kind": "mean", "learning_rate": 2.0}
    assert parse(RunConfig, run.model_dump(mode="json"), base=Path.cwd()) == run


def test_a_run_that_adjusts_nothing_is_offered_as_ever() -> None:
    """Sites approve a digest of it."""
    assert run_config().model_dump(mode="json")["aggregation"] == MEAN


def test_the_forecast_follows_the_runs_schedule_decay_and_smoothing() -> None:
    values = {
        "solver": {"kind": "auto"},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
        "aggregation": None,
        "rounds": 6,
    }
    found = []
    for adjusts in (None, {"schedule": {"shape": "linear"}}, {"decay_to_start": 0.3}, {"schedule": {"warm_up": 0}}):
        forecast = forecast_loss(run_config(**{**values, "aggregation": adjusts}), "colour", 32, 600, 3)
        assert forecast is not None
        found.append(forecast)
    smooth = {"colour": {"kind": "classification", "labels": ["red", "green", "blue"], "smoothing": 0.5}}
    found.append(forecast_loss(run_config(**{**values, "tasks": smooth}), "colour", 32, 600, 3))
    assert found[0] == found[3]
    assert len({repr(each) for each in found}) == 4
