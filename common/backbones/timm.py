"""Any picture encoder of the timm library: by name, from the Hub, or from a folder as such models are published.

A published folder has config.json, which names the architecture and its preprocessing, and model.safetensors. What
travels is the architecture's name with its arguments as plain values, and the weights as tensors: a site builds the
network from its own timm, which must be installed there too (`pip install "headwater[timm]"`).

# Shapes: B pictures, T tokens, D features, K classes of the pre-training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, StringConstraints, field_validator, model_validator

from common.backbones import Architecture, Divided, Example, Maps, Pretrained, Projection
from common.backbones.parts.images import ImagePreprocessing
from common.errors import nearest
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor, nn

Name = Annotated[str, StringConstraints(pattern=r"^(hf-hub:[\w.-]+/)?[\w.-]+$")]
Value = str | bool | int | float | None
Options = dict[Annotated[str, StringConstraints(pattern=r"^[a-z_0-9]+$")], Value | list[Value]]

_OWN = ("features_only", "out_indices", "num_classes", "in_chans", "exportable", "no_jit", "scriptable", "device")
_READS_FILES = ("pretrained", "checkpoint", "cache", "weight_init")
_LAYERS = ("GluMlp", "Mlp", "SwiGLU", "SwiGLUPacked")


@final
class Timm(Plugin):
    """Settings of a timm model. Exactly one of `model` and `folder`.

    Attributes:
        model: timm's name of an architecture, perhaps with a tag, such as `vit_small_patch16_224.dino`; or
            `hf-hub:OWNER/NAME`. It is downloaded and cached by timm where no `weights` are named.
        folder: a local folder with config.json and model.safetensors.
        weights: a local `.safetensors`, `.pth` or `.pt` file of the whole model; only beside an architecture's name.
        names: whether tensors of `weights` are found by their names, or taken in their order, which is refused where
            any shape differs: for files that have the same network under other names.
        options: arguments of the architecture beyond those of config.json, such as `{mlp_layer: SwiGLUPacked,
            act_layer: silu}`; the model's card says them.
        preprocess: how a picture becomes an input; without it, as the model's own configuration says.
        pooling: `model` takes the model's own features, `cls` its first token, `mean` the mean of the tokens of places,
            `cls_mean` both, one after the other.
        projection: what happens to the features before they leave the backbone.
        maps: layers whose outputs at each place are the features, for tasks that label places; null takes the features
            of the whole picture.
    """

    kind: Literal["timm"] = "timm"
    model: Name | None = None
    folder: LocalPath | None = None
    weights: LocalPath | None = None
    names: Literal["given", "order"] = "given"
    options: Options = Field(default_factory=dict)
    preprocess_settings: ImagePreprocessing | None = Field(default=None, alias="preprocess")
    pooling: Literal["model", "cls", "mean", "cls_mean"] = "model"
    projection: Projection | None = None
    maps: Maps | None = None

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: Options) -> Options:
        for name in options:
            if name in _OWN or name.startswith(_READS_FILES):
                raise ValueError(f"expected arguments of the architecture, got {name!r}, which is not read here")
        layer = options.get("mlp_layer", _LAYERS[0])
        if layer not in _LAYERS:
            raise ValueError(f"mlp_layer: expected one of {', '.join(_LAYERS)}, got {layer!r}")
        return options

    @model_validator(mode="after")
    def _check_places(self) -> Timm:
        if (self.model is None) == (self.folder is None):
            raise ValueError("expected exactly one of model (a name) and folder")
        if self.weights is not None and (self.model is None or self.model.startswith("hf-hub:")):
            raise ValueError("weights: expected a file only beside a `model` that names an architecture of timm")
        if self.names == "order" and self.weights is None:
            raise ValueError("names: expected `order` only beside `weights`")
        if self.maps is not None and self.pooling != "model":
            raise ValueError("pooling: expected `model` beside maps, which read layers")
        if self.maps is not None and self.projection is not None and self.projection.dim is not None:
            raise ValueError("projection.dim: expected null beside maps: no classifier has rows for places")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny vision transformer with random weights in a folder as published ones, and random pictures."""
        import torch
        from safetensors.torch import save_file

        timm = _import_timm()
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
            for values in model.parameters():
                if values.dim() > 1:
                    # timm's own weights are so small that different pictures have nearly the same features.
                    torch.nn.init.normal_(values, std=0.3)
            save_file(model.state_dict(), folder / "model.safetensors")
        cfg = {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "head"}
        content = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": cfg, "model_args": sizes}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
        settings = {"kind": "timm", "folder": str(folder), "projection": {"dim": 4, "normalize": True}}
        return Example(settings, list(pixels))

    def resolved(self) -> Timm:
        """Returns the architecture's name without a tag, all of its arguments, explicit preprocessing, no location."""
        name, options, cfg = self._read()
        gone = {"folder": None, "weights": None, "names": "given"}
        preprocess = self._preprocessing(cfg)
        return self.model_copy(update={**gone, "model": name, "options": options, "preprocess_settings": preprocess})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the file or folder that is read; None of a name, whose weights are elsewhere."""
        path = self.weights or self.folder
        return None if path is None else [path]

    def architecture(self) -> Architecture:
        """Returns the model without its classifier, its pooled tokens, or its maps."""
        from common.backbones.parts.raw import open_pixels

        name, options, cfg = self._read()
        model, settings = _build(name, options, 0), self._preprocessing(cfg)
        open_raw = _Opener(open_pixels, settings)
        if self.maps is not None:
            from common.backbones.parts.maps import MapNetwork

            if settings.crop is not None:
                raise BadInput("preprocess: expected `crop: null` beside maps: masks are of the whole picture")
            network = MapNetwork(model.train(False), self.maps, settings.side)
            return Architecture(network, network.feature_dim, open_raw=open_raw, grid=(self.maps.grid, self.maps.grid))
        if self.pooling != "model":
            from common.backbones.parts.hub.picture_tokens import PooledTokens

            pooled = PooledTokens(model, self.pooling)
            return Architecture(pooled, pooled.feature_dim, open_raw=open_raw)
        if options.get("global_pool") == "":
            raise BadInput("pooling: expected cls, mean or cls_mean for a model that does not pool its tokens itself")
        width = getattr(model, "head_hidden_size", None) or model.num_features
        return Architecture(model, int(width), open_raw=open_raw)  # type: ignore[arg-type]

    def pretrained(self) -> Pretrained:
        """Returns the weights, split into network and classifier."""
        from torch import nn

        from common.backbones.parts.projection import predict_shift
        from common.backbones.parts.weights import load_strict

        name, options, cfg = self._read()
        full = self._read_weights(name, options, cfg)
        classifier = full.get_classifier()  # type: ignore[operator]
        linear = classifier.weight.detach() if isinstance(classifier, nn.Linear) else None
        full.reset_classifier(0)  # type: ignore[operator]
        architecture = self.architecture()
        if self.maps is not None:
            from common.backbones.parts.maps import MapNetwork

            network: nn.Module = MapNetwork(full.train(False), self.maps, self._preprocessing(cfg).side)
            return Pretrained(network.state_dict())
        prefix = "" if self.pooling == "model" else "model."
        load_strict(
            architecture.module,
            {f"{prefix}{key}": value for key, value in full.state_dict().items()},
            f"weights: {self.model or self.folder}",
        )
        fits = linear is not None and linear.shape[1] == architecture.feature_dim
        shift_D = predict_shift(architecture.module)
        known = shift_D is not None and len(shift_D) == architecture.feature_dim
        return Pretrained(architecture.module.state_dict(), linear if fits else None, shift_D if known else None)

    def random(self) -> Pretrained:
        """Returns weights as timm initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        side = self._preprocessing(self._read()[2]).side
        classifier = torch.nn.Linear(architecture.feature_dim, architecture.feature_dim + 1)
        return scale_random_weights(architecture, classifier.weight, torch.randn(4, 3, side, side))

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns a transformer's blocks, such as `blocks.11`, or the parts of a chain, such as `stages.3`."""
        from common.backbones.parts.hub.picture_tokens import list_picture_blocks

        return [] if self.maps is not None else list_picture_blocks(network)

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a block. Raises BadInput where the model cannot be divided there."""
        from common.backbones.parts.hub.picture_tokens import divide_picture_model

        side = self._preprocessing(self._read()[2]).side
        return divide_picture_model(network, block, (3, side, side))

    def preprocess(self, item: Any) -> Tensor:
        """Returns 3 x H x W pixels of a PIL image or uint8 array; grey is repeated. Raises BadRecord."""
        settings = self.preprocess_settings or self._preprocessing(self._read()[2])
        return settings.apply(item)

    def _read(self) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
        """Returns the architecture's name, all of its arguments, and the configuration of its weights."""
        timm = _import_timm()
        args: dict[str, Any] = {}
        if self.folder is not None:
            name, cfg, args = _read_folder(self.folder)
        elif self.model is not None and self.model.startswith("hf-hub:"):
            name, cfg, args = _read_hub(timm, self.model.removeprefix("hf-hub:"))
        else:
            assert self.model is not None  # The settings have exactly one place.
            name, cfg = self.model, {}
        architecture = name.partition(".")[0]
        known = timm.list_models()
        if architecture not in known:
            raise BadInput(
                f"model: expected an architecture of timm, got {architecture!r}{nearest(architecture, known)}"
            )
        try:
            default = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            tags = [each for each in timm.list_pretrained(f"{architecture}*") if each.startswith(f"{architecture}.")]
            raise BadInput(f"model: expected one of {', '.join(tags)}, got {name!r}") from error
        usual = default.to_dict() if default is not None else {}
        cfg = {**usual, **cfg}
        if cfg.get("input_size", [3])[0] != 3 or args.get("in_chans", 3) != 3:
            raise BadInput("model: expected one that reads red, green and blue; others are not read here")
        # Written out: a site has but the architecture's name, and whatever its timm takes for granted.
        if (cfg.get("fixed_input_size") or usual.get("fixed_input_size")) and "img_size" not in {
            **args,
            **self.options,
        }:
            args["img_size"] = list(cfg["input_size"][1:])
        if cfg.get("global_pool") is not None:
            args.setdefault("global_pool", cfg["global_pool"])
        options = {key: value for key, value in {**args, **self.options}.items() if key not in _OWN}
        try:
            self._check_options(options)
        except ValueError as error:
            raise BadInput(f"options: {error}") from error
        return architecture, options, cfg

    def _preprocessing(self, cfg: Mapping[str, Any]) -> ImagePreprocessing:
        return self.preprocess_settings or _read_preprocessing(cfg)

    def _read_weights(self, name: str, options: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        num_classes = int(cfg.get("num_classes") or 0)
        if self.weights is not None:
            model = _build(name, options, num_classes)
            state = read_state(self.weights)
            source = f"weights: {self.weights}"
            fit = _take_in_order if self.names == "order" else fit_names
            load_strict(model, fit(state, model, source), source)
            return model
        if self.folder is not None:
            # timm's own loader knows the older names of published tensors.
            return _load(f"local-dir:{self.folder}", options, num_classes, "folder")
        assert self.model is not None
        return _load(self.model, options, num_classes, "model")


@final
class _Opener:
    """Opens raw inputs later; a plain object, so that an architecture can be compared and copied."""

    def __init__(self, opener: Any, settings: ImagePreprocessing) -> None:
        self._opener, self._settings = opener, settings

    def __call__(self) -> Any:
        return self._opener(self._settings)


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise BadInput('kind: expected the timm package; run pip install "headwater[timm]"') from error
    module: ModuleType = timm
    return module


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns architecture, configuration of the weights, and arguments, as config.json says them. Raises BadInput."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values["architecture"]
        cfg = dict(values.get("pretrained_cfg") or {key: values[key] for key in values if key != "model_args"})
        if "num_classes" in values:
            cfg["num_classes"] = values["num_classes"]
        args = dict(values.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"folder: expected a config.json of timm, which names an `architecture`, at {path}") from error
    if not isinstance(name, str):
        raise BadInput(f"folder: expected a config.json of timm, which names an `architecture`, at {path}")
    return name, cfg, args


def _read_hub(timm: ModuleType, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    try:
        cfg, architecture, args = timm.models.load_model_config_from_hf(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(
            f"model: expected {name!r} in the cache or on the Hub, got {type(error).__name__}; download it, or name "
            "its `folder`"
        ) from error
    return str(architecture), dict(cfg), dict(args or {})


def _read_preprocessing(cfg: Mapping[str, Any]) -> ImagePreprocessing:
    """Returns the evaluation's preprocessing that a model's configuration states. Raises BadInput."""
    _, height, width = cfg.get("input_size") or (3, 224, 224)
    crop_pct, mode = cfg.get("crop_pct") or 0.875, cfg.get("crop_mode") or "center"
    resize = math.floor(height / crop_pct)
    whole = mode == "squash"
    if height != width or mode not in ("center", "squash") or (whole and resize != height):
        raise BadInput(
            "preprocess: expected settings, because the model's own cannot be written with those of pictures"
        )
    try:
        return ImagePreprocessing(
            resize=resize,
            crop=None if whole else height,
            mean=tuple(cfg.get("mean") or (0.485, 0.456, 0.406)),
            std=tuple(cfg.get("std") or (0.229, 0.224, 0.225)),
            interpolation=cfg.get("interpolation") or "bicubic",
        )
    except ValueError as error:
        raise BadInput("preprocess: expected settings, because the model's own cannot be read") from error


def _build(name: str, options: Mapping[str, Any], num_classes: int) -> nn.Module:
    timm = _import_timm()
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **_open(timm, options))
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, AttributeError) as error:
        raise BadInput(f"options: expected arguments that timm's {name} takes, got {type(error).__name__}") from error
    return model


def _open(timm: ModuleType, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments with the layers that they name."""
    opened = dict(options)
    if "mlp_layer" in opened:
        opened["mlp_layer"] = getattr(timm.layers, opened["mlp_layer"])
    return opened


def _load(source: str, options: Mapping[str, Any], num_classes: int, key: str) -> nn.Module:
    timm = _import_timm()
    try:
        model: nn.Module = timm.create_model(source, pretrained=True, num_classes=num_classes, **_open(timm, options))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BadInput(
            f"{key}: expected weights that fit the model's configuration, got {type(error).__name__}; name `options` "
            "that its card asks for, or a local folder with config.json and model.safetensors"
        ) from error
    return model


def _take_in_order(state: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Returns a file's tensors under a model's names, one after the other; batch counters are left out."""
    counter = "num_batches_tracked"
    given = [tensor for name, tensor in state.items() if not name.endswith(counter)]
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(counter)}
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in own.values()]:
        raise BadInput(
            f"{source} does not fit the architecture: expected {len(own)} tensors of its shapes in its order"
        )
    return dict(zip(own, given, strict=True))
