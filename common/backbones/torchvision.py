"""Any torchvision classification model as a backbone: its features are the input of its last linear layer.

Weights come by torchvision's own name, or from a local file that holds the full model, classifier included.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from common.backbones import Architecture, Divided, Example, Maps, Pretrained, Projection
from common.backbones.parts.images import ImagePreprocessing
from common.errors import nearest
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchvision.models import WeightsEnum

WeightsName = Annotated[str, StringConstraints(pattern=r"^\w+$")]
IMAGENET_CLASSES = 1000

# Classifiers inside GoogLeNet and Inception that serve training only.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")

_REGISTERED = r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(\s*\*,\s*weights: Optional\[(\w+)\]"


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
        maps: layers whose outputs at each place are the features, for tasks that label places; null takes the features
            of the whole picture.
    """

    kind: Literal["torchvision"] = "torchvision"
    model: str
    weights: WeightsName | LocalPath | None = None
    preprocess_settings: ImagePreprocessing | None = Field(default=None, alias="preprocess")
    num_classes: Annotated[int, Field(ge=2)] = IMAGENET_CLASSES
    projection: Projection | None = None
    maps: Maps | None = None

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        # Older digests cover settings without it.
        return values if self.maps is not None else {key: value for key, value in values.items() if key != "maps"}

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str) -> str:
        if name in _read_names():
            return name
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(f"expected a torchvision classification model, got {name!r}{nearest(name, known)}")
        return name

    @model_validator(mode="after")
    def _check_weights(self) -> Torchvision:
        if isinstance(self.weights, str) and self.weights not in _read_names().get(self.model, ()):
            from torchvision import models

            known = list(models.get_model_weights(self.model).__members__)
            if self.weights not in known:
                raise ValueError(
                    f"weights: expected a file or one of {', '.join(known)}, got {self.weights!r}"
                    f"{nearest(self.weights, known)}"
                )
        if not isinstance(self.weights, str) and self.preprocess_settings is None:
            raise ValueError("preprocess: expected settings (only weights that torchvision names bring their own)")
        if self.maps is not None and self.preprocess_settings is not None and self.preprocess_settings.crop is not None:
            raise ValueError("preprocess.crop: expected null beside maps: masks are of the whole picture")
        if self.maps is not None and self.projection is not None and self.projection.dim is not None:
            raise ValueError("projection.dim: expected null beside maps: no classifier has rows for places")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a small ShuffleNet with random weights in a file, and random images."""
        import torch
        from safetensors.torch import save_file
        from torchvision import models

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
        """Returns settings without weights and with explicit preprocessing.

        The classifier is removed, so that its number of classes is a fixed one.
        """
        return self.model_copy(
            update={"weights": None, "preprocess_settings": self._preprocessing(), "num_classes": IMAGENET_CLASSES}
        )

    def architecture(self) -> Architecture:
        """Returns the model with its last linear layer replaced by the identity, or its maps."""
        from common.backbones.parts.raw import open_pixels

        if self.maps is not None:
            return self._open_maps(self._build())
        network, classifier = self._split(self._build())
        return Architecture(network, classifier.in_features, open_raw=lambda: open_pixels(self._preprocessing()))

    def pretrained(self) -> Pretrained:
        """Returns the named or local weights, split into network and classifier."""
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        if self.weights is None:
            raise BadInput("weights: expected a name of torchvision's or a local file, got nothing")
        model = self._build()
        state = read_state(self.weights) if isinstance(self.weights, Path) else self._download()
        source = f"weights: {self.weights}"
        fitted = fit_names(state, model, source)
        own = {name: tensor for name, tensor in fitted.items() if not name.startswith(_AUXILIARY)}
        name, classifier = self._find_classifier(model)
        self._check_classes(own, name, classifier)
        lacks = [f"{name}.{part}" for part, _ in classifier.named_parameters() if f"{name}.{part}" not in own]
        # Features are taken below the classifier, which only a projection reads.
        filled = {key: model.state_dict()[key] for key in lacks} if len(lacks) == len(classifier.state_dict()) else {}
        load_strict(model, {**own, **filled}, source)
        if filled and self.maps is None:
            return dataclasses.replace(self._read_parts(model), classifier_KD=None)
        return self._read_parts(model) if self.maps is None else Pretrained(self._open_maps(model).module.state_dict())

    def list_classes(self) -> list[str]:
        """Returns torchvision's names of the classes of its weights, where there are as many."""
        from torchvision import models

        for weights in models.get_model_weights(self.model):
            names: list[str] = weights.meta.get("categories", [])
            if len(names) == self.num_classes:
                return list(names)
        return []

    def random(self) -> Pretrained:
        """Returns weights as torchvision initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        # Standardised images have about mean 0 and variance 1.
        side = self._preprocessing().side
        noise_B = torch.randn(4, 3, side, side)
        if self.maps is not None:
            architecture = self._open_maps(self._build())
            return scale_random_weights(architecture, torch.zeros(1, architecture.feature_dim), noise_B)
        network, classifier = self._split(self._build())
        return scale_random_weights(Architecture(network, classifier.in_features), classifier.weight, noise_B)

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns names such as `features.17` or `layer4`."""
        from common.backbones.parts.boundary import list_blocks

        return [] if self.maps is not None else list_blocks(network)

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a block. Raises BadInput where the model is not a chain up to there."""
        from common.backbones.parts.boundary import divide_chain

        side = self._preprocessing().side
        return divide_chain(network, block, (3, side, side))

    def preprocess(self, item: Any) -> Tensor:
        """Returns 3 x H x W pixels of a PIL image or uint8 array; grey is repeated. Raises BadRecord."""
        return self._preprocessing().apply(item)

    def _open_maps(self, model: nn.Module) -> Architecture:
        from common.backbones.parts.maps import MapNetwork
        from common.backbones.parts.raw import open_pixels

        assert self.maps is not None  # The caller has looked.
        if self._preprocessing().crop is not None:
            raise BadInput(
                "preprocess: expected settings with `crop: null` beside maps: masks are of the whole picture"
            )
        network = MapNetwork(model.train(False), self.maps, self._preprocessing().side)
        grid, settings = (self.maps.grid, self.maps.grid), self._preprocessing()
        return Architecture(network, network.feature_dim, open_raw=lambda: open_pixels(settings), grid=grid)

    def _preprocessing(self) -> ImagePreprocessing:
        return self.preprocess_settings or ImagePreprocessing.of_weights(self._named_weights())

    def _build(self) -> nn.Module:
        from torchvision import models

        options = list_options(self.model, self._preprocessing().side)
        model: nn.Module = models.get_model(self.model, weights=None, num_classes=self.num_classes, **options)
        return model

    def _named_weights(self) -> WeightsEnum:
        from torchvision import models

        return models.get_model_weights(self.model)[str(self.weights)]

    def _download(self) -> dict[str, Tensor]:
        from torchvision import models

        try:
            # Through the model: torchvision renames some old files' tensors while loading.
            model: nn.Module = models.get_model(self.model, weights=self._named_weights())
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"weights: expected to download {self.weights} of {self.model}, got {type(error).__name__}; "
                "give a local file instead"
            ) from error
        return dict(model.state_dict())

    def _read_parts(self, model: nn.Module) -> Pretrained:
        from common.backbones.parts.projection import predict_shift

        network, classifier = self._split(model)
        shift_D = predict_shift(network)
        if shift_D is not None and len(shift_D) != classifier.in_features:
            shift_D = None
        return Pretrained(network.state_dict(), classifier.weight.detach(), shift_D)

    def _check_classes(self, own: dict[str, Tensor], name: str, classifier: nn.Linear) -> None:
        """Raises BadInput where weights' classifier has another number of classes."""
        weight_KD = own.get(f"{name}.weight")
        if weight_KD is not None and weight_KD.ndim == 2 and len(weight_KD) != classifier.out_features:
            raise BadInput(
                f"num_classes: expected {len(weight_KD)}, as the classifier of {self.weights} has, got "
                f"{classifier.out_features}"
            )

    def _split(self, model: nn.Module) -> tuple[nn.Module, nn.Linear]:
        from torch import nn

        name, classifier = self._find_classifier(model)
        model.set_submodule(name, nn.Identity())
        return model, classifier

    def _find_classifier(self, model: nn.Module) -> tuple[str, nn.Linear]:
        from torch import nn

        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear or linear[-1][1].out_features != self.num_classes:
            raise BadInput(f"model: expected one that ends in a linear classifier, got {self.model!r}")
        return linear[-1]


