"""Aligner kinds: how a site moves its features towards those that a run's heads were trained on.

One file in this folder is one kind. What goes in are the class moments that all sites of a run released together, and
the site's own features; what comes out is a function of exact records, and never leaves the site. Released moments are
weighted with the site's own class mix: a site with other shares of the classes has another mean for that reason alone,
and moving its features to the mean of all sites would move each class onto another (up to 18 points of accuracy lost).

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.plugins import Spec, resolve

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SourceMoments:
    """Features of length 1 of all sites of a run, class by class, as they were released.

    Attributes:
        means_CD: float64 [C, D], mean of each class.
        within_DD: float64 [D, D], covariance within classes, positive definite.
        shares_C: float64 [C], share of each class among the units, above 0, adding up to 1.
        noise_C: float64 [C], deviation of the noise in each value of a class's mean; None where there is none.
    """

    means_CD: Array = field(repr=False)
    within_DD: Array = field(repr=False)
    shares_C: Array = field(repr=False)
    noise_C: Array | None = field(default=None, repr=False)

    def compute_noise(self, mix_C: Array) -> float:
        """Returns the length of the noise in the mean of a record's class, its root mean square at a class mix."""
        if self.noise_C is None:
            return 0.0
        return float(np.sqrt(self.means_CD.shape[1] * (mix_C @ np.square(self.noise_C))))

    def shrink_means(self) -> SourceMoments:
        """Returns the same with class means moved towards their common mean, by as much as noise drives them apart.

        And the common mean shortened likewise (James and Stein 1961). Without noise nothing is moved.
        """
        if self.noise_C is None:
            return self
        num_features = self.means_CD.shape[1]
        common_D = self.shares_C @ self.means_CD
        common_noise = num_features * float(np.square(self.shares_C * self.noise_C).sum())
        common_D = common_D * _keep(float(common_D @ common_D), common_noise)
        apart_CD = self.means_CD - common_D
        spread = float(self.shares_C @ np.square(apart_CD).sum(axis=1))
        noise = num_features * float(self.shares_C @ self.noise_C**2) * (1.0 - 1.0 / len(self.shares_C))
        return replace(self, means_CD=common_D + _keep(spread, noise) * apart_CD)

    def compute_mean(self, mix_C: Array) -> Array:
        """Returns mean_D of records with another class mix."""
        mean_D: Array = mix_C @ self.means_CD
        return mean_D

    def compute_covariance(self, mix_C: Array) -> Array:
        """Returns covariance_DD of records with another class mix."""
        apart_CD = self.means_CD - self.compute_mean(mix_C)
        covariance_DD: Array = self.within_DD + apart_CD.T @ (mix_C[:, None] * apart_CD)
        return covariance_DD


def _keep(square: float, noise: float) -> float:
    """Returns the factor that takes away what noise adds to a squared length."""
    return max(0.0, 1.0 - noise / square) if square > 0.0 else 0.0


@dataclass(frozen=True)
class TargetRecords:
    """A site's own records, exactly: none of it may leave.

    Attributes:
        features_RD: float64 [R, D], features of length 1.
        weight_R: float64 [R], the share of each record in its unit.
    """

    features_RD: Array = field(repr=False)
    weight_R: Array = field(repr=False)

    @property
    def num_units(self) -> float:
        """The number of units."""
        return float(self.weight_R.sum())

    def compute_mean(self) -> Array:
        """Returns mean_D over units; zeros where there is none."""
        mean_D: Array = self.weight_R @ self.features_RD / max(self.num_units, 1e-12)
        return mean_D

    def compute_covariance(self) -> Array:
        """Returns covariance_DD over units; zeros where there is none."""
        apart_RD = self.features_RD - self.compute_mean()
        covariance_DD: Array = apart_RD.T @ (self.weight_R[:, None] * apart_RD) / max(self.num_units, 1e-12)
        return covariance_DD


@dataclass(frozen=True)
class Alignment:
    """A map of features, z -> z scale + shift, and where the kind has found them, the classes' means behind it.

    Attributes:
        scale: float64 [D], one factor for each feature, or [D, D], a matrix.
        shift_D: float64 [D].
        means_CD: float64 [C, D], means of the site's classes behind the map; the site's records are then classified by
            these and the released covariance within classes. None leaves that to the run's own head.
    """

    scale: Array = field(repr=False)
    shift_D: Array = field(repr=False)
    means_CD: Array | None = field(default=None, repr=False)

    def apply(self, features_RD: Array) -> Array:
        """Returns aligned features_RD."""
        moved_RD: Array = features_RD * self.scale if self.scale.ndim == 1 else features_RD @ self.scale
        return moved_RD + self.shift_D


class Aligner(Protocol):
    """The members that every plug-in file's class must have.

    Law (tests/contracts/test_aligners.py): an alignment follows from its arguments alone, is the same whatever the
    order of the records is, is finite for any records, also for none, equal ones and any mix; and leaves records that
    have the released moments at this mix where they are.

    Attributes:
        kind: file name of the plug-in.
    """

    kind: str

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""

    def align(self, source: SourceMoments, target: TargetRecords, mix_C: Array) -> Alignment:
        """Returns how the site's features are moved; no label of a record is read.

        Args:
            source: the released moments.
            target: the site's records.
            mix_C: float64 [C], the site's own class mix, above 0, adding up to 1.
        """


def open_aligner(spec: Spec | Mapping[str, Any], key: str) -> Aligner:
    """Returns the aligner that a setting describes; raises BadInput naming the key where it is wrong."""
    aligner: Aligner = resolve("client.aligners", spec, key)
    return aligner


def open_aligners(specs: Sequence[Spec | Mapping[str, Any]], key: str) -> dict[str, Aligner]:
    """Returns aligners by kind, in their order; raises BadInput naming the key of one that is wrong."""
    opened = [open_aligner(spec, f"{key}.{number}") for number, spec in enumerate(specs)]
    return {each.kind: each for each in opened}
