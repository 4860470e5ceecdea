"""Each feature gets the mean and the deviation that it has in the released moments, at the site's own class mix.

z' = (z - mean z) clip(sqrt(diag T / var z), 1 / most_scale, most_scale) + g, with g and T the mean and the covariance
of the released moments at the site's mix. The deviations' ratio is bounded, because one feature that hardly varies at
the site would else decide everything.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, final

import numpy as np
from pydantic import Field

from client.aligners import Alignment, Array, SourceMoments, TargetRecords
from common.plugins import Plugin


@final
class MeanStd(Plugin):
    """Settings of the alignment.

    Attributes:
        most_scale: a feature's deviation is multiplied by at most this, and by at least its inverse.
    """

    kind: Literal["mean_std"] = "mean_std"
    most_scale: Annotated[float, Field(ge=1, le=100)] = 2.0

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "mean_std"}

    def align(self, source: SourceMoments, target: TargetRecords, mix_C: Array) -> Alignment:
        """Returns the map that gives each feature its released mean and deviation.

        Args:
            source: the released moments.
            target: the site's records.
            mix_C: the site's own class mix.
        """
        source = source.shrink_means()
        mean_D = source.compute_mean(mix_C)
        if target.num_units == 0.0:
            return Alignment(np.ones_like(mean_D), np.zeros_like(mean_D))
        own_D = target.compute_mean()
        apart_RD = target.features_RD - own_D
        variance_D = target.weight_R @ np.square(apart_RD) / target.num_units
        asked_D = np.diag(source.compute_covariance(mix_C))
        ratio_D = np.sqrt(asked_D / np.maximum(variance_D, 1e-12 * asked_D))
        scale_D = np.clip(ratio_D, 1.0 / self.most_scale, self.most_scale)
        return Alignment(scale_D, mean_D - own_D * scale_D)
