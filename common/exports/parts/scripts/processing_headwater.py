"""Preprocessing of pictures for an exported model: Pillow resizes, as it did when the model was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs


class HeadwaterImageProcessor(ImageProcessingMixin):
    """Steps from pictures to `pixel_values`: turn, convert, resize, crop, scale, standardise.

    `mode` is RGB or L; `resize` null expects `size` x `size` pixels; `crop` null resizes both sides.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        mode: str = "RGB",
        modes: Sequence[str] = ("RGB", "L"),
        size: int = 224,
        resize: str | None = "bilinear",
        crop: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.mode, self.size, self.resize, self.crop = mode, size, resize, crop
        self.mean, self.std, self.modes = list(mean), list(std), list(modes)

    def __call__(self, images: Any, return_tensors: str | None = None, **ignored: Any) -> BatchFeature:
        """Returns `pixel_values` of one picture or of several; arrays are rows x columns, perhaps x 3."""
        several = images if isinstance(images, list | tuple) else [images]
        pixels = [self.prepare(each) for each in several]
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)

    def prepare(self, item: Any) -> np.ndarray:
        """Returns the pixels of one picture, channels x rows x columns."""
        image = item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
        if image.mode not in self.modes:
            raise ValueError("expected 8 bits per value; convert the picture with a window of your choice first")
        image = ImageOps.exif_transpose(image).convert(self.mode)
        if self.resize is not None:
            short, target = min(image.size), [self.size, self.size]
            if self.crop is not None:
                target = [self.size if side == short else int(self.size * side / short) for side in image.size]
            image = image.resize((target[0], target[1]), Image.Resampling[self.resize.upper()])
        elif image.size != (self.size, self.size):
            raise ValueError(f"expected {self.size} x {self.size} pixels, got another size")
        if self.crop is not None:
            left, top = (round((side - self.crop) / 2) for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        values = np.asarray(image, dtype=np.float32) / np.float32(255.0)
        channels = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        mean, std = (np.array(own, dtype=np.float32).reshape(-1, 1, 1) for own in (self.mean, self.std))
        return (channels - mean) / std
