"""Noised evaluations: checked, summed over sites task by task, turned into metrics with their standard errors.

All of it is a function of what sites have released, so it costs no privacy. The standard error of a metric is that
of the privacy noise alone, by adding fresh noise of the same size to the sums (parametric bootstrap): it says nothing
of how few held-out units there are, which is not known here. A metric that noise has made unreadable has no value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import messages
from common.events import Calibration, NoisedMetrics, Outcomes
from common.tasks import NOISED_BUCKETS, Calibratable, CountedOutcomes, Statistic, Task
from common.tasks.parts.calibration import fit_temperature, make_released_statistic
from common.types import NOISE_MULTIPLIERS, BadInput

_SUMS = "sums"
_DRAWS = 200
_ONE_DEVIATION = (0.84134, 0.15866)
"""Quantiles of a normal distribution one standard deviation above and below its mean."""


@dataclass(frozen=True)
class SiteRelease:
    """One site's released statistics.

    Attributes:
        site: the site's name.
        reply: its reply, checked by `check_evaluation`.
    """

    site: str
    reply: messages.EvaluateReply

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each entry; a unit of T tasks counts at most sqrt(T)."""
        return self.reply.noise_multiplier * math.sqrt(len(self.reply.sums))


def check_evaluation(reply: messages.EvaluateReply, tasks: Mapping[str, Task], *, calibrate: bool = False) -> None:
    """Checks that released statistics fit the site's tasks.

    Args:
        reply: a site's reply.
        tasks: the site's tasks by name.
        calibrate: whether the run asks for a temperature.

    Raises:
        BadInput: another set of tasks, another number of statistics, a value that is not finite, or absurd noise.
    """
    if reply.noise_multiplier > NOISE_MULTIPLIERS.high:
        raise BadInput(f"evaluation: expected noise of at most {NOISE_MULTIPLIERS.high:g} times the bound on one unit")
    if set(reply.sums) != set(tasks):
        raise BadInput(f"evaluation: expected tasks {', '.join(sorted(tasks))}, got another set")
    for name, task in tasks.items():
        size = make_released_statistic(task, calibrate=calibrate).size
        if set(reply.sums[name]) != {_SUMS} or reply.sums[name][_SUMS].shape != (size,):
            raise BadInput(f"evaluation: {name}: expected {size} statistics, got another shape")
        if not np.isfinite(reply.sums[name][_SUMS]).all():
            raise BadInput(f"evaluation: {name}: expected finite statistics")


def compute_metrics(
    tasks: Mapping[str, Task], releases: Sequence[SiteRelease], seed: int, *, calibrate: bool = False
) -> dict[str, NoisedMetrics]:
    """Returns each task's metrics over all sites that have it; tasks that no site evaluated are left out.

    Args:
        tasks: the run's tasks by name.
        releases: checked releases, at most one of each site.
        seed: seed of the bootstrap's noise.
        calibrate: whether the releases tell the heads' overconfidence too.
    """
    results = {}
    for name, task in tasks.items():
        with_task = [release for release in releases if name in release.reply.sums]
        if not with_task:
            continue
        statistic = make_released_statistic(task, calibrate=calibrate)
        sums, deviation = _add_up(name, statistic, with_task)
        draws = np.random.default_rng(seed).normal(size=(_DRAWS, len(sums)))
        noise = draws * deviation
        errors, unclipped_errors = (_compute_errors(statistic, sums + noise, clip) for clip in (True, False))
        unclipped = statistic.compute(sums, False)
        readable = {
            metric: is_readable(unclipped[metric], unclipped_errors[metric], ends)
            for metric, ends in statistic.ranges.items()
        }
        results[name] = NoisedMetrics(
            metrics={metric: value if readable[metric] else None for metric, value in statistic.values(sums).items()},
            standard_errors={
                metric: error if readable[metric] else unclipped_errors[metric] for metric, error in errors.items()
            },
            sites=tuple(sorted(release.site for release in with_task)),
            calibration=_calibrate(sums, deviation, draws) if calibrate and isinstance(task, Calibratable) else None,
        )
    return results


