"""Text, pictures and recordings as inputs of a transformers model, and how the model reads a batch of them.

Inputs of one modality all have one shape, so that they stack; what is padding travels as a mask beside them. A batch is
taken apart by length before it is encoded: text only sees the little padding within its group, which its attention
mask makes exact, and a waveform sees none at all, because some audio encoders normalise over time and ignore masks.

# Shapes: B examples, L positions (tokens or samples), T output positions, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from common.backbones import RawInputs, RawTensor
from common.backbones.parts.audio import fit_length, resample
from common.backbones.parts.images import convert_to_rgb
from common.backbones.parts.raw import open_given
from common.inputs import Audio, Text
from common.types import BadInput, BadRecord

_TEXT_ROWS = 8
"""Texts of a group; the last one is filled up."""

_TEXT_STEP = 16
"""Texts whose lengths round up to the same multiple are encoded together."""


class Modality(Protocol):
    """One kind of input."""

    def preprocess(self, item: Any) -> Tensor:
        """Returns one item as one input. Raises BadRecord."""

    def noise(self, count: int) -> Tensor:
        """Returns random inputs of the size and spread of real ones, from torch's current generator."""

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields positions of inputs that can be encoded together, and those inputs without needless padding.

        Inputs that are nothing but padding may be left out. A group may have more inputs than positions: the added
        ones give it its shape, and their output is cut off.
        """

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the model's output on one group, and a mask [B, L] of the positions that count, None for all."""


@dataclass(frozen=True)
class TextInput:
    """3 x L int64: token ids, mask, token types.

    Attributes:
        tokenizer: returns the tokenizer; called when the first text comes.
        max_length: number of tokens; longer texts are cut.
        vocab_size: number of tokens that the model knows.
        pad_id: token id at padded positions.
        has_types: whether the model tells the texts of a pair apart.
    """

    tokenizer: Callable[[], tokenizers.Tokenizer]
    max_length: int
    vocab_size: int
    pad_id: int
    has_types: bool

    def preprocess(self, item: Any) -> Tensor:
        """Returns tokens of a text or of a pair."""
        if not isinstance(item, Text):
            raise BadRecord("expected a text")
        if not item.first.strip() or (item.second is not None and not item.second.strip()):
            raise BadRecord("expected a text, got an empty one")
        encoding = self.tokenizer().encode(item.first, item.second)
        if not 0 < len(encoding.ids) <= self.max_length or max(encoding.ids) >= self.vocab_size:
            raise BadRecord("expected a text of at least one token that the model knows")
        padding = (0, self.max_length - len(encoding.ids))
        rows = [torch.tensor(row) for row in (encoding.ids, encoding.attention_mask, encoding.type_ids)]
        return torch.stack([nn.functional.pad(row, padding) for row in rows])

    def noise(self, count: int) -> Tensor:
        """Returns random tokens."""
        length = min(8, self.max_length)
        ids_BL = torch.randint(self.vocab_size, (count, length))
        return torch.stack([ids_BL, torch.ones_like(ids_BL), torch.zeros_like(ids_BL)], dim=1)

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields groups of one shape by length, rounded up: a text's features do not depend on the others' lengths."""
        steps_B = ((inputs_B[:, 1].sum(1) + _TEXT_STEP - 1) // _TEXT_STEP).clamp(min=1)
        for step in sorted(set(steps_B.tolist())):
            for rows in torch.split(torch.nonzero(steps_B == step).flatten(), _TEXT_ROWS):
                filled = torch.cat([rows, rows[:1].expand(_TEXT_ROWS - len(rows))])
                yield rows, inputs_B[filled, :, : step * _TEXT_STEP]

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the output with padding masked.

        Padding is also written as the model's own padding token: some models derive positions from it.
        """
        ids_BL, mask_BL, types_BL = inputs_B.unbind(1)
        more = {"token_type_ids": types_BL} if self.has_types else {}
        ids_BL = ids_BL.masked_fill(mask_BL == 0, self.pad_id)
        return model(input_ids=ids_BL, attention_mask=mask_BL, **more), mask_BL


@dataclass(frozen=True)
class ImageInput:
    """Channels x H x W, by the model's own image processor."""

    processor: Any

    def preprocess(self, item: Any) -> Tensor:
        """Returns the pixels of a picture, made RGB first."""
        pixels: Tensor = self.processor(images=convert_to_rgb(item), return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)

    def noise(self, count: int) -> Tensor:
        """Returns standardised random pixels."""
        picture = self.preprocess(np.zeros((64, 64, 3), dtype=np.uint8))
        return torch.randn(count, *picture.shape)

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all inputs together."""
        yield torch.arange(len(inputs_B), device=inputs_B.device), inputs_B

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the output on pixels in the model's precision."""
        return model(pixel_values=inputs_B.to(_get_dtype(model))), None


