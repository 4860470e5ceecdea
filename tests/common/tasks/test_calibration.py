"""The temperature that sums of overconfidence tell: against labels drawn from known probabilities, and under noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.tasks import Task, open_task
from common.tasks.parts.calibration import TemperatureFit, fit_temperature, make_released_statistic

FOUR = open_task({"kind": "classification", "labels": ["a", "b", "c", "d"]}, "four")
TWO = open_task({"kind": "classification", "labels": ["a", "b"], "threshold": 0.9}, "two")
SIGNS = open_task({"kind": "multilabel", "labels": ["a", "b", "c"], "threshold": 0.9}, "signs")


def draw(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from the probabilities that they state."""
    generator = torch.Generator().manual_seed(seed)
    width = len(task.model_dump()["labels"])
    logits = 1.5 * torch.randn(count, width, generator=generator)
    if task.kind == "multilabel":
        labels = (torch.rand(count, width, generator=generator) < logits.sigmoid()).long()
        return logits, labels.where(torch.rand(count, width, generator=generator) < 0.7, -1)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def fit(
    task: Task, outputs: Tensor, labels: Tensor, deviation: float = 0.0, offset: list[float] | None = None
) -> TemperatureFit:
    statistic = make_released_statistic(task, calibrate=True, offset=offset)
    rng = np.random.default_rng(0)
    sums = statistic.sums(outputs, labels).numpy() + deviation * rng.normal(size=statistic.size)
    return fit_temperature(sums, deviation, rng.normal(size=(200, statistic.size)))


@pytest.mark.parametrize("task", [FOUR, TWO, SIGNS], ids=["four", "two", "signs"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 3.0])
def test_probabilities_that_were_sharpened_are_given_back_their_temperature(task: Task, temperature: float) -> None:
    logits, labels = draw(task, 20_000, 1)
    found = fit(task, temperature * logits, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.08)
    assert found.low == found.high == pytest.approx(found.temperature)
    assert found.gap_left == pytest.approx(0.0, abs=1e-6)
    assert (found.gap > 0.02) == (temperature > 1.0) and (found.gap < -0.02) == (temperature < 1.0)


def test_the_gap_is_mean_confidence_minus_accuracy() -> None:
    logits, labels = draw(FOUR, 500, 2)
    found = fit(FOUR, 2.0 * logits, labels)
    confidence, predicted = (2.0 * logits).softmax(1).max(1)
    assert found.gap == pytest.approx(float(confidence.mean() - (predicted == labels).float().mean()), abs=1e-6)


def test_a_head_for_a_uniform_prior_is_judged_with_the_prior_of_those_it_is_evaluated_on() -> None:
    """One in twenty is positive; without the offset the served probabilities look far too high."""
    logits, _ = draw(TWO, 40_000, 3)
    prior = torch.tensor([math.log(0.95), math.log(0.05)])
    labels = torch.multinomial((logits + prior).softmax(1), 1, generator=torch.Generator().manual_seed(4)).squeeze(1)
    assert fit(TWO, 2.0 * logits, labels, offset=prior.tolist()).temperature == pytest.approx(2.0, rel=0.1)
    rare = open_task({**TWO.model_dump(by_alias=True), "prior": {"a": 0.8, "b": 0.2}}, "rare")
    served = 2.0 * logits + torch.tensor(rare.served_offset())
    assert fit(rare, served, labels, offset=prior.tolist()).temperature == pytest.approx(2.0, rel=0.1)
    assert fit(TWO, 2.0 * logits, labels).temperature == 4.0  # The end of what is looked at.


def test_the_interval_is_that_of_repeated_noise() -> None:
    logits, labels = draw(FOUR, 3000, 5)
    statistic = make_released_statistic(FOUR, calibrate=True)
    rng, sums = np.random.default_rng(6), statistic.sums(2.0 * logits, labels).numpy()
    seen = [
        fit_temperature(sums + 30.0 * rng.normal(size=len(sums)), 30.0, np.zeros((1, len(sums)))).temperature
        for _ in range(300)
    ]
    found = fit_temperature(sums, 30.0, rng.normal(size=(300, len(sums))))
    below, above = np.quantile(np.array(seen, dtype=float), (0.159, 0.841))
    assert (found.low, found.high) == (pytest.approx(below, rel=0.1), pytest.approx(above, rel=0.1))
    assert found.gap_error == pytest.approx(30.0 * math.sqrt(6) / 3000, rel=0.05)
    assert 0.3 * found.gap_error < found.gap_left < 3 * found.gap_error


def test_noise_that_hides_the_temperature_leaves_none() -> None:
    logits, labels = draw(FOUR, 300, 7)
    hidden = fit(FOUR, 2.0 * logits, labels, deviation=100.0)
    assert hidden.temperature is None and hidden.gap is None and hidden.gap_left is None
    statistic = make_released_statistic(FOUR, calibrate=True)
    nobody = fit_temperature(np.zeros(statistic.size), 0.0, np.zeros((2, statistic.size)))
    assert nobody.temperature is None and nobody.gap is None
