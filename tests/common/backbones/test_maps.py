"""Feature maps: what a network knows at each place, on one grid, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision import models

from common.model.backbones import load_blob, open_pretrained, open_random
from common.types import BadInput

PREPROCESS = {"resize": 64, "crop": None, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def settings(**changes: Any) -> dict[str, Any]:
    maps = {"layers": ["features.1", "features.4"], "grid": 8, **changes.pop("maps", {})}
    return {"kind": "torchvision", "model": "mobilenet_v2", "preprocess": PREPROCESS, "maps": maps, **changes}


def test_a_place_has_the_normalised_outputs_of_each_layer_there() -> None:
    backbone = open_random(settings(), "b", 1)
    network = models.mobilenet_v2(weights=None).eval()
    own = {name.removeprefix("encoder.extractor."): value for name, value in backbone.module.state_dict().items()}
    network.load_state_dict({name: own.get(name, value) for name, value in network.state_dict().items()})
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = network.features[:2](pixels)  # 32 x 32 places.
        second = network.features[:5](pixels)  # 8 x 8.
    expected = torch.cat(
        [functional.normalize(part, dim=1) for part in (functional.avg_pool2d(first, 4), second)], dim=1
    ).movedim(1, -1)
    features = backbone.encode(pixels)
    assert backbone.grid == (8, 8) and features.shape == (2, 8, 8, 16 + 32) and backbone.feature_dim == 48
    torch.testing.assert_close(features, expected * backbone.module.scale, rtol=1e-4, atol=1e-4)


def test_colours_are_those_of_the_picture_itself_and_context_is_the_mean_around() -> None:
    plain = open_random(settings(maps={"colours": True}), "b", 1)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    colours = plain.encode(pixels)[..., -3:]
    torch.testing.assert_close(plain.encode(2.0 * pixels + 1.0)[..., -3:], colours, rtol=1e-4, atol=1e-4)
    wide = open_random(settings(maps={"colours": True, "context": 3}), "b", 1)
    features = wide.encode(pixels)
    assert wide.feature_dim == 2 * plain.feature_dim
    inner = features[0, :, :, : plain.feature_dim]
    torch.testing.assert_close(
        features[0, 4, 4, plain.feature_dim :], inner[3:6, 3:6].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "layer", "resize"),
    [
        pytest.param("vit_b_16", "encoder.layers.encoder_layer_1", 64, marks=pytest.mark.slow),
        ("swin_t", "features.1", 64),
        ("convnext_tiny", "features.1", 64),
    ],
)
def test_tokens_of_patches_and_channels_that_come_last_are_places_too(model: str, layer: str, resize: int) -> None:
    spec = settings(maps={"layers": [layer], "grid": 4}, model=model, preprocess={**PREPROCESS, "resize": resize})
    backbone = open_random(spec, "b", 1)
    pixels = torch.randn(1, 3, resize, resize, generator=torch.Generator().manual_seed(0))
    features = backbone.encode(pixels)
    assert features.shape[1:3] == (4, 4)
    # A picture of which one corner is another is known there, and less elsewhere.
    pixels[:, :, :16, :16] += 3.0
    moved = (backbone.encode(pixels) - features).norm(dim=-1)[0]
    assert moved.argmax() == 0


def test_what_travels_opens_to_the_same_maps(tmp_path: Any) -> None:
    backbone = open_random(settings(projection={"normalize": True}), "b", 1)
    arrived = load_blob(backbone.blob())
    item = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    pixels = backbone.preprocess(item)[None]
    assert torch.equal(arrived.encode(pixels), backbone.encode(pixels)) and arrived.grid == (8, 8)
    torch.testing.assert_close(backbone.encode(pixels).norm(dim=-1), torch.ones(1, 8, 8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"maps": {"layers": ["features.99"]}}, "maps.layers: expected layers of the network, got 'features.99'"),
        ({"maps": {"layers": ["features.1", "features.1"]}}, "layers: expected each layer once"),
        ({"maps": {"layers": ["classifier.1"]}}, "expected layers with places, got 'classifier.1'"),
        ({"maps": {"context": 2}}, "context: expected an odd number of places, got 2"),
        ({"preprocess": {**PREPROCESS, "crop": 32}}, "preprocess.crop: expected null beside maps"),
        ({"projection": {"dim": 8, "normalize": True}}, "projection.dim: expected null beside maps"),
    ],
)
def test_maps_that_cannot_be_are_refused_in_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        open_random(settings(**changes), "b", 1)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_layer_of_one_place_is_read_and_one_behind_it_is_refused() -> None:
    """A network that is asked for its shapes does not train: batches of one value have no deviation."""
    small = {**PREPROCESS, "resize": 32}
    backbone = open_random(settings(preprocess=small, maps={"layers": ["features.18"], "grid": 2}), "b", 1)
    assert backbone.encode(torch.randn(1, 3, 32, 32)).shape == (1, 2, 2, 1280)
    with pytest.raises(BadInput, match="expected layers with places, got 'classifier'"):
        open_random(settings(preprocess=small, maps={"layers": ["classifier"]}), "b", 1)


def test_settings_without_maps_have_the_digest_that_they_had() -> None:
    spec = {key: value for key, value in settings().items() if key != "maps"}
    assert "maps" not in open_random(spec, "b", 1).public_spec()
    with pytest.raises(BadInput, match="weights"):
        open_pretrained(spec, "b")


def test_relative_features_have_no_mean_over_a_picture_and_directions_keep_lengths_and_angles() -> None:
    plain, relative = (open_random(settings(maps=maps), "b", 1) for maps in ({}, {"relative": True}))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features, apart = (each.encode(pixels) / each.module.scale for each in (plain, relative))
    torch.testing.assert_close(apart, features - features.mean(dim=(1, 2), keepdim=True), rtol=1e-4, atol=1e-5)
    projected = open_random(settings(maps={"relative": True, "directions": 4000}), "b", 1)
    short = projected.encode(pixels) / projected.module.scale
    assert projected.feature_dim == short.shape[-1] == 4000
    products, expected = (each.flatten(0, 2) @ each.flatten(0, 2).T for each in (short, apart))
    assert (products - expected).abs().max() < 0.15 * expected.diagonal().max()
    # What travels has the same directions, which are no part of the weights.
    assert torch.equal(load_blob(projected.blob()).encode(pixels), projected.encode(pixels))
    assert not any("matrix" in name for name in projected.module.state_dict())
    assert len({plain.digest, relative.digest, projected.digest}) == 3
