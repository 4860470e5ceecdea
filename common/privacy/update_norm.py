"""The largest norm of an honest update, from public numbers: a coordinator rejects what is longer.

A round of noised gradient descent is linear in what each step adds. For one parameter group of d parameters, public
size n and divisor q n, with G_s the sum of clipped gradients in step s, Z_s its noise and W_s the weights:

    v_s = momentum v_(s-1) + (G_s + Z_s) / (q n) + weight_decay W_s        W_(s+1) = W_s - learning_rate v_s

so that after T steps W_T - W_0 = sum over s of a_(T-s) (G_s + Z_s) / (q n) + (b_T - 1) W_0, where a and b follow from
the rates alone. Then, beside rounding,

    |W_T - W_0| <= sum of |a| * C * N / (q n)                                   N units take part, each at most C long
                   + sqrt(sum of a^2) * sigma C / (q n) * (sqrt(d) + sqrt(2 L))  the norm of a Gaussian
                   + |b_T - 1| |W_0|

Each honest update exceeds it with a probability of at most `FAILURE` a group, whatever the records are and although
gradients depend on earlier noise: the first line holds on every path, and the noise of all steps together is Gaussian.
(Norm: Boucheron, Lugosi, Massart 2013, Theorem 5.6; N: Bernstein's inequality in a Poisson sample.)

The sum of gradients counts up to `MAX_TRUE_PER_PUBLIC` times the declared number of units: a site is warned beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from common.privacy.filters import choose_noise_multiplier
from common.run import PositiveInt, Rates, RunConfig, TrunkRates
from common.types import CLIP_NORMS, MAX_ROUND_STEPS, SAMPLING_RATES, BadInput, Heads, Params, Plan, Range

FAILURE = 1e-9
"""Probability with which an honest update's parameter group is longer than its bound, at most."""

MAX_TRUE_PER_PUBLIC = 2.0
"""Most true units for each declared one, with which the bound is sure to hold (client/data/checks.py warns beyond)."""


