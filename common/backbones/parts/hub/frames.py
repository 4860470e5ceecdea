"""Frames of recordings: what an audio model knows at each moment, instead of one vector for the whole recording.

A recording's frames are those of its own part: what silence stands behind it, to fill a model's input, has none. Their
mean, which the recording's own frames have in common, is subtracted: it says who speaks and over which line, and takes
no other record to compute. Behind a frame's features stands its mark, which no projection touches: 0 where the
recording has ended, and else nearly the same number, by which a head has its bias; a little less where it is quiet.

# Shapes: B recordings, S steps of an input, C channels of one, T frames of a model, P places, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from common.backbones import QUIET, SPEECH, RawInputs, RawTensor
from common.backbones.parts.audio import resample
from common.backbones.parts.hub.spectra import SILENCE_FRAMES, STEPS_OF_FRAME, encode_spectra
from common.inputs import Audio
from common.types import BadInput, BadRecord

_QUIET_DB = 30.0
"""A place is quiet where it is so much weaker than the loudest of its recording."""


@dataclass(frozen=True)
class FrameRates:
    """The rates by which inputs, frames and places of a model follow from samples.

    Attributes:
        sample_rate: samples per second.
        hop: samples of a frame.
        every: frames of a place.
        longest: most samples of a recording.
        spectral: whether a model reads spectra, two steps for a frame, and not samples.
    """

    sample_rate: int
    hop: int
    every: int
    longest: int
    spectral: bool

    @classmethod
    def of(cls, model: nn.Module, extractor: Any, seconds: float, every: int) -> FrameRates:
        """Returns the rates of a model.

        Args:
            model: the model.
            extractor: its own feature extractor.
            seconds: length of the longest recording.
            every: frames of a place.

        Raises:
            BadInput: it is none whose frames can be told from padding, or has positions for shorter recordings.
        """
        sample_rate = int(extractor.sampling_rate)
        longest = round(seconds * sample_rate)
        if isinstance(model, WhisperEncoder):
            hop = STEPS_OF_FRAME * int(extractor.hop_length)
            most = model.embed_positions.num_embeddings - SILENCE_FRAMES
            if longest > most * hop:
                raise BadInput(
                    f"seconds: expected at most {most * hop / sample_rate:g} for this model, got {seconds:g}"
                )
            return cls(sample_rate, hop, every, longest, spectral=True)
        ratio = getattr(getattr(model, "config", None), "inputs_to_logits_ratio", None)
        if not isinstance(ratio, int):
            raise BadInput(
                "pooling: expected for `frames` a model that reads samples, such as wav2vec2, or Whisper's encoder "
                "(`part: encoder`)"
            )
        return cls(sample_rate, ratio, every, longest, spectral=False)

    @property
    def places(self) -> int:
        """Number of places P of every recording."""
        return math.ceil(math.ceil(self.longest / self.hop) / self.every)

    @property
    def steps_of_frame(self) -> int:
        """Steps of an input that are of one frame."""
        return STEPS_OF_FRAME if self.spectral else self.hop

    @property
    def silence(self) -> int:
        """Steps of silence behind a recording."""
        return STEPS_OF_FRAME * SILENCE_FRAMES if self.spectral else 0

    def count_steps(self, samples: int) -> int:
        """Returns the number of a recording's own steps."""
        return STEPS_OF_FRAME * math.ceil(samples / self.hop) if self.spectral else samples


