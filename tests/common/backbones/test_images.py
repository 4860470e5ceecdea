"""Images from PIL and arrays; resizing, cropping and scaling as torchvision does it; what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.models import MobileNet_V2_Weights, ViT_B_16_Weights, WeightsEnum

from common.backbones.parts.images import ImagePreprocessing, convert_to_grey, convert_to_rgb
from common.types import BadRecord

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(height: int = 50, width: int = 70, channels: int = 3) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("weights", [MobileNet_V2_Weights.IMAGENET1K_V2, ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1])
def test_named_weights_preprocessing_is_torchvisions_own(weights: WeightsEnum) -> None:
    image = Image.fromarray(picture(300, 400))
    torch.testing.assert_close(
        ImagePreprocessing.of_weights(weights).apply(image), weights.transforms()(image), rtol=0, atol=0
    )


def test_without_a_crop_both_sides_are_resized() -> None:
    settings = ImagePreprocessing(resize=32, crop=None, **IMAGENET)
    assert settings.apply(picture()).shape == (3, 32, 32)
    assert settings.side == 32


def test_with_a_crop_the_middle_of_the_image_is_kept() -> None:
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:30, 20:40] = 255
    settings = ImagePreprocessing(resize=40, crop=20, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(settings.apply(image), torch.ones(3, 20, 20))
    assert settings.side == 20


def test_pixels_are_scaled_and_standardised() -> None:
    settings = ImagePreprocessing(resize=50, crop=None, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = picture(50, 50)
    expected = (pixels / 255.0 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(settings.apply(pixels).permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "value"), [("interpolation", "bicubic"), ("antialias", False), ("resize", 40), ("crop", 24)]
)
def test_every_setting_shapes_the_input(change: str, value: object) -> None:
    settings = ImagePreprocessing(resize=32, crop=28, **IMAGENET)
    other = settings.model_copy(update={change: value})
    first, second = settings.apply(picture()), other.apply(picture())
    assert first.shape != second.shape or not torch.equal(first, second)


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at most resize"):
        ImagePreprocessing(resize=32, crop=33, **IMAGENET)


def test_arrays_and_images_of_the_same_pixels_are_equal() -> None:
    settings = ImagePreprocessing(resize=32, crop=None, **IMAGENET)
    flat = picture(channels=1)
    from_grey = [settings.apply(item) for item in (flat, flat[:, :, None], Image.fromarray(flat))]
    assert all(torch.equal(from_grey[0], other) for other in from_grey)
    assert torch.equal(settings.apply(np.stack([flat] * 3, axis=2)), from_grey[0])


def test_an_array_that_needs_no_resizing_is_the_image_of_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for crop in (None, 20):
        settings = ImagePreprocessing(resize=32, crop=crop, **IMAGENET)
        assert torch.equal(settings.apply(pixels), settings.apply(Image.fromarray(pixels)))


@pytest.mark.parametrize(
    "item",
    [
        picture().astype(np.float32),
        picture().astype(np.uint16),
        picture(channels=4),
        np.zeros((0, 5), dtype=np.uint8),
        np.zeros(5, dtype=np.uint8),
        Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)),
        Image.fromarray(np.ones((4, 4), dtype=np.float32)),
        "a path",
        None,
    ],
)
def test_what_is_no_eight_bit_image_is_a_bad_record(item: object) -> None:
    with pytest.raises(BadRecord):
        convert_to_rgb(item)


def test_a_truncated_file_is_a_bad_record() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, format="PNG")
    with pytest.raises(BadRecord, match="decoded"):
        convert_to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:2000])))


def test_grey_values_are_in_zero_to_one_from_every_source() -> None:
    pixels = picture(8, 8, 1)
    for item in (pixels, Image.fromarray(pixels), pixels / 255.0, (pixels / 255.0).astype(np.float32)):
        np.testing.assert_allclose(convert_to_grey(item), pixels / 255.0, atol=1e-6)
        assert convert_to_grey(item).dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.5, np.inf])
def test_grey_values_outside_the_range_are_a_bad_record(bad: float) -> None:
    pixels = np.zeros((4, 4))
    pixels[1, 2] = bad
    with pytest.raises(BadRecord):
        convert_to_grey(pixels)
