"""Contrast: what stands out of its own picture, whatever its brightness and polarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.backbones import Contrast
from common.backbones.parts.contrast import compute_contrast, count_values
from common.model.backbones import open_random
from common.types import BadInput


def make_cells(side: int = 24) -> Tensor:
    """Grey pictures [2, 1, side, side]: a ground with noise, a third of it brighter by ten deviations."""
    generator = torch.Generator().manual_seed(0)
    values = 0.1 * torch.randn(2, 1, side, side, generator=generator)
    values[0, 0, 4:10, 3:12] += 1.0
    values[1, 0, :, : side // 3] += 1.0
    return values


def read_score(features_BVGG: Tensor, levels: int) -> Tensor:
    """Returns the value that is spread over the first levels."""
    return (features_BVGG[:, :levels] * torch.linspace(-0.8, 0.8, levels).view(1, -1, 1, 1)).sum(dim=1)


def find_threshold(values: np.ndarray) -> tuple[float, float]:
    """Returns Otsu's threshold and the distance of both sides' means, by trying every pair of neighbouring values."""
    best = (-1.0, 0.0, 1.0)
    ordered = np.sort(values.ravel())
    for at in range(1, len(ordered)):
        lower, upper = ordered[:at], ordered[at:]
        gap = upper.mean() - lower.mean()
        best = max(best, (at * len(upper) * gap**2, (lower[-1] + upper[0]) / 2.0, gap))
    return best[1], best[2]


def test_a_score_is_the_distance_from_otsu_s_threshold_in_parts_of_that_of_the_means() -> None:
    values = make_cells()
    score = read_score(compute_contrast(values, Contrast(levels=5)), 5)
    for picture, found in zip(values[:, 0].double().numpy(), score, strict=True):
        threshold, distance = find_threshold(picture - picture.mean())
        expected = ((picture - picture.mean() - threshold) / distance).clip(-0.8, 0.8)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_bright_cells_on_dark_ground_and_dark_ones_on_bright_ground_are_alike() -> None:
    values = make_cells()
    settings = Contrast(sides=[3, 9], levels=4)
    features = compute_contrast(values, settings)
    assert features.shape == (2, count_values(settings), 24, 24) and count_values(settings) == 16
    torch.testing.assert_close(compute_contrast(0.7 - 3.0 * values, settings), features, rtol=1e-3, atol=1e-3)


def test_each_value_is_spread_over_neighbouring_levels_that_add_up_to_one() -> None:
    features = compute_contrast(make_cells(), Contrast(sides=[5], levels=5)).unflatten(1, (3, 5))
    torch.testing.assert_close(features.sum(dim=2), torch.ones(2, 3, 24, 24))
    assert ((features > 0).sum(dim=2) <= 2).all() and (features >= 0).all()


def test_a_local_score_follows_what_is_around_and_not_the_whole_picture() -> None:
    """Half of the picture is dark, half is bright, and each half has a cell that is brighter than its own ground."""
    values = torch.zeros(1, 1, 30, 40)
    values[..., 20:] = 2.0
    values[..., 12:16, 8:12] += 1.0
    values[..., 12:16, 28:32] += 1.0
    values[..., 25:, :3] = 4.0  # The rarer side is the brighter one.
    local = read_score(compute_contrast(values, Contrast(sides=[9], levels=5))[:, 5:10], 5)[0]
    assert local[13, 30] - local[6, 30] > 0.1 and local[13, 30] > local[6, 35]


def test_a_picture_of_one_value_has_finite_features() -> None:
    assert torch.isfinite(compute_contrast(torch.full((1, 1, 8, 8), 0.3), Contrast(sides=[3]))).all()


def test_a_picture_s_contrast_is_its_own(tmp_path: Any) -> None:
    values = make_cells()
    together = compute_contrast(values, Contrast())
    assert torch.equal(compute_contrast(values[1:], Contrast()), together[1:])


def settings(**contrast: Any) -> dict[str, Any]:
    return {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "preprocess": {"resize": 32, "crop": None, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "nearest"},
        "maps": {"layers": ["features.1"], "grid": 16, "contrast": contrast},
    }


def test_maps_have_the_contrast_of_the_darkest_channel_beside_their_layers() -> None:
    backbone = open_random(settings(sides=[3], levels=4), "b", 1)
    # Twice as large, so that each pixel is one place.
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    features = backbone.encode(backbone.preprocess(picture)[None])
    assert backbone.feature_dim == 16 + 12 and features.shape == (1, 16, 16, 28)
    darkest = torch.from_numpy(picture).float().amin(dim=-1)[None, None]
    expected = compute_contrast(darkest, Contrast(sides=[3], levels=4)).movedim(1, -1)
    torch.testing.assert_close(features[..., 16:] / backbone.module.scale, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sides", [[4], [3, 3]])
def test_squares_without_a_middle_are_refused(sides: list[int]) -> None:
    with pytest.raises(BadInput, match="expected different odd numbers of places"):
        open_random(settings(sides=sides), "b", 1)
