"""The whole covariance is aligned, then the means of the site's classes are found by expectation and maximisation.

The first step is correlation alignment (Sun, Feng, Saenko 2016, arXiv 1511.05547) to the released moments at the site's
own class mix, with the site's covariance shrunk to the target by D / (D + units): z' = (z - mean z) C^-1/2 T^1/2 + g.
The second starts at the released class means and repeats

    r = P(class | z') by the means, the covariance within classes and the mix
    mean of a class = (tie x released mean + sum of r z') / (tie + sum of r)

It also cleans the noise out of a private head: what it classifies by are means over the site's own records. It does not
help where classes overlap.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, final

import numpy as np
from pydantic import Field

from client.aligners import Alignment, Array, SourceMoments, TargetRecords
from client.aligners.parts.linear import compute_power, compute_responsibilities
from common.plugins import Plugin


@final
class CoralEm(Plugin):
    """Settings of the alignment.

    Attributes:
        steps: repetitions of the second step.
        tie: units that a released class mean counts for.
    """

    kind: Literal["coral_em"] = "coral_em"
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    tie: Annotated[float, Field(gt=0, le=1e6)] = 20.0

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "coral_em"}

    def align(self, source: SourceMoments, target: TargetRecords, mix_C: Array) -> Alignment:
        """Returns the map that gives the features their released covariance, and the classes' means behind it.

        Args:
            source: the released moments.
            target: the site's records.
            mix_C: the site's own class mix.
        """
        mean_D, asked_DD = source.compute_mean(mix_C), source.compute_covariance(mix_C)
        own_D, num_features = target.compute_mean(), len(mean_D)
        if target.num_units == 0.0:
            return Alignment(np.ones(num_features), np.zeros(num_features), source.means_CD)
        kept = target.num_units / (num_features + target.num_units)
        shrunk_DD = kept * target.compute_covariance() + (1.0 - kept) * asked_DD
        scale_DD = compute_power(shrunk_DD, -0.5) @ compute_power(asked_DD, 0.5)
        aligned = Alignment(scale_DD, mean_D - own_D @ scale_DD)
        moved_RD, means_CD = aligned.apply(target.features_RD), source.means_CD
        whitening_DD = compute_power(source.within_DD, -0.5)
        for _ in range(self.steps):
            found_RC = compute_responsibilities(moved_RD @ whitening_DD, means_CD @ whitening_DD, mix_C)
            weighted_RC = target.weight_R[:, None] * found_RC
            sums_CD, counts_C = weighted_RC.T @ moved_RD, weighted_RC.sum(axis=0)
            means_CD = (self.tie * source.means_CD + sums_CD) / (self.tie + counts_C)[:, None]
        return Alignment(aligned.scale, aligned.shift_D, means_CD)