@dataclass(frozen=True)
class AudioInput:
    """2 x L float32 (waveform and mask), or the spectrogram of fixed size that the model's feature extractor makes.

    Attributes:
        extractor: the model's own feature extractor.
        sample_rate: samples per second that it expects.
        num_samples: longer recordings give their middle.
        fixed: whether every recording is brought to `num_samples`.
    """

    extractor: Any
    sample_rate: int
    num_samples: int
    fixed: bool

    def preprocess(self, item: Any) -> Tensor:
        """Returns a recording, resampled, cut, and scaled as the model's extractor does."""
        samples_T = resample(item, self.sample_rate)
        if self.fixed or len(samples_T) > self.num_samples:
            samples_T = fit_length(samples_T, self.num_samples)
        inputs = self.extractor(samples_T, sampling_rate=self.sample_rate, return_tensors="pt")
        values: Tensor = inputs[self.extractor.model_input_names[0]][0].to(torch.float32)
        if values.ndim != 1:
            return values
        padding = (0, self.num_samples - len(values))
        return torch.stack([nn.functional.pad(row, padding) for row in (values, torch.ones_like(values))])

    def noise(self, count: int) -> Tensor:
        """Returns white noise."""
        samples = torch.randn(count, self.num_samples).clamp(-3, 3).numpy() / 3
        return torch.stack([self.preprocess(Audio(row, self.sample_rate)) for row in samples])

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each waveform by itself and at its exact length, so that none depends on the others."""
        if not self.is_waveform(inputs_B):
            yield torch.arange(len(inputs_B), device=inputs_B.device), inputs_B
            return
        lengths_B = inputs_B[:, 1].sum(1).long()
        for row in torch.nonzero(lengths_B > 0).flatten():
            yield row.unsqueeze(0), inputs_B[row : row + 1, :, : int(lengths_B[row])]

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the output on waveforms without their masks: nothing in them is padding any more."""
        values_B = inputs_B[:, 0] if self.is_waveform(inputs_B) else inputs_B
        return model(values_B.to(_get_dtype(model))), None

    def is_waveform(self, inputs_B: Tensor) -> bool:
        """Returns whether inputs are samples with their mask."""
        return inputs_B.ndim == 3 and inputs_B.shape[1] == 2


@final
class _Tokens(nn.Module):
    """Token ids, mask and perhaps token types, each B x L -> inputs B x 3 x L."""

    def forward(self, *rows_BL: Tensor) -> Tensor:
        untyped = [torch.zeros_like(rows_BL[0])] if len(rows_BL) == 2 else []
        return torch.stack([*rows_BL, *untyped], dim=1)


@final
class _Waveforms(nn.Module):
    """Recordings of one length, B x L -> inputs B x 2 x L."""

    def forward(self, values_BL: Tensor) -> Tensor:
        return torch.stack([values_BL, torch.ones_like(values_BL)], dim=1)


def open_raw_inputs(modality: Modality, processor: dict[str, Any] | None, tokenizer: bytes | None) -> RawInputs:
    """Returns the inputs of a transformers model, as the library names them.

    Args:
        modality: what the model reads.
        processor: content of preprocessor_config.json, of pictures and recordings.
        tokenizer: content of tokenizer.json, of texts.
    """
    if isinstance(modality, TextInput):
        return _open_tokens(modality, tokenizer or b"")
    files = {"preprocessor_config.json": json.dumps(processor, indent=2).encode()}
    last: dict[str, Any] = {"step": "processor", "file": "preprocessor_config.json", "library": "transformers"}
    if not isinstance(modality, AudioInput):
        shape = tuple(modality.preprocess(np.zeros((64, 64, 3), dtype=np.uint8)).shape)
        convert: dict[str, Any] = {"step": "convert", "mode": "RGB"}
        return open_given("pixel_values", shape, "pixels", modality.preprocess, [convert, last], files)
    steps = [
        {"step": "resample", "sample_rate": modality.sample_rate, "channels": 1, "range": [-1, 1]},
        {
            "step": "fit_length",
            "samples": modality.num_samples,
            "longer": "middle",
            "shorter": "between two silences" if modality.fixed else "as it is",
        },
        last,
    ]
    example = modality.noise(1)[0]
    name = modality.extractor.model_input_names[0]
    if not modality.is_waveform(example[None]):
        return open_given(name, tuple(example.shape), "spectra", modality.preprocess, steps, files)
    meaning = "samples of recordings of one length, without any padding"
    tensor = RawTensor(name, "float32", ("samples",), meaning, longest=modality.num_samples)

    def prepare(item: Any) -> tuple[Tensor, ...]:
        values_T, mask_T = modality.preprocess(item)
        return (values_T[: int(mask_T.sum())],)

    return RawInputs((tensor,), _Waveforms(), steps, prepare, files)


def _open_tokens(modality: TextInput, tokenizer: bytes) -> RawInputs:
    meanings = {"input_ids": "tokens of a text", "attention_mask": "1 for a token, 0 for padding behind the text"}
    if modality.has_types:
        meanings["token_type_ids"] = "0 in the first text, 1 in a second one that is read together with it"
    tensors = tuple(
        RawTensor(name, "int64", ("tokens",), meaning, longest=modality.max_length)
        for name, meaning in meanings.items()
    )
    step = {"step": "tokenize", "file": "tokenizer.json", "max_length": modality.max_length, "pad_id": modality.pad_id}

    def prepare(item: Any) -> tuple[Tensor, ...]:
        return tuple(modality.preprocess(item)[: len(tensors)])

    return RawInputs(tensors, _Tokens(), [step], prepare, {"tokenizer.json": tokenizer})


def open_image_processor(values: dict[str, Any]) -> Any:
    """Returns the image processor of a preprocessor_config.json. Raises BadInput."""
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    # Older files name the slow class, or a feature extractor that became an image processor.
    name = str(name).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    cls = get_image_processor_class_from_name(name)
    if cls is None:
        raise BadInput(f"preprocessor_config.json: expected an image processor of transformers, got {name!r}")
    return cls.from_dict(values)


def open_feature_extractor(values: dict[str, Any]) -> Any:
    """Returns the feature extractor of a preprocessor_config.json. Raises BadInput."""
    name = str(values.get("feature_extractor_type"))
    cls = feature_extractor_class_from_name(name)
    if cls is None:
        raise BadInput(f"preprocessor_config.json: expected a feature extractor of transformers, got {name!r}")
    return cls.from_dict(values)


def _get_dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters())
