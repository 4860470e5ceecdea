"""Read a recording (wav, flac, ogg, aiff), or say why not, without a word of its name or content."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from common.items import Audio
from common.types import BadInput, BadRecord

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".aif", ".aiff"})
_MOST_VALUES = 1 << 28
"""Samples times channels: a damaged header may ask for any amount of memory."""


def read_recording(data: bytes) -> Audio:
    """A recording with its channels averaged. Raises BadRecord: unreadable, empty, or absurdly long."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 < file.frames * file.channels <= _MOST_VALUES or file.samplerate < 1:
                raise BadRecord("expected a recording of between one sample and some hours")
            samples_TC = file.read(dtype="float32", always_2d=True)
            return Audio(samples_TC.mean(axis=1, dtype=np.float32), int(file.samplerate))
    except (OSError, RuntimeError, TypeError, ValueError, OverflowError, MemoryError):
        # From None: the library's own message may name the file, and so a patient.
        raise BadRecord("unreadable recording") from None


def require_soundfile() -> None:
    """Raise BadInput where recordings cannot be read on this machine."""
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:
        raise BadInput("recordings: expected the package soundfile; install headwater[audio]") from error


def example_recordings(count: int) -> list[NDArray[np.int16]]:
    """Short different tones, the same on every call."""
    time = np.arange(400) / 8000
    return [(8000 * np.sin(2 * np.pi * 300 * (number + 1) * time)).astype(np.int16) for number in range(count)]
