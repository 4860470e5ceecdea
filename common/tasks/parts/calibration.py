"""The temperature of a head, from sums that sites release with their evaluation.

With privacy a head's probabilities are often far from its accuracy: few noised steps leave them too low, steps with
noise make them too high. Dividing the outputs by one number, the temperature, mends both and changes no prediction of
the most probable class. It is found where the mean confidence equals the accuracy (Clarte et al. 2023, arXiv
2210.03702), which on the heads at hand is as good as the maximum of the likelihood.

A record adds its overconfidence (the probability of its predicted class, less 1 where that is its class), in [-1, 1],
at five sharpnesses 1 / temperature. Unlike a log likelihood it is bounded without clipping, and unlike score buckets it
is exact for any number of classes. It grows with sharpness, whatever the prior, so that there is one crossing.

# Shapes: B examples, G sharpnesses, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.tasks import NOISED_BUCKETS, Calibratable, ServedPrior, SparseRows, Statistic, Task

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]

SHARPNESSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seen on heads of six data sets at epsilon 1 to 8: the best sharpness is between 0.46 and 3.5."""

_ADDED = len(SHARPNESSES) + 1
_MOST_ERROR = math.log(1.5)
"""Error of the logarithm of a temperature above which nothing is said. Within it a wrong temperature costs little: a
factor of 1.5 costs less than 0.02 of log loss on these heads."""


_MOST_GAP_ERROR = 0.25
"""Error of a gap above which nothing is said: confidences are from 1 / (number of classes) to 1."""


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature and how sure it is of the noise.

    Attributes:
        temperature: number by which outputs are to be divided; None where the noise is too large to tell.
        low: lower end of the temperature's interval of one standard error of the noise.
        high: its upper end.
        gap: mean confidence minus accuracy before the division; None where the noise is too large to tell.
        gap_error: standard error of the gap due to the noise.
        gap_left: expected distance between mean confidence and accuracy after the division, which the noise leaves;
            None without a temperature.
    """

    temperature: float | None
    low: float
    high: float
    gap: float | None
    gap_error: float
    gap_left: float | None


def make_released_statistic(task: Task, *, calibrate: bool, offset: Sequence[float] | None = None) -> Statistic:
    """Returns the statistic that sites release: the task's, and the overconfidence beside it where asked for.

    Args:
        task: the task.
        calibrate: whether the run asks for a temperature; a task without probabilities releases none.
        offset: of a head that is served for a declared prior, the outputs' offset in training: the logarithm of the
            label shares, as they were released with noise. It takes the place of the served offset, so that the head
            is judged with the prior of the records that it is evaluated on. None for other heads.
    """
    statistic = task.statistic(NOISED_BUCKETS)
    if not calibrate or not isinstance(task, Calibratable):
        return statistic
    calibratable = task

    def build_rows(outputs: Tensor, labels: Tensor) -> SparseRows:
        from common.tasks.parts.statistics import join_rows

        return join_rows(
            statistic.entries(outputs, labels),
            _build_overconfidence(calibratable, outputs, labels, offset, statistic.size),
        )

    return replace(
        statistic,
        size=statistic.size + _ADDED,
        # All added entries together are of length 1 at most.
        bound=math.hypot(statistic.bound, 1.0),
        entries=build_rows,
        compute=lambda sums_S, clip: statistic.compute(sums_S[:-_ADDED], clip),
    )


def _build_overconfidence(
    task: Calibratable, outputs: Tensor, labels: Tensor, offset: Sequence[float] | None, first: int
) -> SparseRows:
    """Returns the added entries: overconfidence at each sharpness, then the known part of the labels."""
    import torch

    outputs = outputs.double()
    offset_K = outputs.new_zeros(outputs.shape[1])
    if offset is not None and isinstance(task, ServedPrior):
        outputs, offset_K = outputs - outputs.new_tensor(task.served_offset()), outputs.new_tensor(offset)
    columns = [task.overconfidence(sharpness * outputs, labels, offset_K) for sharpness in SHARPNESSES]
    value_BP = torch.stack([*columns, task.known_part(labels).double()], dim=1) / math.sqrt(_ADDED)
    index_P = torch.arange(first, first + _ADDED, device=value_BP.device)
    return SparseRows(index_P.expand(len(value_BP), _ADDED), value_BP)


def fit_temperature(sums_S: Array, deviation: float, draws_NP: Array) -> TemperatureFit:
    """Returns the temperature that noised sums of a calibrated statistic tell.

    Args:
        sums_S: summed rows.
        deviation: standard deviation of the noise in each entry.
        draws_NP: standard normal draws, one row for each repetition; the last entries of each are used.
    """
    sums = sums_S[-_ADDED:] * math.sqrt(_ADDED)
    deviation *= math.sqrt(_ADDED)
    gaps_G, count = sums[:-1], float(sums[-1])
    noised_NG = gaps_G + deviation * draws_NP[:, -_ADDED:-1]
    logarithm, drawn_N = _find_logarithm(gaps_G), np.array([_find_logarithm(gaps) for gaps in noised_NG])
    below, above = np.quantile(drawn_N, (0.15866, 0.84134))
    counted = count > 2 * deviation
    gap_error = deviation / count if counted else math.inf
    readable = counted and (above - below) / 2 <= _MOST_ERROR
    left = math.sqrt(float(np.mean(np.interp(drawn_N, _LOGARITHMS, _order(gaps_G)) ** 2))) / count if readable else None
    return TemperatureFit(
        temperature=math.exp(-logarithm) if readable else None,
        low=math.exp(-above),
        high=math.exp(-below),
        gap=float(gaps_G[SHARPNESSES.index(1.0)]) / count if gap_error <= _MOST_GAP_ERROR else None,
        gap_error=gap_error,
        gap_left=left,
    )


_LOGARITHMS = np.log(SHARPNESSES)


def _order(gaps_G: Array) -> Array:
    """Returns the closest values that never fall: true overconfidence grows with sharpness (isotonic regression)."""
    count = len(gaps_G)
    means = [[gaps_G[min(i, j) : max(i, j) + 1].mean() for j in range(count)] for i in range(count)]
    return np.array([max(min(means[i][j] for j in range(k, count)) for i in range(k + 1)) for k in range(count)])


def _find_logarithm(gaps_G: Array) -> float:
    """Returns the logarithm of the sharpness at which the gap is zero, between the first and the last."""
    ordered_G = _order(gaps_G)
    # Equal values give way, so that the crossing is one place.
    return float(np.interp(0.0, ordered_G + 1e-9 * np.arange(len(ordered_G)), _LOGARITHMS))
