"""One tower of a model of open_clip, that of pictures or that of texts, from the Hub or from a published folder.

A published folder has open_clip_config.json and open_clip_model.safetensors. Of a model's two towers one is read; what
travels is its part of the configuration as plain values, and its weights. A site builds it from its own open_clip,
which must be installed there too (`pip install "headwater[open_clip]"`).

# Shapes: B records, L tokens, D features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from common.backbones import Architecture, Example, Pretrained, Projection
from common.backbones.parts.images import ImagePreprocessing
from common.inputs import Text
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput, BadRecord, WeightsNeeded

if TYPE_CHECKING:
    from torch import Tensor, nn

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Tower(Frozen):
    """The settings of one tower; read by `resolved`, never written by hand.

    Attributes:
        embed_dim: number of features.
        quick_gelu: whether its activation is the approximation that OpenAI's models were trained with.
        config: the tower's own part of the model's configuration.
    """

    embed_dim: Annotated[int, Field(ge=1, le=65536)]
    quick_gelu: bool = False
    config: dict[str, Any]


@final
class OpenClip(Plugin):
    """Settings of a tower of an open_clip model. Exactly one of `model` and `folder`.

    Attributes:
        model: `OWNER/NAME` on the Hub, downloaded and cached.
        revision: commit, tag or branch of that name; give a commit to name one model for ever.
        local_files_only: whether it must be in the cache already.
        folder: a local folder with open_clip_config.json and weights.
        modality: which tower: of pictures, or of texts where they are read with CLIP's own tokenizer. A text encoder of
            transformers, such as BiomedCLIP's, is read by the kind `transformers`.
        preprocess: how a picture becomes an input; without it, as the model's own configuration says.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        tower: what the model's folder says of the tower; filled in for the sites, never written by hand.
    """

    kind: Literal["open_clip"] = "open_clip"
    model: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    revision: str | None = None
    local_files_only: bool = False
    folder: LocalPath | None = None
    modality: Literal["image", "text"] = "image"
    preprocess_settings: ImagePreprocessing | None = Field(default=None, alias="preprocess")
    projection: Projection | None = None
    tower: Tower | None = None

    @model_validator(mode="after")
    def _check_places(self) -> OpenClip:
        if sum(place is not None for place in (self.model, self.folder, self.tower)) != 1:
            raise ValueError("expected exactly one of model (a name on the Hub) and folder")
        if self.model is None and (self.revision is not None or self.local_files_only):
            raise ValueError("revision, local_files_only: expected them only beside a `model`")
        if self.modality == "text" and self.preprocess_settings is not None:
            raise ValueError("preprocess: expected nothing beside `modality: text`")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns the tower of pictures of a tiny model with random weights, and random pictures."""
        import torch
        from safetensors.torch import save_file

        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        tower = Tower(embed_dim=24, config=vision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _build(tower, "image")
            state = {f"visual.{name}": tensor for name, tensor in network.state_dict().items()}
            save_file(state, folder / _WEIGHTS[0])
        content = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / _CONFIG).write_text(json.dumps(content), encoding="utf-8")
        pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), dtype=np.uint8)
        return Example({"kind": "open_clip", "folder": str(folder)}, list(pixels))

    def resolved(self) -> OpenClip:
        """Returns settings with the tower's own configuration, explicit preprocessing and no location."""
        if self.tower is not None:
            return self
        tower, preprocess = self._read()
        gone = {"model": None, "folder": None, "revision": None, "local_files_only": False}
        return self.model_copy(update={**gone, "tower": tower, "preprocess_settings": preprocess})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the folder; None of a name on the Hub, where the weights may change."""
        return None if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns the tower: pictures B x 3 x H x W, or tokens B x L, -> features B x D."""
        from functools import partial

        from common.backbones.parts.raw import open_pixels

        tower, preprocess = (self.tower, self.preprocess_settings) if self.tower is not None else self._read()
        assert tower is not None
        network = _build(tower, self.modality)
        if self.modality == "text":
            length = int(tower.config.get("context_length", 77))
            return Architecture(network, tower.embed_dim, partial(_tokenize, length=length))
        assert preprocess is not None
        return Architecture(network, tower.embed_dim, open_raw=partial(open_pixels, preprocess))

    def pretrained(self) -> Pretrained:
        """Returns the tower's weights."""
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        network = self.architecture().module
        paths = [path for path in map(self._find, _WEIGHTS) if path is not None]
        if not paths:
            raise BadInput(f"folder: expected {_WEIGHTS[0]}; pickled weights are not read: save them as safetensors")
        state = _rename(read_state(paths[0], key="folder"))
        prefix = "visual." if self.modality == "image" else "text."
        parts = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
        source = "folder: the weights"
        load_strict(network, fit_names(parts or state, network, source), source)
        return Pretrained(network.state_dict())

    def random(self) -> Pretrained:
        """Returns weights as open_clip initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture, classifier = self.architecture(), torch.nn.Linear(1, 1)
        if self.modality == "text":
            assert architecture.preprocess is not None
            noise_B = torch.stack([architecture.preprocess(Text(word)) for word in ("heart", "lung", "skin", "eye")])
        else:
            noise_B = torch.randn(4, 3, *[self._preprocessing().side] * 2)
        return scale_random_weights(architecture, classifier.weight, noise_B)

    def preprocess(self, item: Any) -> Tensor:
        """Returns pixels of a picture; a text needs the tower, which knows its length. Raises BadRecord."""
        if self.modality == "text":
            raise WeightsNeeded("expected the backbone's weights: the model says how long its texts are")
        return self._preprocessing().apply(item)

    def _preprocessing(self) -> ImagePreprocessing:
        settings = self.preprocess_settings or self._read()[1]
        assert settings is not None  # Of a tower of pictures.
        return settings

    def _find(self, name: str) -> Path | None:
        from common.backbones.parts.hub.huggingface import Location

        place = self.folder or self.model
        if place is None:
            raise BadInput("model: expected a name or a folder, got nothing")
        return Location(place, self.revision, self.local_files_only).file(name)

    def _read(self) -> tuple[Tower, ImagePreprocessing | None]:
        path = self._find(_CONFIG)
        if path is None:
            raise BadInput(f"folder: expected a file {_CONFIG}, found none")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            whole, pixels = values["model_cfg"], values.get("preprocess_cfg") or {}
            config = dict(whole["vision_cfg" if self.modality == "image" else "text_cfg"])
            tower = Tower(embed_dim=whole["embed_dim"], quick_gelu=bool(whole.get("quick_gelu")), config=config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"folder: expected a configuration of open_clip at {path}, got another one") from error
        _check_tower(tower.config, self.modality)
        if self.modality == "text":
            return tower, None
        return tower, self.preprocess_settings or _read_preprocessing(pixels, config)


def _check_tower(config: Mapping[str, Any], modality: str) -> None:
    """Refuses a tower that another library would have to fetch from elsewhere. Raises BadInput."""
    if modality == "text" and (config.get("hf_model_name") or config.get("hf_tokenizer_name")):
        raise BadInput(
            "modality: expected a tower of texts with CLIP's own tokenizer; write `kind: transformers` with the name "
            f"of the text encoder, {config.get('hf_model_name') or config.get('hf_tokenizer_name')!r}"
        )
    if not re.fullmatch(r"[\w.-]*", str(config.get("timm_model_name") or "")):
        raise BadInput("tower: expected the name of an architecture of timm, got a place from which it is fetched")


def _read_preprocessing(values: Mapping[str, Any], config: Mapping[str, Any]) -> ImagePreprocessing:
    side = values.get("size") or config.get("image_size", 224)
    sides = side if isinstance(side, list) else [side, side]
    mode = values.get("resize_mode") or "shortest"
    if sides[0] != sides[-1] or mode not in ("shortest", "squash"):
        raise BadInput("preprocess: expected settings, because the model's own cannot be written as those of pictures")
    try:
        return ImagePreprocessing(
            resize=sides[0],
            crop=sides[0] if mode == "shortest" else None,
            mean=tuple(values.get("mean") or _MEAN),
            std=tuple(values.get("std") or _STD),
            interpolation=values.get("interpolation") or "bicubic",
        )
    except ValueError as error:
        raise BadInput("preprocess: expected settings, because the model's own cannot be read") from error


def _build(tower: Tower, modality: str) -> nn.Module:
    try:
        from open_clip import model as towers
    except ImportError as error:
        raise BadInput('kind: expected the package open_clip_torch; run pip install "headwater[open_clip]"') from error
    _check_tower(tower.config, modality)
    # Never fetched from elsewhere: its weights come with the model's.
    config = {**tower.config, "timm_model_pretrained": False} if modality == "image" else dict(tower.config)
    build = towers._build_vision_tower if modality == "image" else towers._build_text_tower
    try:
        network: nn.Module = build(tower.embed_dim, config, tower.quick_gelu)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, AssertionError) as error:
        raise BadInput(f"tower: expected a configuration that open_clip builds, got {type(error).__name__}") from error
    return network


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors with those of texts under `text.`, where older files do not have it."""
    if "text_projection" not in state:
        return dict(state)
    own = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
    return {f"text.{name}" if name.startswith(own) else name: tensor for name, tensor in state.items()}


@cache
def _open_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _tokenize(item: Any, length: int) -> Tensor:
    if not isinstance(item, Text) or item.second is not None:
        raise BadRecord("expected one text")
    if not item.first.strip():
        raise BadRecord("expected a text, got an empty one")
    tokens_L: Tensor = _open_tokenizer()([item.first], context_length=length)[0]
    return tokens_L
