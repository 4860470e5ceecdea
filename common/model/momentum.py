"""The step of noised gradient descent with momentum, from how much noise there is: one rule for all who take it.

V <- m V + mean gradient, W <- W - eta V. After T rounds the sum of all gradients has moved W by tau times their mean at
most,

    tau = eta / (1 - m) (T - m (1 - m^T) / (1 - m))

and the noise of deviation `noise` at each of K sites, which one of N units adds to a logit, has grown to about
tau noise sqrt(K) / (N sqrt(T)). With tau = rho sqrt(T) N / (noise sqrt(K)) that is rho, whatever T, N, K, the privacy
and the number of features are: more noise gives fewer, shorter steps, and none needs to be tuned. The step is at most
`step`, a few times one over the smoothness of the loss, so that without noise it is gradient descent with momentum.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from common.plugins import Frozen
from common.run import NO_ADJUSTMENT, Adjustment, RunConfig
from common.types import Params


class Momentum(Frozen):
    """Public numbers from which the step follows.

    Attributes:
        rounds: number of rounds T of the run.
        step: largest step on a mean gradient; with features of length 1, from one to three over the smoothness of the
            loss by the head's outputs.
        noise: deviation of the noise in one site's sum, in the units of that sum (the noise multiplier times the clip
            norm); 0 without privacy.
        rho: noise that may be added to a logit.
        most_momentum: largest momentum.
    """

    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    step: Annotated[float, Field(gt=0)] = 1.0
    noise: Annotated[float, Field(ge=0)]
    rho: Annotated[float, Field(gt=0)] = 0.5
    most_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.97

    def choose_step(self, num_units: float, num_sites: float) -> tuple[float, float]:
        """Returns the step eta and the momentum m that give the tau above.

        Args:
            num_units: declared number of units of all sites together.
            num_sites: number of sites; of a secure sum, the variance of its noise in multiples of one site's.
        """
        deviation = self.noise * math.sqrt(num_sites) / num_units
        tau = self.rho * math.sqrt(self.rounds) / deviation if deviation else math.inf
        if tau <= self.step * self.rounds:
            return tau / self.rounds, 0.0
        low, high = 0.0, self.most_momentum
        if self.step * compute_reach(high, self.rounds) <= tau:
            return self.step, high
        for _ in range(60):
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.step * compute_reach(middle, self.rounds) < tau else (low, middle)
        return self.step, low

    def compute_logit_noise(self, num_units: float, num_sites: float, adjustment: Adjustment = NO_ADJUSTMENT) -> float:
        """Returns the deviation of the noise that all rounds add to a logit of a record of length 1.

        Args:
            num_units: declared number of units of all sites together.
            num_sites: number of sites; of a secure sum, the variance of its noise in multiples of one site's.
            adjustment: the run's schedule and decay.
        """
        step, momentum = self.choose_step(num_units, num_sites)
        kept, reached, reaches = 1.0, 0.0, []
        # By how much the noise of each round has moved W in the end, from the last round to the first.
        for round_ in range(self.rounds, 0, -1):
            kept *= 1.0 - adjustment.decay_to_start
            reached = momentum * reached + step * adjustment.compute_factor(round_, self.rounds) * kept
            reaches.append(reached)
        return self.noise * math.sqrt(num_sites) / num_units * math.hypot(*reaches)


def read_momentum(run: RunConfig, group: str) -> Momentum | None:
    """Returns the numbers by which the coordinator chooses a head's steps; None where its aggregator chooses none.

    Args:
        run: the run.
        group: name of the head's task, or of a trunk.
    """
    settings = run.aggregation_of(group).settings()
    try:
        return Momentum.model_validate({key: value for key, value in settings.items() if key != "kind"})
    except ValidationError:
        return None


def adjust_step(adjustment: Adjustment, old: Params, new: Params, start: Params, *, round_: int, rounds: int) -> Params:
    """Returns the parameters after a round, with its schedule and its decay towards those of the start.

    Args:
        adjustment: schedule and decay; without both, `new` is returned as it is.
        old: parameters before the round, by name.
        new: parameters that the aggregation made of them.
        start: parameters before the first round.
        round_: number of the round, from 1.
        rounds: number of rounds of the run.
    """
    factor, kept = adjustment.compute_factor(round_, rounds), 1.0 - adjustment.decay_to_start
    if factor == 1.0 and kept == 1.0:
        return new
    adjusted = {}
    for name, values in new.items():
        before, first = np.asarray(old[name], np.float64), np.asarray(start[name], np.float64)
        adjusted[name] = np.asarray(first + kept * (before + factor * (values - before) - first), np.float32)
    return adjusted


def compute_reach(momentum: float, rounds: int) -> float:
    """Returns by how many mean gradients a step of 1 in each of so many rounds moves the parameters, if all are alike.

    Args:
        momentum: momentum, at least 0 and below 1.
        rounds: number of rounds.
    """
    return (rounds - momentum * (1.0 - momentum**rounds) / (1.0 - momentum)) / (1.0 - momentum)
