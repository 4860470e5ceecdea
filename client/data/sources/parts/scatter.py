"""Scatter a small digit on a larger canvas: position, scale 1 to 1.6, a small rotation, noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def scatter(image: NDArray[np.float64], canvas: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A canvas x canvas picture with the image somewhere on it.

    Args:
        image: square, values in [0, 1].
        canvas: side in pixels; at least 1.6 times the image's.
        rng: decides position, scale, rotation (at most 20 degrees) and noise.
    """
    from scipy.ndimage import affine_transform

    side = len(image)
    scale, angle = rng.uniform(1.0, 1.6), rng.uniform(-1, 1) * np.pi / 9
    margin = scale * side / 2
    centre = rng.uniform(margin, canvas - margin, size=2)
    # affine_transform asks where each output pixel comes from: the inverse of scaling and rotating.
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    offset = (side - 1) / 2 - inverse @ (centre - 0.5)
    placed = affine_transform(image, inverse, offset=offset, output_shape=(canvas, canvas), order=1)
    noisy = placed + 0.1 * rng.standard_normal((canvas, canvas))
    picture: NDArray[np.uint8] = (255 * noisy.clip(0, 1)).round().astype(np.uint8)
    return picture
