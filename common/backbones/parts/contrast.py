"""Contrast: how far each place stands out of its own picture, and out of what is around it.

Otsu's threshold (1979) divides a picture's values in two; the score of a value is how far it is beyond the threshold,
in parts of the distance between the means of both sides. The side whose values lie further out is the positive one, so
that bright cells on dark ground and dark cells on bright ground are alike. Around a place the threshold is the middle
between the means of both sides there. The deviation in the smallest square tells edges and texture.

A linear head draws one straight line through a value. Each is therefore spread over levels, as hats that overlap by
half: the head's weights are then the corners of any curve, and few of them move at once, which suits noised gradients.

Everything follows from one picture: there is no number of other pictures in it that privacy would have to hide.

# Shapes: B pictures, G places along a side, N = G * G places, V values of a place, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.backbones import Contrast

_SCORES = (-0.8, 0.8)
_DEVIATIONS = (0.0, 0.5)
"""First and last level: most scores lie in between, and those beyond belong to the last one."""

_SHARPNESS = 6.0
"""A place counts for the mean of the upper side with the sigmoid of so many times its score."""

_LEAST = 1e-3


def count_values(settings: Contrast) -> int:
    """Returns the number of features of a place."""
    return (len(settings.sides) + 2) * settings.levels


def compute_contrast(values_B1GG: Tensor, settings: Contrast) -> Tensor:
    """Returns features [B, `count_values`, G, G], between 0 and 1.

    Args:
        values_B1GG: one value of each place, in any unit.
        settings: squares around a place, and levels.
    """
    signed = _sign(values_B1GG)
    threshold, distance = _divide(signed)
    score = (signed - threshold) / distance
    spread = [_spread(score, _SCORES, settings.levels)]
    upper = torch.sigmoid(_SHARPNESS * score)
    for side in settings.sides:
        mean_upper = _average(upper * signed, side) / _average(upper, side).clamp(min=_LEAST)
        mean_lower = _average((1.0 - upper) * signed, side) / _average(1.0 - upper, side).clamp(min=_LEAST)
        spread.append(_spread((signed - (mean_upper + mean_lower) / 2.0) / distance, _SCORES, settings.levels))
    least = min(settings.sides)
    variance = _average(signed.square(), least) - _average(signed, least).square()
    spread.append(_spread(variance.clamp(min=0.0).sqrt() / distance, _DEVIATIONS, settings.levels))
    return torch.cat(spread, dim=1)


def _sign(values_B1GG: Tensor) -> Tensor:
    """Returns values minus their mean, times the sign of their third moment."""
    apart = values_B1GG - values_B1GG.mean(dim=(2, 3), keepdim=True)
    return torch.where(apart.pow(3).mean(dim=(2, 3), keepdim=True) < 0.0, -apart, apart)


class _Division(NamedTuple):
    threshold_B111: Tensor
    distance_B111: Tensor


def _divide(values_B1GG: Tensor) -> _Division:
    """Returns the threshold with the largest variance between both sides, and the distance of their means."""
    sorted_BN = values_B1GG.flatten(1).double().sort(dim=1).values
    sums_BN = sorted_BN.cumsum(dim=1)
    count = sorted_BN.shape[1]
    lower_N = torch.arange(1, count, device=sorted_BN.device).double()
    total_B1 = sums_BN[:, -1:]
    gap_BN = (total_B1 - sums_BN[:, :-1]) / (count - lower_N) - sums_BN[:, :-1] / lower_N
    best_B1 = (gap_BN.square() * lower_N * (count - lower_N)).argmax(dim=1, keepdim=True)
    threshold_B1 = (sorted_BN.gather(1, best_B1) + sorted_BN.gather(1, best_B1 + 1)) / 2.0
    # A picture of one value has no distance: its scores are zeros.
    distance_B1 = gap_BN.gather(1, best_B1).clamp(min=1e-6)
    return _Division(*(each.to(values_B1GG.dtype).view(-1, 1, 1, 1) for each in (threshold_B1, distance_B1)))


def _average(values_B1GG: Tensor, side: int) -> Tensor:
    """Returns the mean over the square around each place, as far as it is in the picture."""
    for kernel, padding in (((side, 1), (side // 2, 0)), ((1, side), (0, side // 2))):
        values_B1GG = nn.functional.avg_pool2d(values_B1GG, kernel, stride=1, padding=padding, count_include_pad=False)
    return values_B1GG


def _spread(values_B1GG: Tensor, ends: tuple[float, float], levels: int) -> Tensor:
    """Returns how near each value is to each of L levels, [B, L, G, G]: one or two are above 0; their sum is 1."""
    first, last = ends
    at_B1GG = ((values_B1GG - first) / (last - first)).clamp(0.0, 1.0) * (levels - 1)
    level_L = torch.arange(levels, device=at_B1GG.device, dtype=at_B1GG.dtype).view(1, -1, 1, 1)
    return (1.0 - (at_B1GG - level_L).abs()).clamp(min=0.0)