def list_options(model: str, side: int) -> dict[str, Any]:
    """Returns the options with which torchvision builds a model for pictures of a size."""
    if model in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers serve training only, and their weights expect inputs scaled in another way.
        return {"aux_logits": False, "transform_input": True, "init_weights": False}
    if model.startswith("vit_"):
        return {"image_size": side}
    if model.startswith("maxvit_"):
        return {"input_size": (side, side)}
    return {}


def list_weights(model: str) -> list[str]:
    """Returns the names of the weights of one of torchvision's models, sorted. Raises BadInput where it is none."""
    names = _read_names()
    if not names.get(model):
        raise BadInput(f"--backbone {model}: expected a torchvision model, a file or a folder{nearest(model, names)}")
    return sorted(names[model])


@cache
def _read_names() -> dict[str, frozenset[str]]:
    """Returns the names of torchvision's models, each with the names of its weights, as far as its source text shows.

    Importing torchvision takes seconds. What this finds is known to torchvision; what it does not find is asked there.
    """
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    paths = sorted(Path(next(iter(folders)), "models").glob("*.py")) if folders else []
    texts = [path.read_text(encoding="utf-8") for path in paths]
    enums: dict[str, frozenset[str]] = {}
    for text in texts:
        for name, body in re.findall(r"^class (\w+)\(WeightsEnum\):\n((?:(?: .*)?\n)*)", text, re.MULTILINE):
            enums[name] = frozenset(re.findall(r"^    (\w+) = ", body, re.MULTILINE))
    found = (re.findall(_REGISTERED, text, re.MULTILINE) for text in texts)
    return {model: enums.get(enum, frozenset()) for pairs in found for model, enum in pairs}