class DescentSettings(BaseModel):
    """The settings by which a solver says that it is noised gradient descent as above (`client.solvers.Solver`).

    A kind that has neither `steps` nor `learning_rate` releases one sum a round, divided by the public size.

    Attributes:
        sampling_rate: probability with which a unit takes part in a step.
        steps: steps in a round.
        clip_norm: bound on one unit's gradient over all groups.
        learning_rate: learning rate of every group that has none of its own.
        momentum: momentum of all steps.
        weight_decay: weight decay of every group that has none of its own.
        tasks: task -> rates of its head.
        trunk: rates of the trunks; None for those of the heads.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    sampling_rate: float = 1.0
    steps: PositiveInt = 1
    clip_norm: float
    learning_rate: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    tasks: Mapping[str, Rates] = {}
    trunk: TrunkRates | None = None

    @property
    def usable(self) -> bool:
        """True where the numbers are some that sites accept; a run with others has no update to bound."""
        return (
            SAMPLING_RATES.low <= self.sampling_rate <= SAMPLING_RATES.high
            and CLIP_NORMS.low <= self.clip_norm <= CLIP_NORMS.high
            and self.steps <= MAX_ROUND_STEPS
        )

    def select_rates(self, group: str, is_task: bool) -> Rates:
        """Returns the rates of a head or, where it is no task's, of a trunk."""
        if not is_task and self.trunk is not None:
            return self.trunk
        default = Rates.model_construct(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        return self.tasks.get(group, default) if is_task else default


@dataclass(frozen=True)
class Response:
    """The change of weights after some steps, in terms of what was added on the way.

    Attributes:
        absolute: sum of |a|: of one vector added in every step.
        euclidean: square root of the sum of a^2: of independent noise of deviation 1.
        decay: |b_T - 1|: of the weights at the start.
    """

    absolute: float
    euclidean: float
    decay: float

    @classmethod
    def of(cls, rates: Rates, momentum: float, steps: int, most_depth: int = 0) -> Response:
        """Returns the response of gradient descent.

        Where rates differ from block to block, each number is that of the block in which it is largest.

        Args:
            rates: learning rate and weight decay.
            momentum: momentum, at least 0 and below 1.
            steps: number of steps, at least 1.
            most_depth: largest depth that a block may have, where rates have a layer decay.
        """
        decay = rates.layer_decay if isinstance(rates, TrunkRates) else 1.0
        depths = range(most_depth + 1) if decay < 1.0 else range(1)
        blocks = [
            _trace_weights(rates.learning_rate * decay**depth, rates.weight_decay, momentum, steps) for depth in depths
        ]
        # The largest of each step: which block it is of may change from step to step.
        factors = [max(map(abs, each)) for each in zip(*(changes for changes, _ in blocks), strict=True)]
        return cls(math.fsum(factors), math.hypot(*factors), max(abs(weight - 1.0) for _, weight in blocks))


def _trace_weights(learning_rate: float, weight_decay: float, momentum: float, steps: int) -> tuple[list[float], float]:
    """Returns the change of weights 0, 1, ... steps after a vector of length 1 was added, and what becomes of 1."""
    change, velocity, weight = -learning_rate, 1.0, 1.0
    changes = [change]
    for _ in range(steps - 1):
        velocity = momentum * velocity + weight_decay * change
        change -= learning_rate * velocity
        changes.append(change)
    velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + weight_decay * weight
        weight -= learning_rate * velocity
    return changes, weight


def read_descent(run: RunConfig) -> DescentSettings | None:
    """Returns the settings of a private run's descent; None without privacy or where the solver has not all of them."""
    if run.requested_privacy is None:
        return None
    try:
        settings = DescentSettings.model_validate(run.solver.settings())
    except ValidationError:
        return None
    return settings if settings.usable else None


def compute_noise_range(run: RunConfig, descent: DescentSettings) -> Range:
    """Returns the noise multipliers that a site may use: of a run of one round, and of all its rounds.

    Raises:
        BadInput: no noise is enough for what the run asks.
    """
    asked = run.training_privacy
    assert asked is not None  # Else there is no descent to read.
    low, high = (
        choose_noise_multiplier(asked, descent.sampling_rate, rounds * descent.steps) for rounds in (1, run.rounds)
    )
    return Range(low, high)


def check_descent_plan(plan: Plan, run: RunConfig) -> None:
    """Checks that a plan's numbers are those of the run file, as far as its solver's settings say them.

    Raises:
        BadInput: another sampling rate, number of steps, clip norm or noise multiplier than the run asks for.
    """
    descent = read_descent(run)
    if descent is None:
        return
    noise = compute_noise_range(run, descent)
    # Calibration may round differently on another machine.
    expected = {
        "sampling_rate": (plan.sampling_rate, Range(descent.sampling_rate, descent.sampling_rate)),
        "steps": (plan.steps, Range(descent.steps, descent.steps)),
        "clip_norm": (math.nan if plan.clip_norm is None else plan.clip_norm, Range(*[descent.clip_norm] * 2)),
        "noise_multiplier": (plan.noise_multiplier, Range(noise.low * (1 - 1e-4), noise.high * (1 + 1e-4))),
    }
    for name, (value, allowed) in expected.items():
        if not allowed.low <= value <= allowed.high:
            raise BadInput(f"expected the run's plan, got one of another {name}")


def bound_update_norms(run: RunConfig, sizes: Mapping[str, int], sent: Heads) -> dict[str, float]:
    """Returns for each parameter group that a site was sent the largest L2 norm of its change.

    It is infinite without privacy, and where the solver's settings do not say that it is noised gradient descent.

    Args:
        run: the run.
        sizes: task -> declared public size at the site.
        sent: parameter group -> parameters at the start of the round.
    """
    descent = read_descent(run)
    if descent is None:
        return dict.fromkeys(sent, math.inf)
    sigma = compute_noise_range(run, descent).high
    public = run.parameter_group_sizes(sizes)
    units = {
        group: sum(size for task, size in sizes.items() if group in (task, run.trunk_of(task))) for group in public
    }
    return {
        group: _bound_group(
            descent, descent.select_rates(group, group in sizes), sigma, params, (units[group], public[group])
        )
        for group, params in sent.items()
    }


def _bound_group(
    descent: DescentSettings, rates: Rates, sigma: float, params: Params, declared: tuple[int, int]
) -> float:
    """Returns the bound of one group; `declared` are the units that may take part, and the public size."""
    units, public_size = declared
    # A trunk has at most as many blocks as parameters.
    response = Response.of(rates, descent.momentum, descent.steps, most_depth=len(params))
    tail = math.log((descent.steps + 1) / FAILURE)
    most = MAX_TRUE_PER_PUBLIC * units
    expected = descent.sampling_rate * most
    taking_part = min(most, expected + math.sqrt(2.0 * tail * expected) + tail)
    count = sum(values.size for values in params.values())
    start = math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in params.values()))
    divisor = descent.sampling_rate * public_size
    signal = response.absolute * descent.clip_norm * taking_part / divisor
    noise = response.euclidean * sigma * descent.clip_norm / divisor * (math.sqrt(count) + math.sqrt(2.0 * tail))
    norm = signal + noise + (response.decay * start if start else 0.0)
    # Weights are float32 in each step, and an update may travel as float16.
    rounding = descent.steps * 2.0**-22 * (start + norm) + 2.0**-10 * norm + 2.0**-24 * math.sqrt(count)
    bound = norm + rounding
    return math.inf if math.isnan(bound) else bound
