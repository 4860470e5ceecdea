"""Read a recording (wav, flac, ogg, aiff) and the transcript beside it, or say why not, without a word of them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from client.data.sources.parts.tree import Tree
from common.inputs import Audio
from common.types import BadInput, BadRecord

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".aif", ".aiff"})
_MOST_VALUES = 1 << 28
"""Samples times channels: a damaged header may ask for any amount of memory."""
_MOST_SECONDS, _LOWEST_RATE, _HIGHEST_RATE = 4 * 3600, 50, 1_000_000
"""Sample rates that are read; the filter that resamples to a backbone's rate is as long as the rates are large."""


TEXT_SUFFIXES = (".txt", ".srt")
"""Endings of files of transcripts; of two beside one recording the first is read."""

NOTHING_SAID = "\N{WORD JOINER}"
"""The cell of an empty file: in it stands that nothing is said, where an empty cell says that nobody wrote it down.

It is no blank, so that it stays, and no letter, so that no task sees a symbol in it."""

_TIMES = re.compile(r"\d+:\d\d:\d\d[,.]\d{1,3}\s*-->\s*\d+:\d\d:\d\d[,.]\d{1,3}")
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,40}>|\{\\[^{}]{0,40}\}")


@dataclass(frozen=True)
class Excerpt:
    """One of `count` excerpts of a recording, each of `seconds`, evenly spread over it."""

    number: int
    count: int
    seconds: float

    def frames(self, total: int, sample_rate: int) -> tuple[int, int]:
        """First frame and number of frames: all of a recording that is not longer than one excerpt."""
        length = min(max(round(self.seconds * sample_rate), 1), total)
        return int((total - length) * (self.number + 0.5) / self.count), length


def read_recording(data: bytes, part: Excerpt | None = None) -> Audio:
    """A recording or a part of it, channels averaged. Raises BadRecord: unreadable, empty, or absurdly long."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 < file.frames * file.channels <= _MOST_VALUES or file.samplerate < 1:
                raise BadRecord("expected a recording of between one sample and some hours")
            start, length = (0, file.frames) if part is None else part.frames(file.frames, file.samplerate)
            if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE or length > _MOST_SECONDS * file.samplerate:
                raise BadRecord(f"expected at most {_MOST_SECONDS} s at {_LOWEST_RATE} to {_HIGHEST_RATE} Hz")
            file.seek(start)
            samples_TC = file.read(length, dtype="float32", always_2d=True)
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


def find_text(tree: Tree, recording: str) -> str | None:
    """Returns the path of the transcript beside a recording; None where there is none.

    Args:
        tree: recordings and transcripts.
        recording: path of the recording.
    """
    paths = (str(PurePosixPath(recording).with_suffix(suffix)) for suffix in TEXT_SUFFIXES)
    return next((path for path in paths if path in tree.stamps), None)


def read_transcript(data: bytes, suffix: str) -> str:
    """Returns a transcript as a cell.

    Args:
        data: content of its file.
        suffix: ending of its file.

    Raises:
        BadRecord: it is not in UTF-8, or subtitles without a time.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # From None: the message would show the text.
        raise BadRecord("expected a transcript in UTF-8") from None
    if suffix == ".srt":
        text = _join_subtitles(text)
    return text if text.strip() else NOTHING_SAID


def _join_subtitles(text: str) -> str:
    """Returns what subtitles say: each is a number, a line of times, and lines of text up to a blank one."""
    lines = [line.strip() for line in text.splitlines()]
    times = [at for at, line in enumerate(lines) if _TIMES.match(line)]
    if not times and any(lines):
        raise BadRecord("expected subtitles with times, got text without any")
    said: list[str] = []
    for at in times:
        until = next((after for after in range(at, len(lines)) if not lines[after]), len(lines))
        said += [_MARKUP.sub("", line) for line in lines[at + 1 : until]]
    return "\n".join(said)
