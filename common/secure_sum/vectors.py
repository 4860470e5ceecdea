"""From a site's whole numbers to one vector, and from the sum of all vectors to an update.

The lattice is the same at all sites, because it follows from the plan and the rules alone. A unit's part has at most
2**32 steps, a site fewer than 2**21 units and a sum at most 512 sites: the sum of all units' parts is below 2**62, all
noise together below 2**61 (common/privacy/rounded_gaussian.py), so that no sum modulo 2**64 is ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.privacy.accounting import Mechanism
from common.privacy.lattice import Lattice
from common.secure_sum.terms import SumRules
from common.types import BadInput, Heads, Plan

SUM_BITS = 32
"""A unit's part has a norm of at most 2**32 steps."""

WholeHeads = Mapping[str, Mapping[str, NDArray[np.int64]]]
"""Parameter group -> parameter -> whole numbers, in steps of the lattice."""


def choose_lattice(plan: Plan, rules: SumRules) -> Lattice:
    """Returns the lattice of a round's sum; its noise is that of one site, a share of the plan's.

    Raises:
        BadInput: the plan has no noise, or less than any privacy needs.
    """
    share = plan.noise_multiplier * rules.noise_share
    if plan.clip_norm is None or share < 2.0**-12:
        raise BadInput("expected a plan with more noise for a secure sum")
    return Lattice.of(plan.clip_norm, share, bound_bits=SUM_BITS)


def make_mechanism(plan: Plan, rules: SumRules | None) -> Mechanism:
    """Returns the mechanism of one round as a ledger charges it: with rules, of a secure sum.

    What becomes visible has at least the plan's noise, of which the site itself adds a share.
    """
    mechanism = Mechanism.of(plan)
    if rules is None:
        return mechanism
    return replace(mechanism, noise_share=rules.noise_share, min_sites=rules.min_sites, colluding=rules.colluding)


def flatten_whole(values: WholeHeads) -> NDArray[np.int64]:
    """Returns all numbers in one vector, in the order of the names."""
    return np.concatenate([values[group][name].ravel() for group in sorted(values) for name in sorted(values[group])])


def count_values(heads: Heads) -> int:
    """Returns the number of values of a vector for these parameters."""
    return sum(array.size for params in heads.values() for array in params.values())


def make_update(
    total: NDArray[np.int64], heads: Heads, *, spacing: float, size: float
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Returns minus the mean of a sum of gradients, as the update of parameters: a step of rate 1.

    Args:
        total: the sum of the sites' vectors.
        heads: parameters that the sites were sent, without what no update holds.
        spacing: size of one step of the lattice.
        size: declared number of units of all summed sites together.
    """
    update: dict[str, dict[str, NDArray[np.float32]]] = {group: {} for group in heads}
    position = 0
    for group in sorted(heads):
        for name in sorted(heads[group]):
            old = heads[group][name]
            part = total[position : position + old.size].astype(np.float64) * (-spacing / size)
            update[group][name], position = part.reshape(old.shape).astype(np.float32), position + old.size
    return update
