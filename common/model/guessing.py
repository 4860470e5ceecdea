"""Runs that cannot be better than guessing, told from public numbers alone.

A linear head of K classes learns from the difference of the classes' mean gradients, each of about N / K units; after
T steps with noise of deviation s in a site's sum, of S sites that add it, what is learned stands above its noise by

    x = sqrt(T) q N r / (s sqrt(S) K),

where r is the length of the task's own gradient at the start, as far as the clip norm and the other tasks leave it.
With full batches sqrt(T) r / s is about the mu of Gaussian privacy: x is mu N / (sqrt(S) K), whatever T and the number
of features are (a secure sum has S near 1): the v of docs/transfer.md. Of accuracy above chance x^2 / (x^2 + x0^2) is
left. x0 depends on how easily records are told apart: 4 for the easiest of the data sets seen, 40 for the hardest. A
run in which the easiest would be guessed is hopeless. docs/results.md shows what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from common.privacy.filters import choose_noise_multiplier
from common.privacy.update_norm import DescentSettings
from common.run import RunConfig
from common.tasks import LabelPrior, SmoothLoss, Task, expect_slope

_EASY = 4.0
_LEAST_KEPT = 0.15
"""Part of the gain that the easiest records must keep. Where they would keep less, every head seen was at chance."""


@dataclass(frozen=True)
class Totals:
    """Public numbers of a task over all sites that have it.

    Attributes:
        num_units: declared number of units of these sites together; where groups of sites count the same, that whose
            mean update has as much noise.
        num_sites: number of these sites.
    """

    num_units: int
    num_sites: int

    @classmethod
    def of(cls, run: RunConfig, task: str, sizes: Mapping[str, int]) -> Totals:
        """Returns the numbers of a task.

        Args:
            run: the run.
            task: name of the task.
            sizes: site -> its declared number of units; at least one.
        """
        units = run.aggregation.select_adjustment(task).count_effective_units(sizes)
        return cls(max(1, round(units)), len(sizes))


def explain_hopeless(run: RunConfig, tasks: Mapping[str, Task], totals: Mapping[str, Totals]) -> str | None:
    """Returns why a run cannot be better than guessing; None where any of its tasks may be, or where nobody can tell.

    Args:
        run: the run.
        tasks: some or all of its tasks by name.
        totals: task -> its sites and units; tasks without any are left out.
    """
    kept = estimate_kept(run, tasks, totals)
    if not kept or any(part is None or part >= _LEAST_KEPT for part in kept.values()):
        return None
    return (
        f"the result cannot be useful: heads would be no better than guessing ({', '.join(kept)}); the noise leaves "
        f"less than {_LEAST_KEPT:.0%} of what they gain without privacy, even of records that are easy to tell apart; "
        "ask for more units or sites, fewer classes or a larger epsilon"
    )


def estimate_kept(run: RunConfig, tasks: Mapping[str, Task], totals: Mapping[str, Totals]) -> dict[str, float | None]:
    """Returns the part of each task's gain over guessing that is left of records that are easy to tell apart.

    It is None for tasks other than private ones with labels, linear heads and frozen features.

    Args:
        run: the run.
        tasks: some or all of its tasks by name.
        totals: task -> its sites and units; tasks without any are left out.
    """
    found: dict[str, float | None] = {}
    for name, clear in compute_v(run, tasks, totals).items():
        hidden = getattr(getattr(tasks[name], "head_settings", None), "hidden", None)
        deep = run.trunk_of(name) or hidden
        found[name] = None if clear is None or deep else clear**2 / (clear**2 + _EASY**2)
    return found


def compute_v(run: RunConfig, tasks: Mapping[str, Task], totals: Mapping[str, Totals]) -> dict[str, float | None]:
    """Returns x of the formula above for each task's linear head; whatever else trains is left out of account.

    It is None for tasks without labels to count, and in runs without privacy or with a solver that hides its noise.

    Args:
        run: the run.
        tasks: some or all of its tasks by name.
        totals: task -> its sites and units; tasks without any are left out.
    """
    noise = _find_noise(run)
    slopes = {name: task.scale * expect_slope(task) for name, task in tasks.items() if isinstance(task, SmoothLoss)}
    found: dict[str, float | None] = {}
    for name, task in tasks.items():
        if name not in totals:
            continue
        if noise is None or not isinstance(task, LabelPrior) or name not in slopes:
            found[name] = None
            continue
        total = totals[name]
        reach = slopes[name] / max(math.hypot(*slopes.values()), noise.clip_norm) * noise.clip_norm
        # Where a round asks a part of the sites, fewer units stand against less noise.
        part = math.sqrt(run.cohort.count_asked(total.num_sites) / total.num_sites)
        signal = part * math.sqrt(noise.steps) * noise.sampling_rate * total.num_units * reach
        found[name] = signal / (noise.deviation * math.sqrt(run.count_noises(total.num_sites)) * _count_classes(task))
    return found


@dataclass(frozen=True)
class _Noise:
    deviation: float
    clip_norm: float
    steps: int
    sampling_rate: float


def _find_noise(run: RunConfig) -> _Noise | None:
    """Returns the noise in one site's sum, from the run's settings; None where they do not say it."""
    privacy = run.training_privacy
    try:
        settings = DescentSettings.model_validate(run.solver.settings())
    except ValidationError:
        return None
    if privacy is None or not settings.usable:
        return None
    steps = settings.steps * run.rounds
    multiplier = choose_noise_multiplier(privacy, settings.sampling_rate, steps)
    return _Noise(multiplier * settings.clip_norm, settings.clip_norm, steps, settings.sampling_rate)


def _count_classes(task: LabelPrior) -> float:
    """Returns the number of classes among which a unit's gradient is divided."""
    # Each label of several is present or absent, and their gradients, side by side, are sqrt(labels) times as long.
    labels = len(getattr(task, "labels", ()))
    if not labels:
        return 2.0  # Records with an event and those without.
    return float(task.num_counts) if task.num_counts == labels else 2.0 * math.sqrt(labels)