def count_outcomes(
    tasks: Mapping[str, Task], releases: Sequence[SiteRelease], *, calibrate: bool = False
) -> dict[str, Outcomes]:
    """Returns the noised counts of predictions and scores over all sites, of each task that counts them.

    Args:
        tasks: the run's tasks by name.
        releases: checked releases, at most one of each site.
        calibrate: whether the releases tell the heads' overconfidence too.
    """
    counts = {}
    for name, task in tasks.items():
        with_task = [release for release in releases if name in release.reply.sums]
        if with_task and isinstance(task, CountedOutcomes):
            statistic = make_released_statistic(task, calibrate=calibrate)
            sums_S, deviation = _add_up(name, statistic, with_task)
            counts[name] = task.count_outcomes(sums_S[: task.statistic(NOISED_BUCKETS).size], deviation)
    return counts


def _add_up(name: str, statistic: Statistic, releases: Sequence[SiteRelease]) -> tuple[NDArray[np.float64], float]:
    """Returns the summed statistic of a task over sites, and the deviation of the noise in each entry.

    Args:
        name: the task's name.
        statistic: its released statistic.
        releases: the releases of the sites that have the task.
    """
    total = np.sum([release.reply.sums[name][_SUMS].astype(np.float64) for release in releases], axis=0)
    deviation = math.sqrt(sum(release.noise_std**2 for release in releases))
    return total * statistic.bound, deviation * statistic.bound


def select_temperatures(results: Mapping[str, NoisedMetrics]) -> dict[str, float]:
    """Returns the temperature of each task that has a readable one."""
    return {
        name: result.calibration.temperature
        for name, result in results.items()
        if result.calibration is not None and result.calibration.temperature is not None
    }


def _calibrate(sums: NDArray[np.float64], deviation: float, draws: NDArray[np.float64]) -> Calibration:
    """Returns the temperature that sums of a calibrated statistic tell, as a report says it."""
    fit = fit_temperature(sums, deviation, draws)
    return Calibration(
        temperature=fit.temperature,
        interval=(fit.low, fit.high),
        confidence_gap=fit.gap,
        standard_error=fit.gap_error if math.isfinite(fit.gap_error) else None,
        gap_left=fit.gap_left,
    )


def is_readable(value: float, error: float | None, ends: tuple[float, float]) -> bool:
    """Returns whether a noised metric says anything: noise that hides the whole range of a metric is no result.

    It says nothing where it is undefined, or has no error; where an interval of one standard error to either side is
    wider than the metric's range; or where noise moved it out of its range by more than two standard errors, so that
    its error cannot be believed.

    Args:
        value: the metric before it is clipped into its range; NaN where undefined.
        error: its standard error, likewise.
        ends: the ends of its range.
    """
    if error is None or math.isnan(value) or 2 * error > ends[1] - ends[0]:
        return False
    return ends[0] - 2 * error <= value <= ends[1] + 2 * error


def _compute_errors(statistic: Statistic, draws: NDArray[np.float64], clip: bool) -> dict[str, float | None]:
    """Returns the standard error of each metric; None where it is often undefined.

    Args:
        statistic: the statistic of the sums.
        draws: sums with fresh noise, one draw a row.
        clip: whether the metrics are clipped into their ranges. A clipped metric's error is that of what is reported,
            and small where all draws lie beyond one end. Unclipped ones are ratios whose denominators may come near
            zero, which have no standard deviation: half the width of the central 68.3 % is that of a normal one.
    """
    values = [statistic.compute(sums, clip) for sums in draws]
    errors: dict[str, float | None] = {}
    for metric in values[0]:
        defined = [each[metric] for each in values if math.isfinite(each[metric])]
        if len(defined) <= 0.9 * _DRAWS:
            errors[metric] = None
        else:
            above, below = np.quantile(defined, _ONE_DEVIATION)
            errors[metric] = float(np.std(defined) if clip else (above - below) / 2)
    return errors
