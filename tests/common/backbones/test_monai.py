"""MONAI's nets as backbones: the features of its own forward pass, and nothing of what stands behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from common.backbones.monai import _NETS, Name
from common.inputs import Volume
from common.model.backbones import load_blob, open_pretrained, open_random, open_untrained
from common.types import BadInput

nets = pytest.importorskip("monai.networks.nets", reason="needs headwater[monai]")

PICTURES = {"pictures": {"resize": 32, "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3}}
SCANS = {"volumes": {"size": [16, 16, 16]}}
TINY: dict[str, dict[str, Any]] = {
    **{f"DenseNet{depth}": {"init_features": 4} for depth in (121, 169, 201, 264)},
    "EfficientNetBN": {"model_name": "efficientnet-b0"},
    "ViT": {"patch_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2},
    "ViTAutoEnc": {"patch_size": 16, "hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2},
    "SwinUNETR": {"feature_size": 12},
    "UNETR": {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2, "feature_size": 4},
    "UNet": {"channels": [4, 8, 16], "strides": [2, 2]},
    "AttentionUnet": {"channels": [4, 8, 16], "strides": [2, 2]},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    "FlexibleUNet": {"backbone": "efficientnet-b0"},
    "MedNeXt": {"init_filters": 4},
}


def test_a_classifiers_features_are_what_its_last_layer_reads(tmp_path: Path) -> None:
    torch.manual_seed(5)
    options: dict[str, Any] = {"init_features": 4, "growth_rate": 4, "block_config": [1, 2]}
    net = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=3, **options).eval()
    # As trainings on several GPUs save it.
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "n.pt")
    settings = {"kind": "monai", "model": "DenseNet121", "options": options, "reads": SCANS}
    backbone = open_pretrained({**settings, "weights": str(tmp_path / "n.pt")}, "backbone")
    inputs_B = torch.randn(3, 1, 16, 16, 16)
    with torch.no_grad():
        logits_BK = net(inputs_B)
        from_features_BK = net.class_layers.out(load_blob(backbone.blob()).encode(inputs_B))
    torch.testing.assert_close(from_features_BK, logits_BK)
    projected = {**settings, "weights": str(tmp_path / "n.pt"), "projection": {"dim": 2, "normalize": False}}
    assert open_pretrained(projected, "backbone").feature_dim == 2


def test_a_decoder_does_not_travel(tmp_path: Path) -> None:
    torch.manual_seed(5)
    features, reads = [4, 4, 8, 8, 16, 4], {"volumes": {"size": [32, 32, 32]}}
    net = nets.BasicUNet(spatial_dims=3, features=features).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    settings = {"kind": "monai", "model": "BasicUNet", "options": {"features": features}, "reads": reads}
    backbone = open_pretrained({**settings, "weights": str(tmp_path / "net.pt")}, "backbone")
    assert not [name for name in backbone.module.state_dict() if "upcat" in name or "final" in name]
    inputs_B = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        deep_B = net.down_4(net.down_3(net.down_2(net.down_1(net.conv_0(inputs_B)))))
    torch.testing.assert_close(backbone.encode(inputs_B), deep_B.mean(dim=(2, 3, 4)))
    earlier = open_pretrained({**settings, "weights": str(tmp_path / "net.pt"), "layer": "down_2"}, "backbone")
    assert earlier.feature_dim == 8
    assert earlier.digest != backbone.digest


def test_scans_are_turned_and_interpolated_before_the_network_reads_them() -> None:
    reads = {"volumes": {"size": [8, 8, 8], "spacing_mm": [2, 2, 2], "orientation": "LPS"}}
    backbone = open_random({"kind": "monai", "model": "UNet", "options": TINY["UNet"], "reads": reads}, "backbone", 1)
    values_XYZ = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    turned = backbone.preprocess(Volume(values_XYZ[::-1, ::-1].copy(), (2.0, 2.0, 2.0)))
    standard = (values_XYZ - values_XYZ.mean()) / values_XYZ.std()
    torch.testing.assert_close(turned[0], torch.from_numpy(standard), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "UNet", "options": {"channels": [4, 8], "strides": [2], "pretrained": True}}, "'pretrained', which"),
        ({"model": "UNet", "options": {"channels": [4], "strides": []}}, "expected arguments that MONAI's UNet takes"),
        ({"model": "SwinUNETR"}, "expected inputs that the network takes, got 1 x 16 x 16 x 16"),
        (
            {"model": "UNet", "options": TINY["UNet"], "layer": "model.9"},
            "expected a layer of the network, got 'model.9'",
        ),
        (
            {"model": "UNet", "options": TINY["UNet"], "reads": {"series": {"length": 16}}},
            "expected pictures or volumes",
        ),
        ({"model": "DiNTS"}, "model"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_random({"kind": "monai", "reads": SCANS, **settings}, "backbone", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("reads", [PICTURES, {"volumes": {"size": [64, 64, 64]}}], ids=["pictures", "scans"])
@pytest.mark.parametrize("model", get_args(Name))
def test_every_net_that_can_be_named_has_features(model: str, reads: dict[str, Any]) -> None:
    settings = {"kind": "monai", "model": model, "options": TINY.get(model, {}), "reads": reads}
    if model == "VNet" and reads is PICTURES:
        with pytest.raises(BadInput, match="should be divisible by in_channels"):
            open_untrained(settings, "backbone", seed=1)
        return
    with torch.device("meta"):
        assert open_untrained(settings, "backbone", seed=1).feature_dim > 0
    assert set(get_args(Name)) == set(_NETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["DenseNet121", "resnet10", "ViT", "SwinUNETR", "AttentionUnet", "DynUNet", "SegResNet"]
)
def test_a_net_without_memory_is_the_one_that_reads_scans(model: str) -> None:
    settings = {
        "kind": "monai",
        "model": model,
        "options": TINY.get(model, {}),
        "reads": {"volumes": {"size": [64] * 3}},
    }
    with torch.device("meta"):
        empty = open_untrained(settings, "backbone", seed=1).module.state_dict()
    backbone = open_random(settings, "backbone", seed=1)
    state = {name.removeprefix("encoder."): values for name, values in backbone.module.state_dict().items()}
    assert {name: values.shape for name, values in empty.items()} == {name: state[name].shape for name in empty}
    inputs_B = backbone.kind.reads.draw(2)  # type: ignore[attr-defined]
    features_BD, alone_1D = backbone.encode(inputs_B), backbone.encode(inputs_B[1:])
    assert float((features_BD[1:] - alone_1D).norm() / alone_1D.norm()) < 1e-3
