"""The loss that privacy will cost a linear head: a rehearsal on synthetic features with the run's public numbers.

A run of `head_sum` and `heavy_ball` is a recursion in which only the records are unknown. Here it is run with records
that are drawn: as many classes, features, units, sites and rounds, and the same noise. Records of real data lie between
two worlds: in one, classes differ in all directions, as on features of a network that suits them; in the other in few,
and overlap. The loss of each against the same training without noise bounds what is to be expected; docs/results.md
shows forecasts beside what was seen.

Nothing here reads a record or a result, and the draws are the same each time.

# Shapes: N records, D features, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from common.model.momentum import Momentum, read_momentum
from common.privacy.shares import plan_moments
from common.run import NO_ADJUSTMENT, Adjustment, RunConfig
from common.tasks import open_task
from common.tasks.classification import Classification

Array = NDArray[np.float32]

MOST_RECORDS, MOST_FEATURES, TEST_RECORDS = 700, 256, 1000
"""Most records, features and test records of a rehearsal. With more, the loss is the same within a point: the noise is
scaled to fewer records, and further features matter little."""

_COMMON = 0.5
"""Squared length of the mean of features of length 1."""
_OVERLAP = 0.93
"""Accuracy that the overlapping classes allow."""
_SPREAD = 0.4
"""Distance of far classes in deviations, in each direction."""


@dataclass(frozen=True)
class Forecast:
    """The accuracy that privacy costs on synthetic features.

    Attributes:
        least: loss where classes are far apart, from 0 to 1.
        most: loss where they overlap.
        share_kept: part of what training gains over guessing that is left, in the better of the two worlds.
    """

    least: float
    most: float
    share_kept: float


@dataclass(frozen=True)
class Rehearsal:
    """The public numbers of a rehearsal.

    Attributes:
        momentum: the coordinator's rule.
        clip_norm: bound on a unit's gradient.
        num_outputs: number of classes.
        num_features: number of features.
        num_units: declared number of units of all sites together.
        num_noises: variance of the noise of all sites together, in multiples of one site's.
        mean_deviation: deviation of the noise in one site's sum of features; infinite where no mean is measured.
        adjustment: the run's schedule and decay.
        smoothing: part of each label that the loss shares among all classes.
    """

    momentum: Momentum
    clip_norm: float
    num_outputs: int
    num_features: int
    num_units: float
    num_noises: float
    mean_deviation: float = math.inf
    adjustment: Adjustment = NO_ADJUSTMENT
    smoothing: float = 0.0


def forecast_loss(run: RunConfig, task: str, num_features: int, num_units: float, num_sites: int) -> Forecast | None:
    """Returns what privacy will cost a task; None for what cannot be rehearsed.

    That is a run without privacy, a task that is no classification, and a solver other than `head_sum` with the
    aggregator `heavy_ball`.

    Args:
        run: the run.
        task: name of the task.
        num_features: number of its features.
        num_units: declared number of units of all sites that have the task.
        num_sites: number of those sites.
    """
    opened = open_task(run.tasks[task].settings(), f"tasks.{task}")
    momentum = read_momentum(run, task)
    clip_norm = run.solver.settings().get("clip_norm")
    if run.requested_privacy is None or run.solver.kind != "head_sum" or momentum is None or clip_norm is None:
        return None
    if not isinstance(opened, Classification):
        return None
    num_noises = run.count_noises(num_sites)
    # Sums before the first round have each site's whole noise, also where those of rounds are secure.
    mean_noise = _read_mean(run) * math.sqrt(num_sites / num_noises)
    rehearsal = Rehearsal(
        momentum,
        clip_norm,
        len(opened.labels),
        num_features,
        num_units,
        num_noises,
        mean_noise,
        run.aggregation.select_adjustment(task),
        opened.smoothing,
    )
    return rehearse(rehearsal)


@lru_cache(maxsize=256)
def rehearse(numbers: Rehearsal) -> Forecast:
    """Returns the losses of both worlds."""
    far, overlapping = (_rehearse_in(numbers, decay) for decay in (0.0, 0.5))
    guessing = 1.0 / numbers.num_outputs
    kept = (max(0.0, private - guessing) / max(free - guessing, 1e-9) for free, private in (far, overlapping))
    losses = [max(0.0, free - private) for free, private in (far, overlapping)]
    return Forecast(min(losses), max(losses), min(1.0, max(kept)))


def _read_mean(run: RunConfig) -> float:
    """Returns the deviation of the noise in one site's sum of features."""
    assert run.requested_privacy is not None
    plan = plan_moments(run, run.requested_privacy.unit)
    if plan is None or run.moments is None or not run.moments.means:
        return math.inf
    factor = math.sqrt(run.moments.means / run.moments.share / len(run.backbone_specs))
    return plan.noise_multiplier / factor


