"""Noised evaluations: checked, summed over sites task by task, turned into metrics with their standard errors.

All of it is a function of what sites have released, so it costs no privacy. The standard error of a metric is that
of the privacy noise alone, by adding fresh noise of the same size to the sums (parametric bootstrap): it says nothing
of how few held-out units there are, which is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common import messages
from common.events import NoisedMetrics
from common.tasks import NOISED_BUCKETS, Statistic, Task
from common.types import BadInput

_SUMS = "sums"
_DRAWS = 200


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


def check_evaluation(reply: messages.EvaluateReply, tasks: Mapping[str, Task]) -> None:
    """Checks that released statistics fit the site's tasks.

    Raises:
        BadInput: another set of tasks, another number of statistics, or a value that is not finite.
    """
    if set(reply.sums) != set(tasks):
        raise BadInput(f"evaluation: expected tasks {', '.join(sorted(tasks))}, got another set")
    for name, task in tasks.items():
        size = task.statistic(NOISED_BUCKETS).size
        if set(reply.sums[name]) != {_SUMS} or reply.sums[name][_SUMS].shape != (size,):
            raise BadInput(f"evaluation: {name}: expected {size} statistics, got another shape")
        if not np.isfinite(reply.sums[name][_SUMS]).all():
            raise BadInput(f"evaluation: {name}: expected finite statistics")


def compute_metrics(tasks: Mapping[str, Task], releases: Sequence[SiteRelease], seed: int) -> dict[str, NoisedMetrics]:
    """Returns each task's metrics over all sites that have it; tasks that no site evaluated are left out.

    Args:
        tasks: the run's tasks by name.
        releases: checked releases, at most one of each site.
        seed: seed of the bootstrap's noise.
    """
    results = {}
    for name, task in tasks.items():
        with_task = [release for release in releases if name in release.reply.sums]
        if not with_task:
            continue
        total = sum(release.reply.sums[name][_SUMS].astype(np.float64) for release in with_task)
        statistic = task.statistic(NOISED_BUCKETS)
        sums = torch.from_numpy(np.asarray(total)) * statistic.bound
        deviation = math.sqrt(sum(release.noise_std**2 for release in with_task)) * statistic.bound
        values = statistic.values(sums)
        results[name] = NoisedMetrics(
            metrics={metric: _none_unless_finite(value) for metric, value in values.items()},
            standard_errors=_bootstrap_errors(statistic, sums, deviation, seed),
            sites=tuple(sorted(release.site for release in with_task)),
        )
    return results


def _bootstrap_errors(statistic: Statistic, sums: torch.Tensor, deviation: float, seed: int) -> dict[str, float | None]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_DRAWS, len(sums), generator=generator, dtype=torch.float64) * deviation
    draws = [statistic.values(sums + each) for each in noise]
    errors: dict[str, float | None] = {}
    for metric in draws[0]:
        defined = [draw[metric] for draw in draws if math.isfinite(draw[metric])]
        # A metric that is often undefined has no error worth a number.
        errors[metric] = float(np.std(defined)) if len(defined) > 0.9 * _DRAWS else None
    return errors


def _none_unless_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
