"""The parts of a run's privacy: what its first release costs and what is left for the rounds.

Gaussian releases of mu_1, mu_2, ... are together as private as one of mu = sqrt(mu_1^2 + mu_2^2 + ...): parts of mu^2
add up to the whole. The first release (`moments` of the run file) has a part of its own.
"""

from __future__ import annotations

import math

from common.privacy.gaussian import gdp_epsilon, gdp_mu
from common.run import Moments, Privacy, RunConfig
from common.types import EPSILONS, BadInput, Plan, Unit


def keep_for_rounds(asked: Privacy | None, moments: Moments | None) -> Privacy | None:
    """Returns what is left of a requested privacy for the rounds of a run; None in a run without privacy.

    Args:
        asked: the privacy of the whole run.
        moments: the release before the first round; None without one.

    Raises:
        BadInput: next to nothing is left.
    """
    # A noise multiplier is one of the rounds already.
    if asked is None or moments is None or asked.target_epsilon is None:
        return asked
    mu = gdp_mu(asked.target_epsilon, asked.delta) * math.sqrt(1.0 - moments.share)
    epsilon = gdp_epsilon(mu, asked.delta)
    if epsilon < EPSILONS.low:
        raise BadInput(
            f"moments: expected parts that leave the rounds an epsilon of at least {EPSILONS.low:g}, got {epsilon:.2g} "
            f"of {asked.target_epsilon:g}"
        )
    return Privacy(unit=asked.unit, delta=asked.delta, target_epsilon=epsilon)


def plan_moments(run: RunConfig, unit: Unit) -> Plan | None:
    """Returns the public numbers of the release before the first round; None in a run that has none.

    Args:
        run: the run.
        unit: the unit that the site's budget protects.
    """
    asked = run.requested_privacy
    if run.moments is None:
        return None
    if asked is None:
        return Plan(1.0, 1, None, 0.0, unit)
    share = run.moments.share
    if asked.target_epsilon is not None:
        noise = (1.0 + 1e-7) / (gdp_mu(asked.target_epsilon, asked.delta) * math.sqrt(share))
    else:
        assert asked.noise_multiplier is not None  # Privacy holds exactly one of the two.
        noise = asked.noise_multiplier * math.sqrt((1.0 - share) / (share * run.rounds))
    return Plan(1.0, 1, 1.0, noise, unit)
