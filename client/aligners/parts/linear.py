"""Powers of covariances, and classes of a common covariance (linear discriminants).

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

import numpy as np

from client.aligners import Array, SourceMoments

_LEAST_VALUE = 1e-9
"""Least eigenvalue of a covariance, in parts of the largest."""


def compute_power(covariance_DD: Array, exponent: float) -> Array:
    """Returns a symmetric positive definite matrix to a power; eigenvalues that rounding lost are raised."""
    values_D, vectors_DD = np.linalg.eigh(0.5 * (covariance_DD + covariance_DD.T))
    values_D = np.maximum(values_D, _LEAST_VALUE * max(float(values_D.max()), 1e-30))
    power_DD: Array = (vectors_DD * values_D**exponent) @ vectors_DD.T
    return power_DD


def compute_responsibilities(whitened_RD: Array, means_CD: Array, mix_C: Array) -> Array:
    """Returns probability_RC of each class, for normal classes of unit covariance.

    Args:
        whitened_RD: records.
        means_CD: means of the classes.
        mix_C: shares of the classes.
    """
    scores_RC = whitened_RD @ means_CD.T - 0.5 * np.square(means_CD).sum(axis=1) + np.log(mix_C)
    scores_RC -= scores_RC.max(axis=1, keepdims=True)
    odds_RC = np.exp(scores_RC)
    probability_RC: Array = odds_RC / odds_RC.sum(axis=1, keepdims=True)
    return probability_RC


def make_discriminant(source: SourceMoments, means_CD: Array | None = None) -> tuple[Array, Array]:
    """Returns weights_CD and bias_C of the linear discriminant for equally frequent classes.

    Args:
        source: the released moments.
        means_CD: means of the classes; by default the released ones.
    """
    chosen_CD = source.means_CD if means_CD is None else means_CD
    weights_CD = chosen_CD @ compute_power(source.within_DD, -1.0)
    return weights_CD, -0.5 * (weights_CD * chosen_CD).sum(axis=1)
