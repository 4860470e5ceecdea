"""A fixed projection of features, made from public weights and records only (PRIVACY.md, section 5).

# Shapes: B examples, D raw features, P projected features, K classes of the pre-training, R random features.

Fewer dimensions mean less noise under the same privacy, and normalised features bound each record's gradient. Nothing
here depends on a private record: the directions are the classifier's, the shift is the last BatchNorm's or the declared
mean of public records' features.
"""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.backbones import Kernel, Projection
from common.types import BadInput

Array = NDArray[np.float64]

_LEAST_PART = 2.0**-6
"""The least part that a mark is of the largest feature beside it. The store's roundings (of 8 bits to a 128th of that,
of 16 bits to 2**-15 of a row's length) leave it above zero, so that no item is taken for one that is not there."""

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.ELU,
    nn.Mish,
)


@final
class ProjectionLayer(nn.Module):
    """A `Projection` as buffers, so that it is part of a backbone's state, blob and digest."""

    shift: Tensor
    matrix: Tensor
    frequencies: Tensor
    phases: Tensor

    def __init__(self, settings: Projection | None, raw_dim: int) -> None:
        super().__init__()
        self._settings = settings or Projection(normalize=False)
        self.out_dim = self._settings.dim or raw_dim
        if self._settings.shift != "none":
            self.register_buffer("shift", torch.zeros(raw_dim))
        if self._settings.dim is not None:
            self.register_buffer("matrix", torch.zeros(raw_dim, self._settings.dim))
        kernel = self._settings.kernel
        if kernel is not None:
            self.register_buffer("frequencies", torch.zeros(self.out_dim, kernel.dim))
            self.register_buffer("phases", torch.zeros(kernel.dim))
            self.out_dim = kernel.dim

    def forward(self, features_BD: Tensor) -> Tensor:
        """Returns features_BP, or features_BR, also at each of several places; without a kernel zeros stay zero."""
        if self._settings.shift != "none":
            features_BD = features_BD - self.shift
        features_BP = features_BD if self._settings.dim is None else features_BD @ self.matrix
        if self._settings.normalize:
            features_BP = nn.functional.normalize(features_BP, dim=-1)
        if self._settings.kernel is None:
            return features_BP
        angles_BR = features_BP @ self.frequencies + self.phases
        features_BR: Tensor = angles_BR.cos() * math.sqrt(2.0 / self.out_dim)
        return features_BR


