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
from common.backbones.parts.hub.recordings import AudioInput, EqualRecordings
from common.backbones.parts.images import convert_to_rgb
from common.backbones.parts.raw import open_given
from common.inputs import Text
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
        """Returns the model's output on one group, and a mask [B, T] of the positions that count, None for all."""

    def mark(self, model: nn.Module, inputs_B: Tensor, positions: int) -> Tensor | None:
        """Returns the mask [B, T] of the positions of a group that count, None for all.

        Args:
            model: the model.
            inputs_B: inputs of one group.
            positions: number of positions T of the model's output.
        """


@dataclass(frozen=True)
class TextInput:
    """3 x L int64: token ids, mask, token types.

    Attributes:
        tokenizer: returns the tokenizer; called when the first text comes.
        max_length: number of tokens; longer texts are cut.
        vocab_size: number of tokens that the model knows.
        pad_id: token id at padded positions.
        has_types: whether the model tells the texts of a pair apart.
        prompt: text in front of every text, of a pair in front of the first, as sentence-transformers does.
    """

    tokenizer: Callable[[], tokenizers.Tokenizer]
    max_length: int
    vocab_size: int
    pad_id: int
    has_types: bool
    prompt: str = ""

    def preprocess(self, item: Any) -> Tensor:
        """Returns tokens of a text or of a pair."""
        if not isinstance(item, Text):
            raise BadRecord("expected a text")
        if not item.first.strip() or (item.second is not None and not item.second.strip()):
            raise BadRecord("expected a text, got an empty one")
        encoding = self.tokenizer().encode(self.prompt + item.first, item.second)
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
        # Without memory a mask has no values to look at, and shapes do not depend on it.
        given_BL = None if mask_BL.device.type == "meta" else mask_BL
        return model(input_ids=ids_BL, attention_mask=given_BL, **more), mask_BL

    def mark(self, model: nn.Module, inputs_B: Tensor, positions: int) -> Tensor | None:
        """Returns the mask of tokens.

        Args:
            model: the model.
            inputs_B: inputs of one group.
            positions: number of positions T of the model's output.
        """
        del model
        return inputs_B[:, 1, :positions]


@dataclass(frozen=True)
class ImageInput:
    """Channels x H x W, or patches of pictures in their own shape, by the model's own image processor.

    Patches stand as (N + 1) x (P + 1): behind each 1 where it is the picture's own, and in the last row the picture's
    height and width in patches.
    """

    processor: Any

    def preprocess(self, item: Any) -> Tensor:
        """Returns the pixels of a picture, made RGB first."""
        made = self.processor(images=convert_to_rgb(item), return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0].to(torch.float32)
        if "spatial_shapes" not in made:
            return pixels
        patches_NP = torch.cat([pixels, made["pixel_attention_mask"][0][:, None].to(pixels.dtype)], dim=1)
        size_P = torch.zeros_like(patches_NP[0])
        size_P[:2] = made["spatial_shapes"][0]
        return torch.cat([patches_NP, size_P[None]])

    def check_size(self) -> None:
        """Raises BadInput where pictures of different shapes become inputs of different shapes."""
        wide, high = (self.preprocess(np.zeros((*size, 3), dtype=np.uint8)) for size in ((64, 96), (96, 64)))
        if wide.shape != high.shape:
            raise BadInput(
                "preprocessor_config.json: expected one size for all pictures, got one that depends on the picture; "
                "write a fixed `size` (height and width) there"
            )

    def noise(self, count: int) -> Tensor:
        """Returns standardised random pixels."""
        picture = self.preprocess(np.zeros((64, 64, 3), dtype=np.uint8))
        if picture.ndim == 3:
            return torch.randn(count, *picture.shape)
        noise = picture.expand(count, *picture.shape).clone()
        noise[:, :-1, :-1] = torch.randn(count, len(picture) - 1, picture.shape[1] - 1, device=noise.device)
        return noise

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all inputs together."""
        yield torch.arange(len(inputs_B), device=inputs_B.device), inputs_B

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the output on pixels in the model's precision; a mask [B, N] of patches where there are some."""
        dtype = next(parameter.dtype for parameter in model.parameters())
        if inputs_B.ndim == 4:
            return model(pixel_values=inputs_B.to(dtype)), None
        patches_BNP, mask_BN = inputs_B[:, :-1, :-1], inputs_B[:, :-1, -1]
        sizes_B2 = inputs_B[:, -1, :2].long()
        more = {"pixel_attention_mask": mask_BN.long(), "spatial_shapes": sizes_B2}
        return model(pixel_values=patches_BNP.to(dtype), **more), mask_BN

    def mark(self, model: nn.Module, inputs_B: Tensor, positions: int) -> Tensor | None:
        """Returns the mask of patches.

        Args:
            model: the model.
            inputs_B: inputs of one group.
            positions: number of positions T of the model's output.
        """
        del model
        return inputs_B[:, :-1, -1] if inputs_B.ndim == 3 and positions == inputs_B.shape[1] - 1 else None


@final
class _Tokens(nn.Module):
    """Token ids, mask and perhaps token types, each B x L -> inputs B x 3 x L."""

    def forward(self, *rows_BL: Tensor) -> Tensor:
        untyped = [torch.zeros_like(rows_BL[0])] if len(rows_BL) == 2 else []
        return torch.stack([*rows_BL, *untyped], dim=1)


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
    name = modality.extractor.model_input_names[0]
    if modality.whole:
        meaning = "spectra, one step in each column; in the last row 1 for the recording's own steps, else 0"
        shape = tuple(modality.noise(1)[0].shape)
        return open_given(name, shape, meaning, modality.preprocess, steps, files)
    meaning = "samples of recordings of one length, without any padding"
    if len(modality.shape) > 1:
        behind = f" but {modality.silence} steps of silence behind each" if modality.silence else ""
        meaning = f"spectra of recordings of one length, without any padding{behind}"
    lengths: tuple[int | str, ...] = tuple(
        "samples" if axis == modality.axis else size for axis, size in enumerate(modality.shape)
    )
    tensor = RawTensor(name, "float32", lengths, meaning, longest=modality.num_steps)

    def prepare(item: Any) -> tuple[Tensor, ...]:
        inputs = modality.preprocess(item)
        own = int(inputs[-1].sum()) + modality.silence
        rest = [size for axis, size in enumerate(modality.shape) if axis != modality.axis]
        return (inputs[:-1, :own].reshape(*rest, -1).movedim(-1, modality.axis),)

    return RawInputs((tensor,), EqualRecordings(modality), steps, prepare, files)


def _open_tokens(modality: TextInput, tokenizer: bytes) -> RawInputs:
    meanings = {"input_ids": "tokens of a text", "attention_mask": "1 for a token, 0 for padding behind the text"}
    if modality.has_types:
        meanings["token_type_ids"] = "0 in the first text, 1 in a second one that is read together with it"
    tensors = tuple(
        RawTensor(name, "int64", ("tokens",), meaning, longest=modality.max_length)
        for name, meaning in meanings.items()
    )
    before = [{"step": "prepend", "text": modality.prompt}] if modality.prompt else []
    step = {"step": "tokenize", "file": "tokenizer.json", "max_length": modality.max_length, "pad_id": modality.pad_id}

    def prepare(item: Any) -> tuple[Tensor, ...]:
        return tuple(modality.preprocess(item)[: len(tensors)])

    return RawInputs(tensors, _Tokens(), [*before, step], prepare, {"tokenizer.json": tokenizer})


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
