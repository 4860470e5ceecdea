"""A frozen encoder of texts with a small decoder of its own behind it, which writes texts: translations, for example.

The decoder and its vocabulary come from public pairs of texts alone (`headwater simulate pretrain`). Features follow
from a record's source and, where it has one, from its text: each place of that holds the state from which its token is
told behind the true ones (`common.tasks.seq2seq`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from common.backbones import (
    Architecture,
    Example,
    Kind,
    Pretrained,
    draw_random,
    list_weights_paths,
    read_pretrained,
    resolve_settings,
)
from common.files import write_atomic
from common.inputs import Text
from common.plugins import LocalPath, Plugin, Spec, plugin_class, resolve
from common.types import BadInput, WeightsNeeded

if TYPE_CHECKING:
    from torch import Tensor

    from common.backbones.parts.language.writer import Writer

ENCODER, VOCABULARY = "encoder.", "vocabulary"
_MAX_VOCABULARY_BYTES = 16 << 20

Width = Annotated[int, Field(ge=1, le=8192)]


@final
class Seq2seqBackbone(Plugin):
    """Settings of an encoder and its decoder.

    Attributes:
        encoder: a backbone of texts, such as kind `transformers` with `modality: text`; its `max_length` is that of a
            source.
        weights: safetensors file of the decoder and its vocabulary, which `headwater simulate pretrain` writes.
        max_tokens: largest number of a text's tokens, with the one that ends it; records with longer ones are bad.
        vocabulary: number of tokens.
        width: width of the decoder.
        layers: number of its layers.
        heads: number of heads of its attention.
        hidden: width of the layers in between.
        projection: none: the states are as long as each other.
        vocabulary_bytes: length of the vocabulary's file; filled in for the sites, never written by hand.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    encoder: Annotated[Spec, WithJsonSchema({"type": "object", "additionalProperties": {}})]
    weights: LocalPath | None = None
    max_tokens: Annotated[int, Field(ge=2, le=1024)] = 40
    vocabulary: Annotated[int, Field(ge=4, le=65536)] = 4000
    width: Width = 192
    layers: Annotated[int, Field(ge=1, le=24)] = 2
    heads: Annotated[int, Field(ge=1, le=64)] = 6
    hidden: Width = 512
    projection: None = None
    vocabulary_bytes: Annotated[int, Field(ge=0, le=_MAX_VOCABULARY_BYTES)] | None = None

    @field_validator("encoder")
    @classmethod
    def _make_paths_absolute(cls, encoder: Spec) -> Spec:
        # Its paths are those of the file that it was read from.
        kind: Kind = resolve("common.backbones", encoder, "encoder")
        return Spec(**kind.model_dump(mode="json", by_alias=True, exclude_unset=True))

    @model_validator(mode="after")
    def _check(self) -> Seq2seqBackbone:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny BERT, a decoder with random weights, and the vocabulary of four sentences."""
        import torch

        from common.backbones.parts.language.vocabulary import make_vocabulary

        of_texts: Any = plugin_class("common.backbones", "transformers")
        encoder = of_texts.example(folder)
        texts = ["der Befund ist gut .", "ein Schatten .", "der Schatten ist kein Befund .", "kein Schatten ist gut ."]
        sizes = {"max_tokens": 18, "vocabulary": 40, "width": 12, "layers": 2, "heads": 3, "hidden": 20}
        settings = {"kind": "seq2seq", "encoder": dict(encoder.settings), **sizes}
        settings["weights"] = str(folder / "seq2seq.safetensors")
        own = cls.model_validate(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own.save(own.build(make_vocabulary(texts, 40)), {})
        items = [Text(item.first, text) for item, text in zip(encoder.items, texts, strict=True)]
        return Example(settings, [*items, Text(texts[0])])

    def resolved(self) -> Seq2seqBackbone:
        """Returns settings with those of the encoder resolved, without the place of the weights."""
        if self.weights is None and self.vocabulary_bytes is not None:
            return self
        encoder = resolve_settings(self._open_encoder()).model_dump(mode="json", by_alias=True)
        length = len(self._read_weights()[VOCABULARY])
        return self.model_copy(update={"encoder": Spec(**encoder), "weights": None, "vocabulary_bytes": length})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the file of the decoder and those of the encoder; None where the encoder's are elsewhere."""
        paths = list_weights_paths(self._open_encoder())
        return paths if paths is None or self.weights is None else [*paths, self.weights]

    def architecture(self) -> Architecture:
        """Returns an encoder and a decoder, sources and texts -> places of texts, then of sources."""
        from common.backbones.parts.language.writer import WriterLanguage, open_raw_sources

        writer = self._build(self.vocabulary_bytes or 0)
        grid, language = (self.max_tokens + writer.modality.max_length,), WriterLanguage(writer)
        open_raw = partial(open_raw_sources, writer)
        return Architecture(writer, self.width + 1, writer.preprocess, open_raw, grid, num_marks=1, language=language)

    def pretrained(self) -> Pretrained:
        """Returns the encoder's weights, the decoder's and the vocabulary."""
        encoder = self._open_encoder()
        state = {f"{ENCODER}{name}": tensor for name, tensor in read_pretrained(encoder).state.items()}
        own = self._read_weights()
        self._check_vocabulary(own[VOCABULARY])
        return Pretrained({**state, **own})

    def random(self) -> Pretrained:
        """Returns random weights with the vocabulary as it is."""
        encoder = self._open_encoder()
        vocabulary = self._read_weights()[VOCABULARY]
        writer = self._build(len(vocabulary))
        state = {f"{ENCODER}{name}": tensor for name, tensor in draw_random(encoder).state.items()}
        drawn = {name: tensor for name, tensor in writer.state_dict().items() if not name.startswith(ENCODER)}
        return Pretrained({**drawn, **state, VOCABULARY: vocabulary})

    def preprocess(self, item: Any) -> Tensor:
        """Raises WeightsNeeded: both vocabularies travel with the weights."""
        raise WeightsNeeded("expected the backbone's weights: its tokenizer travels with them")

    def build(self, vocabulary: bytes) -> Writer:
        """Returns the pre-trained encoder with a new decoder, drawn from torch's current generator.

        Raises:
            BadInput: the encoder cannot be opened, or the vocabulary has another number of tokens or lacks some.
        """
        import torch

        from common.backbones.parts.weights import load_strict

        data = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
        self._check_vocabulary(data)
        writer = self._build(len(data))
        load_strict(writer.encoder, read_pretrained(self._open_encoder()).state, "encoder: weights")
        writer.vocabulary.copy_(data)
        return writer

    def save(self, writer: Writer, metadata: Mapping[str, str]) -> None:
        """Writes a decoder and its vocabulary to the file of the weights. Raises BadInput: none is named."""
        from safetensors.torch import save

        if self.weights is None:
            raise BadInput("weights: expected a file to write the weights to, got nothing")
        state = {name: values for name, values in writer.state_dict().items() if not name.startswith(ENCODER)}
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.weights, save(state, metadata=dict(metadata)))

    def _build(self, vocabulary_bytes: int) -> Writer:
        from common.backbones.parts.language.decoder import Decoder
        from common.backbones.parts.language.writer import Writer
        from common.backbones.parts.layers import PooledModel, read_width

        encoder = resolve_settings(self._open_encoder()).architecture().module
        if not isinstance(encoder, PooledModel) or not encoder.tokenizer_bytes:
            raise BadInput("encoder: expected a backbone of kind transformers with `modality: text`")
        decoder = Decoder(
            self.vocabulary,
            2 * read_width(encoder.model, encoder.model.config),
            self.max_tokens,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
        )
        return Writer(encoder, decoder, self.max_tokens, vocabulary_bytes)

    def _check_vocabulary(self, data: Tensor) -> None:
        from common.backbones.parts.language.vocabulary import Vocabulary

        size = Vocabulary(data.numpy().tobytes()).size
        if size > self.vocabulary:
            raise BadInput(f"vocabulary: expected {size}, as the weights have tokens, got {self.vocabulary}")

    def _open_encoder(self) -> Kind:
        encoder: Kind = resolve("common.backbones", self.encoder, "encoder")
        return encoder

    def _read_weights(self) -> dict[str, Tensor]:
        from common.backbones.parts.weights import read_state

        if self.weights is None:
            raise BadInput("weights: expected the file that `headwater simulate pretrain` writes, got nothing")
        if not self.weights.exists():
            raise BadInput(f"weights: found no file at {self.weights}; run `headwater simulate pretrain CONFIG` first")
        state = read_state(self.weights)
        if VOCABULARY not in state:
            raise BadInput(f"weights: expected a vocabulary in {self.weights}, found none")
        return state
