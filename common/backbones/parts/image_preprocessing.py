"""How an image becomes an input of an ImageNet-style encoder: resize, crop, scale to [0, 1], standardise."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from common.backbones.parts.images import rgb
from common.plugins import Frozen
from common.types import BadInput

Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=4096)]


class ImagePreprocessing(Frozen):
    """Settings of the steps, in their order.

    Attributes:
        resize: pixels. With a crop, of the shorter side; without, of both sides.
        crop: side of the square cut from the middle; null keeps the whole image.
        mean: per RGB channel, subtracted from values in [0, 1].
        std: per RGB channel, divided by.
        interpolation: of the resizing.
        antialias: true resizes as Pillow does, which torchvision's own preprocessing of images uses.
    """

    resize: Side
    crop: Side | None
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True

    @model_validator(mode="after")
    def _crop_fits(self) -> ImagePreprocessing:
        if self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop: expected at most resize ({self.resize}), got {self.crop}")
        return self

    @classmethod
    def of_weights(cls, weights: WeightsEnum) -> ImagePreprocessing:
        """The preprocessing that torchvision ships with its weights.

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
        """float32, 3 x H x W, from a PIL image or uint8 array. Raises BadRecord."""
        pixels = self._resized(item)
        if self.crop is not None:
            pixels = transforms.center_crop(pixels, [self.crop, self.crop])
        # The same operations as torchvision's `convert_image_dtype` and `normalize`, without their checks and copies,
        # which cost more than the arithmetic.
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        standardised: Tensor = scaled.sub_(_per_channel(self.mean)).div_(_per_channel(self.std))
        return standardised

    def _resized(self, item: Any) -> Tensor:
        """uint8, 3 x H x W."""
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == (self.resize, self.resize, 3):
            # Nothing to resize; Pillow's two copies would cost as much as all else.
            return torch.tensor(item).permute(2, 0, 1)
        image = rgb(item)
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
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
