"""Images from any source as 8-bit RGB or as grey values. What would lose information silently is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.types import BadRecord

# Others (I;16, I, F) hold more than 8 bits; Pillow would cut them off without a word.
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"})


def rgb(item: Any) -> Image.Image:
    """A PIL image or uint8 array (H x W, H x W x 1 or H x W x 3) as an RGB image; grey is repeated.

    Raises:
        BadRecord: another type or shape, more than 8 bits per value, or a file that cannot be decoded.
    """
    return _converted(item, "RGB")


def grey(item: Any) -> NDArray[np.float32]:
    """A PIL image, uint8 array or float array in [0, 1] as grey values H x W in [0, 1].

    Raises:
        BadRecord: another type or shape, values outside [0, 1], more than 8 bits, or a file that cannot be decoded.
    """
    if isinstance(item, np.ndarray) and item.dtype.kind == "f":
        if item.ndim != 2 or item.size == 0:
            raise BadRecord("expected a grey image of height x width, got an array of another shape")
        # Written so that NaN fails too.
        if not (item.min() >= 0.0 and item.max() <= 1.0):
            raise BadRecord("expected grey values in [0, 1]")
        return item.astype(np.float32)
    return np.asarray(_converted(item, "L"), dtype=np.float32) / np.float32(255.0)


def _converted(item: Any, mode: str) -> Image.Image:
    image = _from_array(item) if isinstance(item, np.ndarray) else item
    if not isinstance(image, Image.Image):
        raise BadRecord("expected a PIL image or an array")
    if image.mode not in _EIGHT_BIT_MODES:
        raise BadRecord("expected an image with 8 bits per value; convert it with a window of your choice first")
    if min(image.size) == 0:
        raise BadRecord("expected an image with at least one pixel")
    try:
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow decodes lazily; SyntaxError is its word for a broken PNG.
        raise BadRecord("expected an image that can be decoded") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise BadRecord("expected an array of uint8 pixels, got another type")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise BadRecord("expected pixels of height x width or height x width x 3, got an array of another shape")
    return Image.fromarray(np.ascontiguousarray(array))
