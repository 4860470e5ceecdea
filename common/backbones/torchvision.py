"""Any torchvision classification model as a backbone: its features are the input of its last linear layer.

Weights come by torchvision's own name, or from a local file that holds the full model, classifier included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import Field, StringConstraints, field_validator, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.boundary import Divided, blocks_of, divide_chain
from common.backbones.parts.image_preprocessing import ImagePreprocessing
from common.backbones.parts.projection import Projection, batch_norm_shift
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import load_strict, read_state
from common.errors import nearest
from common.plugins import LocalPath, Plugin
from common.types import BadInput

WeightsName = Annotated[str, StringConstraints(pattern=r"^\w+$")]
IMAGENET_CLASSES = 1000

# Classifiers inside GoogLeNet and Inception that serve training only.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@final
class Torchvision(Plugin):
    """Settings of a torchvision backbone.

    Attributes:
        model: torchvision's name, such as `mobilenet_v2`.
        weights: a name of torchvision's (downloaded and cached by it), such as `IMAGENET1K_V2`, or a local
            `.safetensors`, `.pth` or `.pt` file.
        preprocess: how an image becomes an input; without it, the named weights' own. A local file does not say, so
            that it must be written there.
        num_classes: classes of the weights' classifier.
        projection: what happens to the features before they leave the backbone.
    """

    kind: Literal["torchvision"] = "torchvision"
    model: str
    weights: WeightsName | LocalPath | None = None
    preprocess_settings: ImagePreprocessing | None = Field(default=None, alias="preprocess")
    num_classes: Annotated[int, Field(ge=2)] = IMAGENET_CLASSES
    projection: Projection | None = None

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(f"expected a torchvision classification model, got {name!r}{nearest(name, known)}")
        return name

    @model_validator(mode="after")
    def _complete(self) -> Torchvision:
        if isinstance(self.weights, str):
            known = list(models.get_model_weights(self.model).__members__)
            if self.weights not in known:
                raise ValueError(
                    f"weights: expected a file or one of {', '.join(known)}, got {self.weights!r}"
                    f"{nearest(self.weights, known)}"
                )
        elif self.preprocess_settings is None:
            raise ValueError("preprocess: expected settings (only weights that torchvision names bring their own)")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """A small ShuffleNet with random weights in a file, and random images."""
        path = folder / "shufflenet.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(models.shufflenet_v2_x0_5(weights=None, num_classes=20).state_dict(), path)
        settings = {
            "kind": "torchvision",
            "model": "shufflenet_v2_x0_5",
            "weights": str(path),
            "num_classes": 20,
            "preprocess": {"resize": 36, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            "projection": {"dim": 8, "shift": "batch_norm", "normalize": True},
        }
        pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
        return Example(settings, list(pixels))

    def resolved(self) -> Torchvision:
        """Without weights and with explicit preprocessing; the removed classifier's size does not matter."""
        return self.model_copy(
            update={"weights": None, "preprocess_settings": self._preprocessing(), "num_classes": IMAGENET_CLASSES}
        )

    def architecture(self) -> Architecture:
        """The model with its last linear layer replaced by the identity."""
        encoder, classifier = self._split(self._full())
        return Architecture(encoder, classifier.in_features)

    def pretrained(self) -> Pretrained:
        """The named or local weights, split into encoder and classifier."""
        if self.weights is None:
            raise BadInput("weights: expected a name of torchvision's or a local file, got nothing")
        model = self._full()
        state = read_state(self.weights) if isinstance(self.weights, Path) else self._download()
        own = {name: tensor for name, tensor in state.items() if not name.startswith(_AUXILIARY)}
        load_strict(model, own, f"weights: {self.weights}")
        return self._parts(model)

    def random(self) -> Pretrained:
        """Weights as torchvision initialises them."""
        encoder, classifier = self._split(self._full())
        # Standardised images have about mean 0 and variance 1.
        side = self._preprocessing().side
        architecture = Architecture(encoder, classifier.in_features)
        return random_weights(architecture, classifier.weight, torch.randn(4, 3, side, side))

    def weights_file(self) -> Path | None:
        """The local weights, if they are local."""
        return self.weights if isinstance(self.weights, Path) else None

    def blocks(self, encoder: nn.Module) -> list[str]:
        """Such as `features.17` or `layer4`."""
        return blocks_of(encoder)

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a block. Raises BadInput: the model is not a chain up to there."""
        side = self._preprocessing().side
        return divide_chain(encoder, block, (3, side, side))

    def preprocess(self, item: Any) -> Tensor:
        """3 x H x W from a PIL image or uint8 array; grey is repeated over the channels. Raises BadRecord."""
        return self._preprocessing().apply(item)

    def _preprocessing(self) -> ImagePreprocessing:
        return self.preprocess_settings or ImagePreprocessing.of_weights(self._named_weights())

    def _full(self) -> nn.Module:
        options = _build_options(self.model, self._preprocessing().side)
        model: nn.Module = models.get_model(self.model, weights=None, num_classes=self.num_classes, **options)
        return model

    def _named_weights(self) -> models.WeightsEnum:
        return models.get_model_weights(self.model)[str(self.weights)]

    def _download(self) -> dict[str, Tensor]:
        try:
            # Through the model: torchvision renames some old files' tensors while loading.
            model: nn.Module = models.get_model(self.model, weights=self._named_weights())
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"weights: expected to download {self.weights} of {self.model}, got {type(error).__name__}; "
                "give a local file instead"
            ) from error
        return dict(model.state_dict())

    def _parts(self, model: nn.Module) -> Pretrained:
        encoder, classifier = self._split(model)
        shift_D = batch_norm_shift(encoder)
        if shift_D is not None and len(shift_D) != classifier.in_features:
            shift_D = None
        return Pretrained(encoder.state_dict(), classifier.weight.detach(), shift_D)

    def _split(self, model: nn.Module) -> tuple[nn.Module, nn.Linear]:
        name, classifier = self._classifier(model)
        model.set_submodule(name, nn.Identity())
        return model, classifier

    def _classifier(self, model: nn.Module) -> tuple[str, nn.Linear]:
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear or linear[-1][1].out_features != self.num_classes:
            raise BadInput(f"model: expected one that ends in a linear classifier, got {self.model!r}")
        return linear[-1]


def _build_options(model: str, side: int) -> dict[str, Any]:
    if model in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers serve training only, and their weights expect inputs scaled in another way.
        return {"aux_logits": False, "transform_input": True, "init_weights": False}
    if model.startswith("vit_"):
        return {"image_size": side}
    if model.startswith("maxvit_"):
        return {"input_size": (side, side)}
    return {}
