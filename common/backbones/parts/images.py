"""Images from any source as 8-bit RGB, as grey values, or as inputs of an ImageNet-style network.

What would lose information silently is refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from common.plugins import Frozen
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.models import WeightsEnum

# Others (I;16, I, F) hold more than 8 bits; Pillow would cut them off without a word.
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"})

Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=4096)]


def convert_to_rgb(item: Any) -> Image.Image:
    """Returns a PIL image or uint8 array (H x W, H x W x 1 or H x W x 3) as an RGB image; grey is repeated.

    Raises:
        BadRecord: another type or shape, more than 8 bits per value, or a file that cannot be decoded.
    """
    return _convert(item, "RGB")


def convert_to_grey(item: Any) -> NDArray[np.float32]:
    """Returns a PIL image, uint8 array or float array in [0, 1] as grey values H x W in [0, 1].

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
    return np.asarray(_convert(item, "L"), dtype=np.float32) / np.float32(255.0)


def _convert(item: Any, mode: str) -> Image.Image:
    image = _from_array(item) if isinstance(item, np.ndarray) else item
    if not isinstance(image, Image.Image):
        raise BadRecord(f"expected a picture, as a PIL image or an array; got a {type(item).__name__.lower()}")
    if image.mode not in EIGHT_BIT_MODES:
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


class ImagePreprocessing(Frozen):
    """Settings of the steps from an image to an input: resize, crop, scale to [0, 1], standardise.

    Attributes:
        resize: length in pixels of the shorter side where there is a crop, else of both sides.
        crop: side in pixels of the square cut from the middle; null keeps the whole image.
        mean: number of each RGB channel that is subtracted from values in [0, 1].
        std: number of each RGB channel that the difference is divided by.
        interpolation: how the image is resized.
        antialias: true resizes as Pillow does, which torchvision's own preprocessing of images uses.
    """

    resize: Side
    crop: Side | None
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    antialias: bool = True

    @model_validator(mode="after")
    def _crop_fits(self) -> ImagePreprocessing:
        if self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop: expected at most resize ({self.resize}), got {self.crop}")
        return self

    @classmethod
    def of_weights(cls, weights: WeightsEnum) -> ImagePreprocessing:
        """Returns the preprocessing that torchvision ships with its weights.

        Raises:
            BadInput: they use an interpolation that is not offered here.
        """
        preset = weights.transforms()
        if preset.interpolation.value not in ("bilinear", "bicubic"):
            raise BadInput(f"preprocess: expected explicit settings, {weights} use {preset.interpolation.value}")
        return cls(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
            antialias=bool(preset.antialias),
        )

    @property
    def side(self) -> int:
        """Height and width of the inputs."""
        return self.crop or self.resize

    def apply(self, item: Any) -> Tensor:
        """Returns float32 pixels, 3 x H x W, of a PIL image or uint8 array. Raises BadRecord."""
        import torch

        pixels = self.cut(item)
        # The same operations as torchvision's `convert_image_dtype` and `normalize`, without their checks and copies,
        # which cost more than the arithmetic.
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        standardised: Tensor = scaled.sub_(_per_channel(self.mean)).div_(_per_channel(self.std))
        return standardised

    def cut(self, item: Any) -> Tensor:
        """Returns uint8 pixels, 3 x H x W, of the inputs' size. Raises BadRecord."""
        pixels = self._resize(item)
        if self.crop is None:
            return pixels
        from torchvision.transforms import functional as transforms

        cut: Tensor = transforms.center_crop(pixels, [self.crop, self.crop])
        return cut

    def _resize(self, item: Any) -> Tensor:
        """Returns uint8 pixels, 3 x H x W."""
        import torch

        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == (self.resize, self.resize, 3):
            # Nothing to resize; Pillow's two copies would cost as much as all else.
            return torch.tensor(item).permute(2, 0, 1)
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as transforms

        image = convert_to_rgb(item)
        size = [self.resize, self.resize] if self.crop is None else [self.resize]
        mode = InterpolationMode(self.interpolation)
        if not self.antialias:
            pixels: Tensor = transforms.resize(transforms.pil_to_tensor(image), size, mode, antialias=False)
            return pixels
        resized = image if image.size == (self.resize, self.resize) else transforms.resize(image, size, mode)
        pixels = transforms.pil_to_tensor(resized)
        return pixels


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, float, float]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