@dataclass(frozen=True)
class FrameInput:
    """C x S float32: samples or spectra; in the last channel 1 for the recording's own steps, 2 where they are loud.

    Attributes:
        extractor: the model's own feature extractor.
        rates: the model's rates.
    """

    extractor: Any
    rates: FrameRates

    def preprocess(self, item: Any) -> Tensor:
        """Returns a recording, resampled and scaled as the model's extractor does."""
        rates = self.rates
        # Before it is resampled: it may be hours long. What would be cut off would be missing of what is said.
        if isinstance(item, Audio) and len(item.samples_T) * rates.sample_rate > rates.longest * item.sample_rate:
            raise BadRecord(f"expected a recording of at most {rates.longest / rates.sample_rate:g} s")
        samples_T = resample(item, rates.sample_rate)[: rates.longest]
        own = rates.count_steps(len(samples_T))
        read = own + rates.silence
        more = {"max_length": read * int(self.extractor.hop_length)} if rates.spectral else {}
        inputs = self.extractor(samples_T, sampling_rate=rates.sample_rate, return_tensors="pt", **more)
        values: Tensor = inputs[self.extractor.model_input_names[0]][0].to(torch.float32)
        values_CS = (values if values.ndim == 2 else values[None])[:, :read]
        marks_1S = nn.functional.pad(self._mark(samples_T, own), (0, read - own))[None]
        return nn.functional.pad(torch.cat([values_CS, marks_1S]), (0, self._count_all() - read))

    def noise(self, count: int) -> Tensor:
        """Returns white noise."""
        samples = torch.randn(count, self.rates.longest).clamp(-3, 3).numpy() / 3
        return torch.stack([self.preprocess(Audio(row, self.rates.sample_rate)) for row in samples])

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each recording by itself and at its exact length, so that none depends on the others."""
        lengths_B = (inputs_B[:, -1] > 0).sum(1)
        for row in torch.nonzero(lengths_B > 0).flatten():
            yield row.unsqueeze(0), inputs_B[row : row + 1, :, : int(lengths_B[row]) + self.rates.silence]

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the own frames [B, T, D] of recordings of one length, and what their places [B, P] are: 1 or 2."""
        values_BCS, marks_BS = inputs_B[:, :-1].to(next(model.parameters()).dtype), inputs_B[:, -1]
        # A graph does not look at numbers: what it is given has one length.
        own: Any = inputs_B.shape[2] - self.rates.silence
        if not torch.compiler.is_exporting():
            own = int((marks_BS[0] > 0).sum())
        if isinstance(model, WhisperEncoder):
            frames_BTD = encode_spectra(model, values_BCS)
        else:
            frames_BTD = model(values_BCS[:, 0]).last_hidden_state
        # Upwards by an addition: ONNX rounds negative quotients towards zero.
        frames_BTD = frames_BTD[:, : (own + self.rates.steps_of_frame - 1) // self.rates.steps_of_frame]
        return frames_BTD, marks_BS[:, : own : self.rates.every * self.rates.steps_of_frame]

    def _count_all(self) -> int:
        """Returns the number of steps S of every input."""
        return self.rates.count_steps(self.rates.longest) + self.rates.silence

    def _mark(self, samples_T: NDArray[np.float32], own: int) -> Tensor:
        """Returns the mark of each of the recording's own steps; all steps of a place have the same."""
        rates = self.rates
        length = rates.hop * rates.every
        padded_T = np.pad(samples_T.astype(np.float64), (0, -len(samples_T) % length))
        energy_P = np.square(padded_T).reshape(-1, length).sum(axis=1)
        loud_P = (energy_P > 0.0) & (energy_P >= energy_P.max() * 10.0 ** (-_QUIET_DB / 10.0))
        marks_P = np.where(loud_P, 2.0, 1.0).astype(np.float32)
        return torch.from_numpy(marks_P.repeat(rates.every * rates.steps_of_frame)[:own])


@final
class FrameModel(nn.Module):
    """A model and its frames, centred and averaged: inputs [B, C, S] -> features [B, P, D + 1]."""

    def __init__(self, model: nn.Module, modality: FrameInput, width: int) -> None:
        super().__init__()
        self.model = model
        self.modality = modality
        self._width = width

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns features and marks; zeros where a recording has ended."""
        rates, features = self.modality.rates, []
        if torch.compiler.is_exporting():
            frames_BTD, marks_BP = self.modality.run(self.model, inputs_B)
            assert marks_BP is not None
            return _pool_frames(frames_BTD.float(), marks_BP, rates)
        rows_B = [torch.zeros(0, dtype=torch.long, device=inputs_B.device)]
        for rows, group_B in self.modality.groups(inputs_B):
            frames_BTD, marks_BP = self.modality.run(self.model, group_B)
            assert marks_BP is not None
            rows_B.append(rows)
            features.append(_pool_frames(frames_BTD.float(), marks_BP, rates))
        whole_BPD = inputs_B.new_zeros((len(inputs_B), rates.places, self._width + 1), dtype=torch.float32)
        if features:
            whole_BPD[torch.cat(rows_B)] = torch.cat(features)
        return whole_BPD


@final
class EqualFrames(nn.Module):
    """Inputs of recordings of one length and silence behind them -> the same with nothing but marks in the last row."""

    def __init__(self, silence: int) -> None:
        super().__init__()
        self.silence = silence

    def forward(self, inputs_BCS: Tensor) -> Tensor:
        """Returns the inputs; what a recording's steps are marked with is 1 or 2, and 0 behind them."""
        own = inputs_BCS.shape[2] - self.silence
        marks_B1S = 1.0 + (inputs_BCS[:, -1:, :own] > 1.5).to(inputs_BCS.dtype)
        return torch.cat([inputs_BCS[:, :-1], nn.functional.pad(marks_B1S, (0, self.silence))], dim=1)


def open_raw_frames(modality: FrameInput, processor: dict[str, Any]) -> RawInputs:
    """Returns the inputs of a network of frames: recordings of one length, with the marks of their steps.

    Args:
        modality: how the model reads a recording.
        processor: content of preprocessor_config.json.
    """
    rates, name = modality.rates, modality.extractor.model_input_names[0]
    channels, longest = modality.preprocess(Audio(np.zeros(rates.hop, np.float32), rates.sample_rate)).shape
    behind = f", then {rates.silence} steps of silence" if rates.silence else ""
    meaning = (
        f"recordings of one length{behind}; in the last row 2 for the steps of loud places, 1 for those of quiet ones "
        "and 0 behind them"
    )
    place = rates.every * rates.steps_of_frame
    before: list[dict[str, Any]] = [
        {"step": "resample", "sample_rate": rates.sample_rate, "channels": 1, "range": [-1, 1]},
        {"step": "expect_length", "samples": rates.longest},
        {"step": "processor", "file": "preprocessor_config.json", "library": "transformers", "silence": rates.silence},
        {"step": "mark", "samples": rates.hop * rates.every, "steps": place, "decibels_below_loudest": _QUIET_DB},
    ]
    files = {"preprocessor_config.json": json.dumps(processor, indent=2).encode()}

    def prepare(item: Any) -> tuple[Tensor, ...]:
        inputs_CS = modality.preprocess(item)
        return (inputs_CS[:, : int((inputs_CS[-1] > 0).sum()) + rates.silence],)

    tensor = RawTensor(name, "float32", (channels, "steps"), meaning, longest=longest)
    return RawInputs((tensor,), EqualFrames(rates.silence), before, prepare, files)


def _pool_frames(frames_BTD: Tensor, loud_BP: Tensor, rates: FrameRates) -> Tensor:
    """Returns the features of all places of recordings of one length, their own mean subtracted; then their marks."""
    # A model that needs several frames' samples for its first frame may have one place less.
    places = (frames_BTD.shape[1] + rates.every - 1) // rates.every
    centred_BTD = frames_BTD - frames_BTD.mean(dim=1, keepdim=True)
    # The last place may have fewer frames: its mean is over those. No pooling: that of ONNX would leave it out.
    padded_BTD = nn.functional.pad(centred_BTD, (0, 0, 0, places * rates.every - frames_BTD.shape[1]))
    sums_BPD = torch.unflatten(padded_BTD, 1, (places, rates.every)).sum(dim=2)
    first_P = rates.every * torch.arange(places, device=sums_BPD.device)
    pooled_BPD = sums_BPD / (frames_BTD.shape[1] - first_P).clamp(max=rates.every)[:, None]
    marks_BP1 = torch.where(loud_BP[:, :places, None] > 1.5, SPEECH, QUIET)
    return nn.functional.pad(torch.cat([pooled_BPD, marks_BP1], dim=2), (0, 0, 0, rates.places - places))


def find_cross_attention(model: nn.Module) -> Tensor | None:
    """Returns the rows by which a model's decoder reads its encoder's outputs; None where it has no decoder.

    What pre-training let a decoder read of an encoder's output is what tells words apart.
    """
    rows = [
        part.weight.detach()
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    ]
    return torch.cat(rows) if rows else None


def draw_directions(width: int) -> Tensor:
    """Returns random rows, more than there are features, whose directions are taken where no decoder says any.

    Args:
        width: number of features.
    """
    # The same in every federation. Numpy's generator: its numbers are the same on every machine, and so the digest.
    return torch.from_numpy(np.random.default_rng(0).standard_normal((4 * width, width))).float()
