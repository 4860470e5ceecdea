"""The small net: a weights file as pre-training writes it, its features' width, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.backbones.small_cnn import collect_tensors
from common.model.backbones import open_pretrained, open_untrained
from common.types import BadInput, BadRecord


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "small_cnn",
        "channels": [4, 6],
        "input_size": 8,
        "weights": str(folder / "w.safetensors"),
        **changes,
    }


def test_missing_weights_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"backbone\.weights: .*run `headwater simulate pretrain CONFIG` first"):
        open_pretrained(settings(tmp_path), "backbone")


def test_what_was_trained_is_what_is_opened(tmp_path: Path) -> None:
    untrained = open_untrained(settings(tmp_path), "backbone", seed=3)
    assert untrained.weights_path == tmp_path / "w.safetensors"
    optimizer = torch.optim.SGD(untrained.module.parameters(), lr=0.1)
    images = torch.rand(16, 1, 8, 8)
    before = untrained.module(images).detach()
    untrained.module(images).square().mean().backward()
    optimizer.step()
    save_file(collect_tensors(untrained.module, None), untrained.weights_path)
    backbone = open_pretrained(settings(tmp_path), "backbone")
    features = backbone.encode(images)
    assert features.shape == (16, untrained.feature_dim) == (16, 24)
    assert not torch.allclose(features, before)
    torch.testing.assert_close(features, untrained.module.eval()(images).detach())


def test_untrained_weights_are_reproducible_from_the_seed(tmp_path: Path) -> None:
    first, same, other = (open_untrained(settings(tmp_path), "backbone", seed=seed).module for seed in (1, 1, 2))
    weights = [module.state_dict()["0.weight"] for module in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_projection_needs_the_classifier_in_the_file(tmp_path: Path) -> None:
    projected = settings(tmp_path, projection={"dim": 3, "normalize": True})
    encoder = open_untrained(projected, "backbone", seed=0)
    save_file(collect_tensors(encoder.module, None), tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"backbone\.projection\.dim: expected null for weights without a classifier"):
        open_pretrained(projected, "backbone")
    save_file(collect_tensors(encoder.module, nn.Linear(24, 5)), tmp_path / "w.safetensors")
    assert open_pretrained(projected, "backbone").feature_dim == 3
    with pytest.raises(BadInput, match=r"projection\.dim: expected at most 4"):
        open_pretrained(settings(tmp_path, projection={"dim": 5, "normalize": True}), "backbone")


def test_the_shift_repeats_a_channels_mean_at_each_of_its_places(tmp_path: Path) -> None:
    shifted = settings(tmp_path, projection={"shift": "batch_norm", "normalize": False})
    untrained = open_untrained(shifted, "backbone", seed=0)
    norms = [module for module in untrained.module.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[-1].weight.zero_()
        norms[-1].bias.copy_(torch.arange(6.0) - 2)
    save_file(collect_tensors(untrained.module, None), tmp_path / "w.safetensors")
    # Without spread every activation is its own mean, so that nothing remains.
    features = open_pretrained(shifted, "backbone").encode(torch.rand(2, 1, 8, 8))
    assert torch.equal(features, torch.zeros(2, 24))


def test_an_image_of_another_size_is_a_bad_record(tmp_path: Path) -> None:
    untrained = open_untrained(settings(tmp_path), "backbone", seed=0)
    assert untrained.preprocess(np.full((8, 8), 255, dtype=np.uint8)).unique().tolist() == [1.0]
    with pytest.raises(BadRecord, match="8 x 8"):
        untrained.preprocess(np.zeros((8, 9), dtype=np.uint8))


def test_a_pooled_map_larger_than_the_last_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="pool: expected at most 4"):
        open_untrained(settings(tmp_path, pool=5), "backbone", seed=0)