@final
class ItemNetwork(nn.Module):
    """A network with its scale and projection: items -> B x (D + 1), of which the last is the mark.

    A mark is 1, and more only where a feature is larger than 64.
    """

    scale: Tensor

    def __init__(self, network: nn.Module, projection: Projection | None, raw_dim: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", torch.ones(()))
        self.projection = ProjectionLayer(projection, raw_dim)

    def forward(self, items_B: Tensor) -> Tensor:
        """Returns features and marks of items, in float32."""
        features_BD = self.projection(self.network(items_B).to(torch.float32) * self.scale)
        marks_B1 = (features_BD.abs().amax(dim=-1, keepdim=True) * _LEAST_PART).clamp(min=1.0)
        return torch.cat([features_BD, marks_B1], dim=-1)


def compute_projection(
    settings: Projection | None, raw_dim: int, classifier_KD: Tensor | None, shift_D: Tensor | None
) -> dict[str, Tensor]:
    """Returns the buffers of a `ProjectionLayer`.

    Args:
        settings: the projection; None for no buffers.
        raw_dim: number of raw features D.
        classifier_KD: [K, D], weights of the pre-training's classifier; None where there are none.
        shift_D: [D], predicted or declared mean of the raw features; None where there is none.

    Raises:
        BadInput: the settings ask for what the pre-training did not leave; names the key.
    """
    state: dict[str, Tensor] = {}
    if settings is None:
        return state
    if settings.shift != "none":
        if shift_D is None:
            raise BadInput(
                "projection.shift: expected 'none', got 'batch_norm' for a backbone that does not end in a "
                "BatchNorm followed by a ReLU"
            )
        state["shift"] = shift_D
    if settings.dim is not None:
        if classifier_KD is None:
            raise BadInput(f"projection.dim: expected null for weights without a classifier, got {settings.dim}")
        state["matrix"] = find_top_directions(classifier_KD, settings.dim)
    if settings.kernel is not None:
        state |= _draw_random_features(settings.kernel, settings.dim or raw_dim)
    return state


def _draw_random_features(kernel: Kernel, dim: int) -> dict[str, Tensor]:
    # Numpy's generator: its numbers are the same on every machine, and so the digest.
    rng = np.random.default_rng(0)
    frequencies_PR = rng.standard_normal((dim, kernel.dim)) / kernel.width
    phases_R = rng.uniform(0.0, 2.0 * math.pi, kernel.dim)
    return {"frequencies": torch.from_numpy(frequencies_PR).float(), "phases": torch.from_numpy(phases_R).float()}


def find_top_directions(classifier_KD: Tensor, dim: int) -> Tensor:
    """Returns the `dim` directions (D x dim, orthonormal columns) in which a classifier's rows vary most.

    Computed in float64; each column's largest entry by magnitude is made positive, because the sign of a singular
    vector is arbitrary.

    Raises:
        BadInput: the centred weights have fewer than `dim` independent directions.
    """
    weights_KD = classifier_KD.detach().cpu().to(torch.float64)
    centred_KD = weights_KD - weights_KD.mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred_KD, full_matrices=False)
    # As numpy.linalg.matrix_rank: what lies below is rounding.
    floor = singular[0] * max(centred_KD.shape) * torch.finfo(torch.float32).eps
    rank = int((singular > floor).sum())
    if dim > rank:
        raise BadInput(f"projection.dim: expected at most {rank}, the rank of the classifier's weights, got {dim}")
    matrix_DP: Tensor = directions[:dim].T
    largest_P = matrix_DP.abs().argmax(dim=0)
    signs_P = torch.sign(matrix_DP[largest_P, torch.arange(dim)])
    # The last digits depend on the number of threads; the digest must not.
    oriented_DP: Tensor = (matrix_DP * signs_P).round(decimals=6)
    return oriented_DP.to(torch.float32).contiguous()


def predict_shift(network: nn.Module) -> Tensor | None:
    """Returns the mean of each channel after a network's last BatchNorm and ReLU or ReLU6; None for another end.

    mu_j = E[clip(N(beta_j, gamma_j^2), 0, cap)], cap 6 or infinite, in closed form. Global average pooling keeps it. A
    residual connection after the BatchNorm is ignored.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    activations = [module for module in network.modules() if isinstance(module, _ACTIVATIONS)]
    if not norms or not norms[-1].affine or not activations:
        return None
    if not isinstance(activations[-1], nn.ReLU | nn.ReLU6):
        return None
    cap = 6.0 if isinstance(activations[-1], nn.ReLU6) else math.inf
    means = compute_clipped_mean(_to_float64(norms[-1].bias), np.abs(_to_float64(norms[-1].weight)), cap)
    return torch.from_numpy(means.astype(np.float32))


def compute_clipped_mean(mean: Array, std: Array, cap: float) -> Array:
    """Returns E[clip(X, 0, cap)] for independent X ~ N(mean, std^2); std 0 gives clip(mean, 0, cap).

    Args:
        mean: float64, means of the normal variables.
        std: float64 of the same shape, their standard deviations, at least 0.
        cap: upper end of the clipping, perhaps infinite.
    """
    # Here: it takes 0.4 s to import, and only a projection with a shift needs it.
    from scipy.special import ndtr

    safe = np.where(std > 0, std, 1.0)
    low, high = -mean / safe, (cap - mean) / safe
    inside = mean * (ndtr(high) - ndtr(low)) + safe * (_evaluate_density(low) - _evaluate_density(high))
    above = cap * ndtr(-high) if math.isfinite(cap) else 0.0
    means: Array = np.where(std > 0, inside + above, np.clip(mean, 0.0, cap))
    return means


def _evaluate_density(z: Array) -> Array:
    values: Array = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return values


def _to_float64(parameter: Tensor) -> Array:
    return parameter.detach().cpu().to(torch.float64).numpy()
