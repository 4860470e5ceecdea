"""Networks of MONAI for pictures and scans: classifiers without their last layer, and encoders of U-shaped nets.

What travels is the network's name with its arguments as plain values, and the weights of its encoder as tensors: a site
builds the network from its own MONAI, which must be installed there too (`pip install "headwater[monai]"`).

# Shapes: B records, D features, K classes of the pre-training.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, StringConstraints, field_validator, model_validator

from common.backbones import Architecture, Example, Pretrained, Projection
from common.backbones.parts.graphs.reads import Reads
from common.errors import plain
from common.inputs import Volume
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.backbones.parts.graphs.encoders import Encoder


@dataclass(frozen=True)
class _Net:
    """A network of MONAI's.

    Attributes:
        layer: the layer whose output is read, `-1` the last of a list; None for the innermost of a net that is nested.
        arguments: names of the arguments for the number of channels and of outputs; an empty name where there is none.
        classifier: name of the last linear layer; None where there is none.
        fixed: arguments that are not chosen.
    """

    layer: str | None
    arguments: tuple[str, str] = ("in_channels", "out_channels")
    classifier: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)


_DENSE = _Net("class_layers.flatten", classifier="class_layers.out", fixed={"pretrained": False})
_RES = _Net("avgpool", ("n_input_channels", "num_classes"), "fc", {"pretrained": False})
_SE = _Net("adaptive_avg_pool", ("in_channels", "num_classes"), "last_linear", {"pretrained": False})
_NETS = {
    **dict.fromkeys(("DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264"), _DENSE),
    **dict.fromkeys(("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"), _RES),
    **dict.fromkeys(("SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101"), _SE),
    "EfficientNetBN": _Net("_avg_pooling", ("in_channels", "num_classes"), "_fc", {"pretrained": False}),
    "ViT": _Net("norm", ("in_channels", "")),
    "ViTAutoEnc": _Net("norm"),
    "SwinUNETR": _Net("swinViT"),
    "UNETR": _Net("vit.norm"),
    "UNet": _Net(None),
    "AttentionUnet": _Net(None),
    "BasicUNet": _Net("down_4"),
    "BasicUNetPlusPlus": _Net("conv_4_0"),
    "DynUNet": _Net("bottleneck"),
    "FlexibleUNet": _Net("encoder", fixed={"pretrained": False}),
    "MedNeXt": _Net("bottleneck"),
    "SegResNet": _Net("down_layers.-1"),
    "SegResNetDS": _Net("encoder"),
    "VNet": _Net("down_tr256"),
}

Name = Literal[
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "DenseNet264",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "SENet154",
    "SEResNet50",
    "SEResNet101",
    "SEResNet152",
    "SEResNext50",
    "SEResNext101",
    "EfficientNetBN",
    "ViT",
    "ViTAutoEnc",
    "SwinUNETR",
    "UNETR",
    "UNet",
    "AttentionUnet",
    "BasicUNet",
    "BasicUNetPlusPlus",
    "DynUNet",
    "FlexibleUNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "VNet",
]
_OWN = ("spatial_dims", "in_channels", "n_input_channels", "out_channels", "num_classes", "pretrained", "progress")


@final
class Monai(Plugin):
    """Settings of a network of MONAI's.

    Attributes:
        model: MONAI's name of the network.
        options: its arguments, such as `{channels: [16, 32, 64], strides: [2, 2]}` of UNet; the numbers of axes and
            channels follow from `reads`, and what only shapes a decoder or classifier changes nothing.
        reads: what it reads, pictures or scans, and how a record becomes its input.
        layer: name of the layer whose output, averaged over all places, is the features; null for the last one before
            a classifier, the deepest of a U-shaped net, or a transformer's last norm.
        weights: a local `.safetensors`, `.pth` or `.pt` file of the network; what is behind the layer is not read.
        projection: what happens to the features before they leave the backbone.
    """

    kind: Literal["monai"] = "monai"
    model: Name
    options: dict[Annotated[str, StringConstraints(pattern=r"^[a-z_0-9]+$")], Any] = Field(default_factory=dict)
    reads: Reads
    layer: str | None = None
    weights: LocalPath | None = None
    projection: Projection | None = None

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name in _OWN:
                raise ValueError(f"expected arguments of the network, got {name!r}, which follows from other settings")
        return options

    @model_validator(mode="after")
    def _check_reads(self) -> Monai:
        if (self.reads.pictures is None and self.reads.volumes is None) or self.reads.channels_last:
            raise ValueError("reads: expected pictures or volumes, with channels first")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny U-net of scans with random weights in a file, and random scans."""
        import torch
        from safetensors.torch import save_file

        settings = {
            "kind": "monai",
            "model": "UNet",
            "options": {"channels": [4, 8, 12], "strides": [2, 2]},
            "reads": {"volumes": {"size": [12, 8, 8], "spacing_mm": [2, 2, 2]}},
        }
        path = folder / "unet.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(cls.model_validate(settings)._build().state_dict(), path)
        rng = np.random.default_rng(0)
        scans = [Volume(rng.normal(size=(11, 9, 10)).astype(np.float32), (2.0, 2.0, 1.5)) for _ in range(5)]
        return Example({**settings, "weights": str(path)}, scans)

    def architecture(self) -> Architecture:
        """Returns the network up to its layer: records B x C x places -> features B x D."""
        encoder = self._open()
        return Architecture(encoder, encoder.feature_dim)

    def pretrained(self) -> Pretrained:
        """Returns the weights up to the layer, and those of the last linear layer where it reads the features."""
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        if self.weights is None:
            raise BadInput("weights: expected a file of the network's weights, got nothing")
        encoder = self._open()
        source = f"weights: {self.weights}"
        state = fit_names(read_state(self.weights), encoder.net, source)
        own = encoder.net.state_dict()
        load_strict(encoder.net, {name: tensor for name, tensor in state.items() if name in own}, source)
        rows_KD = state.get(f"{_NETS[self.model].classifier}.weight")
        fits = rows_KD is not None and self.layer is None and rows_KD.shape[1:] == (encoder.feature_dim,)
        return Pretrained(encoder.state_dict(), rows_KD if fits else None)

    def random(self) -> Pretrained:
        """Returns weights as MONAI initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        classifier = torch.nn.Linear(architecture.feature_dim, architecture.feature_dim + 1)
        return scale_random_weights(architecture, classifier.weight, self.reads.draw(4))

    def preprocess(self, item: Any) -> Tensor:
        """Returns a picture or scan as an input. Raises BadRecord."""
        return self.reads.apply(item)

    @property
    def _shape(self) -> tuple[int, ...]:
        if self.reads.pictures is not None:
            return (3, self.reads.pictures.side, self.reads.pictures.side)
        assert self.reads.volumes is not None  # One of them is set.
        return (1, *self.reads.volumes.size)

    def _open(self) -> Encoder:
        from common.backbones.parts.graphs.encoders import Encoder

        net = self._build()
        return Encoder(net, self.layer or _find_layer(net, _NETS[self.model].layer), self._shape)

    def _build(self) -> nn.Module:
        from common.backbones.parts.graphs.encoders import NumbersOnCpu

        own, (channels, *places) = _NETS[self.model], self._shape
        arguments: dict[str, Any] = {**own.fixed, own.arguments[0]: channels, "spatial_dims": len(places)}
        if own.arguments[1]:
            arguments[own.arguments[1]] = 2
        if self.model == "VNet":
            arguments["dropout_dim"] = len(places)
        if self.model in ("ViT", "ViTAutoEnc", "UNETR"):
            arguments["img_size"] = places
        try:
            build = getattr(importlib.import_module("monai.networks.nets"), self.model)
        except ImportError as error:
            raise BadInput('kind: expected the package monai; run pip install "headwater[monai]"') from error
        try:
            with NumbersOnCpu():
                net: nn.Module = build(**{**arguments, **self.options})
        except (TypeError, ValueError, KeyError, IndexError, AssertionError, RuntimeError, AttributeError) as error:
            raise BadInput(
                f"options: expected arguments that MONAI's {self.model} takes, got {type(error).__name__} "
                f"({plain(str(error), 160)})"
            ) from error
        except ImportError as error:
            raise BadInput(
                'kind: expected the packages of MONAI\'s nets; run pip install "headwater[monai]"'
            ) from error
        return net


def _find_layer(net: nn.Module, layer: str | None) -> str:
    if layer is None:
        names: list[str] = [name for name, _ in net.named_modules() if name.endswith(".submodule")]
        if not names:
            raise BadInput("options: expected at least two channels and a stride")
        return max(names, key=lambda name: name.count("submodule"))
    holder, _, last = layer.rpartition(".")
    return f"{holder}.{len(list(net.get_submodule(holder).children())) - 1}" if last == "-1" else layer