def _rehearse_in(numbers: Rehearsal, decay: float) -> tuple[float, float]:
    """Returns the accuracy without and with privacy; with more `decay` classes differ in fewer directions."""
    rng = np.random.default_rng(0)
    num_records = min(round(numbers.num_units), MOST_RECORDS)
    features, labels = _draw_records(numbers, decay, num_records + TEST_RECORDS, rng)
    rest = _add_rest_of_mean(features, numbers, rng)
    step, momentum = numbers.momentum.choose_step(numbers.num_units, numbers.num_noises)
    noise = numbers.momentum.noise * math.sqrt(numbers.num_noises) * num_records / numbers.num_units
    free = replace(numbers, clip_norm=math.inf)
    weights = _train(features[:num_records], labels[:num_records], free, (numbers.momentum.step, 0.9), 0.0, rng)
    noised = _train(rest[:num_records], labels[:num_records], numbers, (step, momentum), noise, rng)
    return (
        _score(features[num_records:], labels[num_records:], weights),
        _score(rest[num_records:], labels[num_records:], noised),
    )


def _draw_records(
    numbers: Rehearsal, decay: float, count: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.int64]]:
    """Returns features of length 1 around their mean, and labels: each direction with a smaller deviation."""
    width, classes = min(numbers.num_features, MOST_FEATURES), numbers.num_outputs
    order_D = np.arange(1, width + 1)
    deviation_D, weight_D = order_D**-0.25, order_D**-decay
    if decay:
        distance = 2.0 * NormalDist().inv_cdf(1.0 - (1.0 - _OVERLAP) / (classes - 1)) / math.sqrt(2.0)
    else:
        distance = _SPREAD * (classes / 2.0) ** 0.25 * math.sqrt(width)
    weight_D = weight_D / math.sqrt(float(weight_D @ weight_D))
    means_KD = rng.normal(size=(classes, width)) * deviation_D * weight_D * distance
    labels_N = np.arange(count) % classes
    features_ND = means_KD[labels_N] - means_KD.mean(0) + rng.normal(size=(count, width)) * deviation_D
    return _normalize(features_ND), labels_N


def _add_rest_of_mean(features_ND: Array, numbers: Rehearsal, rng: np.random.Generator) -> Array:
    """Returns features around what is left of their mean, when a noised one was subtracted."""
    width = features_ND.shape[1]
    variance = width * numbers.num_noises * (numbers.mean_deviation / numbers.num_units) ** 2
    left = _COMMON if math.isinf(variance) else _COMMON * variance / (_COMMON + variance)
    rest_D = rng.normal(size=width)
    rest_D *= math.sqrt(left) / float(np.linalg.norm(rest_D))
    return _normalize(math.sqrt(1.0 - _COMMON) * features_ND + rest_D)


def _train(
    features_ND: Array,
    labels_N: NDArray[np.int64],
    numbers: Rehearsal,
    rule: tuple[float, float],
    noise: float,
    rng: np.random.Generator,
) -> Array:
    """Returns weights [D, K] after all rounds; `rule` are step and momentum."""
    targets_NK = np.eye(numbers.num_outputs, dtype=np.float32)[labels_N]
    targets_NK = (1.0 - numbers.smoothing) * targets_NK + numbers.smoothing / numbers.num_outputs
    adjustment, rounds = numbers.adjustment, numbers.momentum.rounds
    weights_DK = np.zeros((features_ND.shape[1], numbers.num_outputs), np.float32)
    velocity_DK = np.zeros_like(weights_DK)
    for round_ in range(1, rounds + 1):
        outputs_NK = features_ND @ weights_DK
        slopes_NK = np.exp(outputs_NK - outputs_NK.max(1, keepdims=True))
        slopes_NK = slopes_NK / slopes_NK.sum(1, keepdims=True) - targets_NK
        length_N1 = np.sqrt(np.square(slopes_NK).sum(1, keepdims=True))
        slopes_NK *= np.minimum(1.0, numbers.clip_norm / np.maximum(length_N1, 1e-9)).astype(np.float32)
        sum_DK = features_ND.T @ slopes_NK
        if noise:
            sum_DK += (noise * rng.standard_normal(sum_DK.shape)).astype(np.float32)
        velocity_DK = rule[1] * velocity_DK + sum_DK / len(labels_N)
        step = rule[0] * adjustment.compute_factor(round_, rounds)
        weights_DK = (1.0 - adjustment.decay_to_start) * (weights_DK - step * velocity_DK)
    return weights_DK


def _score(features_ND: Array, labels_N: NDArray[np.int64], weights_DK: Array) -> float:
    return float(((features_ND @ weights_DK).argmax(1) == labels_N).mean())


def _normalize(rows_ND: NDArray[np.floating]) -> Array:
    normalized_ND: Array = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)
    return normalized_ND
