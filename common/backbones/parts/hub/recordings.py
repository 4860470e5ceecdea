"""Recordings as inputs of a transformers model, and how the model reads a batch of them.

All inputs have one shape, so that they stack; the last row says which steps are the recording's own. A recording is
encoded by itself and at its exact length: some audio encoders normalise over time and ignore masks. A model that reads
spectra of one size alone sees the padding too, but only positions over the recording's own steps are pooled: averaged
over thirty seconds, Whisper-tiny tells digits of one speaker apart by .85, over the recording's own part by 1.00.

# Shapes: B examples, C values of a step, S steps of an input, T output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ASTModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from common.backbones.parts.audio import fit_length, resample
from common.backbones.parts.hub.spectra import SILENCE_FRAMES, STEPS_OF_FRAME, encode_spectra
from common.inputs import Audio
from common.types import BadInput

_KALDI_FRAMES = 100
"""Frames of a second, where an extractor does not say how far apart they are."""


@dataclass(frozen=True)
class AudioInput:
    """(C + 1) x S float32: samples or spectra; in the last row 1 for the recording's own steps.

    Attributes:
        extractor: the model's own feature extractor.
        num_samples: longer recordings give their middle.
        fixed: whether every recording is brought to `num_samples`.
        shape: the shape of what the extractor makes of `num_samples`, without a batch dimension.
        axis: the axis of `shape` along which steps lie.
        whole: whether the model reads all steps, whatever the recording's length.
        silence: steps of silence that the model reads behind a recording.
    """

    extractor: Any
    num_samples: int
    fixed: bool
    shape: tuple[int, ...]
    axis: int
    whole: bool
    silence: int

    @classmethod
    def of(cls, extractor: Any, seconds: float, *, fixed: bool, model: nn.Module | None) -> AudioInput:
        """Returns the inputs of an extractor.

        Args:
            extractor: the model's own feature extractor.
            seconds: length of the longest recording.
            fixed: whether every recording is brought to that length.
            model: the model that reads them; None where they are only made.

        Raises:
            BadInput: its random excerpts of long recordings would differ from one time to the next.
        """
        rate = int(extractor.sampling_rate)
        num_samples = round(seconds * rate)
        longest = getattr(extractor, "nb_max_samples", None)
        if isinstance(longest, int) and num_samples > longest:
            raise BadInput(
                f"seconds: expected at most {longest / rate:g} for this model, which reads longer recordings from a "
                f"random place on, got {seconds:g}"
            )
        # On the CPU, where a network is built without memory too.
        with torch.device("cpu"):
            # No silence: some extractors divide by a recording's own deviation.
            tone_T = np.cos(np.arange(num_samples, dtype=np.float32))
            full = _extract(extractor, tone_T)
            half = _extract(extractor, tone_T[: max(1, num_samples // 2)])
        varying = [axis for axis, size in enumerate(full[0].shape) if size != half[0].shape[axis]]
        lengths = list(full[0].shape)
        known = [axis for axis, size in enumerate(lengths) if full[1] is not None and size == len(full[1])]
        axis = (varying or known or [lengths.index(max(lengths))])[0]
        is_whisper = isinstance(model, WhisperEncoder)
        silence = STEPS_OF_FRAME * SILENCE_FRAMES if is_whisper else 0
        whole = not varying and not is_whisper
        return cls(extractor, num_samples, fixed, tuple(lengths), axis, whole, silence)

    @property
    def sample_rate(self) -> int:
        """Samples per second that the model expects."""
        return int(self.extractor.sampling_rate)

    @property
    def num_steps(self) -> int:
        """Number of steps S of every input."""
        return self.shape[self.axis]

    def preprocess(self, item: Any) -> Tensor:
        """Returns a recording, resampled, cut, and scaled as the model's extractor does."""
        samples_T = resample(item, self.sample_rate)
        if self.fixed or len(samples_T) > self.num_samples:
            samples_T = fit_length(samples_T, self.num_samples)
        values, mask_S = _extract(self.extractor, samples_T)
        values_CS = values.movedim(self.axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]
        steps = values_CS.shape[1]
        own = self._count_own(len(samples_T), steps) if mask_S is None else int(mask_S.sum())
        marks_1S = (torch.arange(steps) < max(1, own)).to(torch.float32)[None]
        inputs = torch.cat([values_CS, marks_1S])[:, : self.num_steps]
        return nn.functional.pad(inputs, (0, self.num_steps - inputs.shape[1]))

    def noise(self, count: int) -> Tensor:
        """Returns white noise."""
        samples = torch.randn(count, self.num_samples).clamp(-3, 3).numpy() / 3
        return torch.stack([self.preprocess(Audio(row, self.sample_rate)) for row in samples])

    def groups(self, inputs_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each recording by itself and at its exact length, so that none depends on the others."""
        if self.whole:
            yield torch.arange(len(inputs_B), device=inputs_B.device), inputs_B
            return
        lengths_B = inputs_B[:, -1].sum(1).long()
        for row in torch.nonzero(lengths_B > 0).flatten():
            yield row.unsqueeze(0), inputs_B[row : row + 1, :, : int(lengths_B[row]) + self.silence]

    def run(self, model: nn.Module, inputs_B: Tensor) -> tuple[Any, Tensor | None]:
        """Returns the output on recordings of one length; a mask [B, T] of their own positions, None for all."""
        values_BCS = inputs_B[:, :-1]
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        values_B = values_BCS.reshape(values_BCS.shape[0], *rest, values_BCS.shape[2]).movedim(-1, self.axis + 1)
        values_B = values_B.to(next(parameter.dtype for parameter in model.parameters()))
        if isinstance(model, WhisperEncoder):
            output = BaseModelOutput(last_hidden_state=encode_spectra(model, values_B))
        else:
            output = model(values_B)
        hidden = getattr(output, "last_hidden_state", None)
        return output, None if hidden is None or hidden.ndim != 3 else self.mark(model, inputs_B, hidden.shape[1])

    def mark(self, model: nn.Module, inputs_B: Tensor, positions: int) -> Tensor | None:
        """Returns the mask of positions that lie over a recording's own steps; None where all of them do.

        Args:
            model: the model.
            inputs_B: inputs of one group.
            positions: number of positions T of the model's output.
        """
        marks_BS = inputs_B[:, -1]
        if self.whole:
            return _mark_positions(model, marks_BS, positions)
        return marks_BS[:, : positions * STEPS_OF_FRAME : STEPS_OF_FRAME] if self.silence else None

    def _count_own(self, samples: int, steps: int) -> int:
        """Returns the number of a recording's own steps, where its extractor does not say it."""
        if len(self.shape) == 1 or str(getattr(self.extractor, "padding", "")).startswith("repeat"):
            return steps
        hop = getattr(self.extractor, "hop_length", None) or self.sample_rate // _KALDI_FRAMES
        return math.ceil(samples / int(hop))


def _extract(extractor: Any, samples_T: NDArray[np.float32]) -> tuple[Tensor, Tensor | None]:
    """Returns what an extractor makes of samples, and its mask [S] of the steps that are no padding, if it has one."""
    inputs = extractor(
        samples_T, sampling_rate=int(extractor.sampling_rate), return_tensors="pt", return_attention_mask=True
    )
    values: Tensor = inputs[extractor.model_input_names[0]][0].to(torch.float32)
    mask = inputs.get("attention_mask")
    return values, None if mask is None or values.ndim == 1 else mask[0]


def _mark_positions(model: nn.Module, marks_BS: Tensor, positions: int) -> Tensor:
    """Returns the mask [B, T] of a model's positions that lie over a recording's own steps."""
    steps = marks_BS.shape[1]
    if not isinstance(model, ASTModel):
        begins_T = torch.arange(positions, device=marks_BS.device) * steps // positions
        return marks_BS[:, begins_T]
    config = model.config
    across = (steps - config.patch_size) // config.time_stride + 1
    down = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    # Rows of patches of one band of frequencies follow each other, behind the tokens that are no patches.
    patches_BT = marks_BS[:, : across * config.time_stride : config.time_stride].repeat(1, down)
    return nn.functional.pad(patches_BT, (positions - across * down, 0), value=1.0)


@final
class EqualRecordings(nn.Module):
    """Samples or spectra of recordings of one length, B x *shape -> inputs B x (C + 1) x S."""

    def __init__(self, modality: AudioInput) -> None:
        super().__init__()
        self.axis = modality.axis
        self.silence = modality.silence

    def forward(self, values_B: Tensor) -> Tensor:
        """Returns the inputs; silence behind the recordings is not marked as their own."""
        values_BS = values_B.movedim(self.axis + 1, -1)
        values_BCS = values_BS.flatten(1, -2) if values_BS.ndim > 2 else values_BS[:, None]
        marks_B1S = torch.ones_like(values_BCS[:, :1, self.silence :])
        return torch.cat([values_BCS, nn.functional.pad(marks_B1S, (0, self.silence))], dim=1)
