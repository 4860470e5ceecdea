"""A pre-trained encoder-decoder of the transformers library, such as Whisper, Marian or T5, which writes texts.

The encoder is frozen, and a record's features are what it says of a recording or of a text. The decoder reads them in
the head of a task (`common.tasks.seq2seq`), where a part of it may train. Settings, weights and the tokenizer travel as
those of kind `transformers` do: no path, no pickle, no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, StringConstraints, model_validator

from common.backbones import Architecture, Example, Pretrained
from common.errors import instead
from common.inputs import Text
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput, WeightsNeeded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from common.backbones.parts.hub.huggingface import Location
    from common.backbones.parts.language.whole import WholeModel

HubName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
_MAX_TOKENIZER_BYTES = 64 << 20
_NO_TIMES = "<|notimestamps|>"
_TOLERANCE = 1e-3


class ModelFiles(Frozen):
    """The settings of a model's folder besides its weights; read by `resolved`, not meant to be written by hand.

    Attributes:
        config: of the architecture.
        processor: of recordings; null of a model that reads texts.
        tokenizer_bytes: length of the tokenizer, which travels with the weights.
        prefix: tokens before every text that is written.
    """

    config: dict[str, Any]
    processor: dict[str, Any] | None = None
    tokenizer_bytes: Annotated[int, Field(ge=1, le=_MAX_TOKENIZER_BYTES)]
    prefix: Annotated[list[int], Field(min_length=1, max_length=64)]


@final
class EncoderDecoder(Plugin):
    """Settings of an encoder-decoder. Exactly one of `model` and `folder`.

    Attributes:
        model: a name on the Hub; downloaded and cached by transformers, unless `local_files_only`.
        revision: commit, tag or branch of that name; give a commit to name one model for ever.
        folder: a local folder with config.json, model.safetensors, tokenizer.json and, of recordings,
            preprocessor_config.json.
        local_files_only: whether a name must be in the cache already.
        max_tokens: largest number of a text's tokens, with the one that ends it; records with longer ones are bad.
        seconds: length of the longest recording; records with longer ones are bad.
        max_length: of a source that is a text, in tokens; longer ones are cut.
        prompt: what stands in front of every source that is a text, such as `translate English to German: `.
        prefix: tokens behind the model's own first one and before every text, such as `<|de|>`; by default
            `<|notimestamps|>` where the tokenizer has it, and else none.
        projection: none: the decoder reads what the encoder says as it is.
        files: what the model's folder says besides its weights; filled in for the sites, never written by hand.
    """

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    model: HubName | None = None
    revision: str | None = None
    folder: LocalPath | None = None
    local_files_only: bool = False
    max_tokens: Annotated[int, Field(ge=2, le=1024)] = 40
    seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    max_length: Annotated[int, Field(ge=2, le=32768)] = 128
    prompt: Annotated[str, Field(max_length=2048)] = ""
    prefix: Annotated[list[str], Field(max_length=16)] | None = None
    projection: None = None
    files: ModelFiles | None = None

    @model_validator(mode="after")
    def _one_place(self) -> EncoderDecoder:
        if sum(place is not None for place in (self.model, self.folder, self.files)) != 1:
            raise ValueError("expected exactly one of model (a name) and folder")
        if self.model is None and (self.revision is not None or self.local_files_only):
            raise ValueError("revision, local_files_only: expected them only beside a `model`")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny Marian with random weights and a vocabulary of twelve words."""
        import tokenizers
        import torch
        from transformers import MarianConfig, MarianMTModel

        from common.backbones.parts.hub.huggingface import silence

        words = ["</s>", "<unk>", "<pad>", "the", "scan", "shows", "no", "tumour", "an", "edema", "."]
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
        tokenizer.add_special_tokens(words[:3])
        tokenizer.save(str(folder / "tokenizer.json"))
        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32, "dropout": 0.1}
        more = {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
        more |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        numbers = {"pad_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 0}
        config = MarianConfig(vocab_size=len(words), init_std=0.5, scale_embedding=True, **sizes, **more, **numbers)
        with torch.random.fork_rng(devices=[]), silence():
            torch.manual_seed(0)
            whole = MarianMTModel(config)
            whole.final_logits_bias.normal_()
            whole.save_pretrained(folder)
        sources = ["the scan shows no tumour .", "an edema .", "the scan shows an edema .", "no edema ."]
        targets = ["no tumour .", "an edema .", "the scan shows an edema .", "no edema no edema"]
        items = [Text(*pair) for pair in zip(sources, targets, strict=True)]
        settings = {"kind": "encoder_decoder", "folder": str(folder), "max_tokens": 8, "max_length": 12}
        return Example(settings, [*items, Text(sources[0])])

    def resolved(self) -> EncoderDecoder:
        """Returns settings with the content of the folder's files and without its place.

        Settings of the other kind of source are set back to their defaults.
        """
        if self.files is not None:
            return self
        files = self._read()
        other = {"max_length", "prompt"} if files.processor is not None else {"seconds"}
        gone: dict[str, Any] = {name: type(self).model_fields[name].default for name in other}
        gone |= {"model": None, "folder": None, "revision": None, "local_files_only": False, "prefix": None}
        return self.model_copy(update={**gone, "files": files})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the model's folder; None of a name on the Hub, where the weights may change."""
        return None if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns the model as transformers builds it from its configuration. Raises BadInput."""
        import torch

        from common.backbones.parts.hub.huggingface import read_config, silence
        from common.backbones.parts.language.whole_language import WholeLanguage

        own = self.resolved()
        assert own.files is not None  # `resolved` fills it in.
        config = read_config(own.files.config)
        try:
            with silence():
                whole = _choose_class(config).from_config(config, trust_remote_code=False, dtype=torch.float32)
        except (ImportError, ValueError) as error:
            raise BadInput(f"model: expected one that transformers can build{instead(error)}") from error
        module = own._wrap(whole, own.files)
        language = WholeLanguage(module)
        return Architecture(
            module, module.width + 1, module.preprocess, grid=(module.places,), num_marks=1, language=language
        )

    def pretrained(self) -> Pretrained:
        """Returns the model's weights and its tokenizer, once they are seen to tell what the model itself does."""
        from common.backbones.parts.hub.huggingface import load_model, read_config

        location, files = self._locate(), self._read()
        config = read_config(files.config)
        whole, missing = load_model(location, config, _choose_class(config))
        module = self._wrap(whole, files)
        # Positions that follow from a formula are not always kept.
        absent = sorted(name for name in missing if "positions" not in name)
        if absent:
            raise BadInput(
                f"folder: expected weights of the whole model, found none for {len(absent)} tensors "
                f"(first: {absent[0]})"
            )
        module.tokenizer.copy_(self._read_tokenizer())
        _check_told(whole, module)
        return Pretrained(dict(module.state_dict()))

    def random(self) -> Pretrained:
        """Returns weights as transformers initialises them, with the model's own tokenizer."""
        module = self.architecture().module
        module.get_buffer("tokenizer").copy_(self._read_tokenizer())
        return Pretrained(dict(module.state_dict()))

    def preprocess(self, item: Any) -> Tensor:
        """Raises WeightsNeeded: the tokenizer travels with the weights, and the model says how long its frames are."""
        raise WeightsNeeded("expected the backbone's weights: its tokenizer travels with them")

    def _locate(self) -> Location:
        from common.backbones.parts.hub.huggingface import Location

        name = self.folder or self.model
        if name is None:
            raise BadInput("model: expected a name or a folder, got nothing")
        return Location(name, self.revision, self.local_files_only)

    def _read(self) -> ModelFiles:
        from common.backbones.parts.hub.huggingface import read_config

        location = self._locate()
        values = location.settings("config.json")
        if values is None:
            raise BadInput(f"folder: expected a config.json at {location.name}, found none")
        config = read_config(values)
        _choose_class(config)
        processor = None
        if _hears(config):
            processor = location.settings("preprocessor_config.json", "processor_config.json")
            if processor is None:
                raise BadInput(f"folder: expected a preprocessor_config.json at {location.name}, found none")
            inner = processor.get("feature_extractor")
            processor = inner if isinstance(inner, dict) else processor
        tokenizer = self._read_tokenizer()
        return ModelFiles(
            config=values,
            processor=processor,
            tokenizer_bytes=len(tokenizer),
            prefix=self._find_prefix(config, tokenizer),
        )

    def _read_tokenizer(self) -> Tensor:
        import torch

        from common.backbones.parts.hub.huggingface import read_tokenizer

        return torch.frombuffer(bytearray(read_tokenizer(self._locate())), dtype=torch.uint8)

    def _find_prefix(self, config: PretrainedConfig, tokenizer: Tensor) -> list[int]:
        """Returns the tokens before every text. Raises BadInput: the tokenizer lacks one that is needed."""
        import tokenizers

        opened = tokenizers.Tokenizer.from_buffer(tokenizer.numpy().tobytes())
        needed = {"pad_token_id": "padding", "eos_token_id": "the end of a text"}
        if not _hears(config):
            needed["decoder_start_token_id"] = "the beginning of a text"
        for key, what in needed.items():
            token = getattr(config, key, None)
            if not isinstance(token, int) or opened.id_to_token(token) is None:
                raise BadInput(
                    f"folder: expected a tokenizer with a token for {what}, `{key}` of config.json, got none"
                )
        names = self.prefix
        if names is None:
            names = [_NO_TIMES] if opened.token_to_id(_NO_TIMES) is not None else []
        found = [opened.token_to_id(name) for name in names]
        if None in found:
            raise BadInput(f"prefix: expected tokens of the model's tokenizer, got {names[found.index(None)]!r}")
        return [int(config.decoder_start_token_id), *(token for token in found if token is not None)]

    def _wrap(self, whole: PreTrainedModel, files: ModelFiles) -> WholeModel:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        from common.backbones.parts.hub.frames import FrameInput, FrameRates
        from common.backbones.parts.hub.modalities import TextInput, open_feature_extractor
        from common.backbones.parts.language.whole import WholeModel
        from common.backbones.parts.layers import count_positions

        config = whole.config
        module = WholeModel(whole, files.prefix, int(config.eos_token_id), files.tokenizer_bytes)
        module.longest = self.max_tokens
        most = getattr(config, "max_target_positions", None) or count_positions(module.decoder.model, config)
        if most is not None and len(files.prefix) + self.max_tokens - 1 > most:
            raise BadInput(f"max_tokens: expected at most {most - len(files.prefix) + 1} for this model")
        if files.processor is not None:
            if not isinstance(module.encoder, WhisperEncoder):
                raise BadInput(f"model: expected Whisper as a model that hears, got {config.model_type}")
            extractor = open_feature_extractor(files.processor)
            module.modality = FrameInput(extractor, FrameRates.of(module.encoder, extractor, self.seconds, 1))
            module.places = module.modality.rates.places
            return module
        module.places = min(self.max_length, count_positions(module.encoder, config) or self.max_length)
        pad = int(config.pad_token_id)
        module.modality = TextInput(
            module.open_source_tokenizer, module.places, config.vocab_size, pad, False, self.prompt
        )
        return module


def _hears(config: PretrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    return config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES


def _choose_class(config: PretrainedConfig) -> Any:
    """Returns the class of transformers that builds a whole model. Raises BadInput: it writes no texts."""
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    if _hears(config):
        return AutoModelForSpeechSeq2Seq
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    raise BadInput(f"model: expected an encoder-decoder, such as whisper, marian or t5, got {config.model_type}")


def _check_told(whole: nn.Module, module: WholeModel) -> None:
    """Raises BadInput where the parts do not tell what a model itself does of two public sources."""
    import torch

    with torch.no_grad():
        width, places = module.width, 6
        values = torch.cos(0.37 * torch.arange(2 * places * width, dtype=torch.float32)).view(2, places, width)
        features_BPM = torch.nn.functional.pad(values, (0, 1), value=1.0)
        decoder = module.decoder.train(False)
        before_BT = torch.tensor([decoder.prefix[-1], *([module.end] * 2)]).expand(2, -1)
        states_BTD = decoder(features_BPM, before_BT)[..., :-1]
        told_BTV = states_BTD @ module.told_VD.T + module.told_bias
        ids_BT = torch.cat([torch.tensor(decoder.prefix[:-1], dtype=torch.long).expand(2, -1), before_BT], dim=1)
        given = {"encoder_outputs": (values,), "decoder_input_ids": ids_BT}
        whole_BTV = whole(**given).logits[:, -before_BT.shape[1] :]
        distance = float((told_BTV - whole_BTV).norm() / whole_BTV.norm().clamp(min=1e-6))
    if not distance <= _TOLERANCE:
        raise BadInput("model: expected one whose decoder's states tell tokens by one linear layer, got another")
