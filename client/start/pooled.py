"""A prior over the heads of several models that learned the same task: their mean, and in which directions they differ.

A new site's head is taken to lie around the mean as the others do. Where heads differ along common directions, a tie to
the mean should be loose along them and strong across: the tie's metric is the inverse of their covariance, shrunk
towards that of no direction. Heads of few sites under noise differ alike in all directions, and their covariance only
fits the noise. So it is used only where each head, left out, is more probable by the others' covariance than without
directions, by more than the standard error over heads.

# Shapes: J heads, K outputs, D features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.tasks.parts.adjusted import AdjustedHead
from common.types import BadInput

FEWEST = 4
"""Heads below which there are no directions to speak of."""
SHRINKAGES = (0.05, 0.2, 0.5, 0.8)
"""Parts of the covariance that are the same in all directions."""


@dataclass(frozen=True)
class HeadPrior:
    """A distribution of heads.

    Attributes:
        mean: the mean head.
        root_DD: symmetric root of the covariance of a row, with a mean square of 1; None for no directions.
        how: what was found, in words.
    """

    mean: nn.Module = field(repr=False)
    root_DD: Tensor | None = field(repr=False)
    how: str


def pool_heads(heads: Sequence[nn.Module]) -> HeadPrior:
    """Returns the prior over heads of one task on one backbone.

    Args:
        heads: linear heads with the same parameters.

    Raises:
        BadInput: a head has a hidden layer, or others' parameters.
    """
    weights = [find_weight(head) for head in heads]
    if any(head is None for head in weights) or len({tuple(each.state_dict()) for each in heads}) > 1:
        raise BadInput("--also: expected linear heads with the same settings as the prior's, got others")
    mean = copy.deepcopy(heads[0])
    states = [head.state_dict() for head in heads]
    mean.load_state_dict({key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]})
    if len(heads) < FEWEST:
        return HeadPrior(
            mean, None, f"the mean of {len(heads)} heads; from {FEWEST} on, their directions are looked at"
        )
    rows_JKD = torch.stack([each.detach().double() for each in weights if each is not None])
    shrinkage = _choose_shrinkage(rows_JKD)
    if shrinkage is None:
        said = "their covariance was of no use: left out, none is more probable by it"
        return HeadPrior(mean, None, f"the mean of {len(heads)} heads; {said}")
    covariance_DD = _shrink(rows_JKD, shrinkage)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD / covariance_DD.diagonal().mean())
    return HeadPrior(
        mean,
        (vectors_DD * values_D.clamp(min=0.0).sqrt()) @ vectors_DD.T,
        f"the mean of {len(heads)} heads, and the directions in which they differ (shrinkage {shrinkage:g})",
    )


def find_weight(head: nn.Module) -> Tensor | None:
    """Returns the weights of a linear head, [K, D]; None of another."""
    inner = head.layers if isinstance(head, AdjustedHead) else head
    return inner.weight if isinstance(inner, nn.Linear) else None


def _shrink(rows_JKD: Tensor, shrinkage: float) -> Tensor:
    """Returns the covariance of a row around the heads' mean, part of it the same in all directions."""
    centred_ND = (rows_JKD - rows_JKD.mean(0)).flatten(0, 1)
    number = (len(rows_JKD) - 1) * rows_JKD.shape[1]
    covariance_DD = centred_ND.T @ centred_ND / number
    equal_DD = covariance_DD.diagonal().mean() * torch.eye(len(covariance_DD), dtype=covariance_DD.dtype)
    return (1.0 - shrinkage) * covariance_DD + shrinkage * equal_DD


def _choose_shrinkage(rows_JKD: Tensor) -> float | None:
    """Returns the shrinkage by which left-out heads are most probable; None where no directions is as good."""
    if not bool((rows_JKD.var(0) > 0.0).any()):
        return None
    number = len(rows_JKD)
    held_out = [(rows_JKD[[at for at in range(number) if at != own]], rows_JKD[own]) for own in range(number)]
    alike_J = torch.tensor([_compute_log_density(others, own, 1.0) for others, own in held_out])
    gains = {
        each: torch.tensor([_compute_log_density(others, own, each) for others, own in held_out]) - alike_J
        for each in SHRINKAGES
    }
    best = max(gains, key=lambda each: float(gains[each].mean()))
    error = float(gains[best].std()) / math.sqrt(number)
    return best if float(gains[best].mean()) > error else None


def _compute_log_density(others_JKD: Tensor, own_KD: Tensor, shrinkage: float) -> float:
    """Returns the logarithm of a head's density by the others, up to a constant."""
    # The mean of the others has noise of its own.
    covariance_DD = _shrink(others_JKD, shrinkage) * (1.0 + 1.0 / len(others_JKD))
    away_KD = own_KD - others_JKD.mean(0)
    distance = float((away_KD * torch.linalg.solve(covariance_DD, away_KD.T).T).sum())
    return -0.5 * (distance + len(own_KD) * float(torch.linalg.slogdet(covariance_DD).logabsdet))
