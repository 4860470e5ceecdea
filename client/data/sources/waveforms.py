"""Physiological waveforms that a table lists: WFDB records, such as PhysioNet's, and files of EDF and BDF.

WFDB: https://wfdb.io/spec/header-files.html; EDF: https://www.edfplus.info/specs/edf.html
"""

from __future__ import annotations

import csv
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.series import Gaps, checked
from client.data.sources.parts.tree import MAX_FILE_BYTES, require_file
from common.types import BadInput, BadRecord

MAX_SAMPLES = 1 << 27
"""Largest number of samples of the files that are read: a day of three channels at 500 Hz, 1 GiB."""

MAX_RATIO = 100
"""So many samples may become of one at most: the filter's length, and with it the memory, grows with it."""

_EDF = frozenset({".edf", ".bdf", ".rec"})
_SIGNALS = (".dat", ".mat", ".xyz")
"""Endings of the files beside a WFDB header that may hold its signals."""
_MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}

_READING = threading.Lock()
"""The library of EDF opens no file twice at a time."""


class Waveforms(ListedFiles):
    """Settings of listed waveforms. Channels measured in volts come in millivolts, others in the file's own units.

    Attributes:
        record: column of paths: of a WFDB record's header, with or without `.hea`, or of an .edf or .bdf file.
        channels: names of the channels to read, in the order in which the network has them; letters' case is one. A
            record that lacks one of them cannot be used.
        rate_hz: samples a second that the network reads; records of another rate are resampled.
        gaps: as of a `manifest`: what an invalid sample of a WFDB record means.
    """

    kind: Literal["waveforms"]
    record: str = "record"
    channels: Annotated[list[str], Field(min_length=1)]
    rate_hz: Annotated[float, Field(gt=0, le=1e6)]
    gaps: Gaps = "refuse"

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four records of two leads of three patients."""
        wfdb = _import_wfdb()
        names = ["q7-ann-1", "q7-ann-2", "q7-bea", "q7-cem"]
        time = np.arange(200) / 100
        for number, name in enumerate(names):
            leads_TC = np.stack([np.sin(2 * np.pi * (number + 1) * time), np.cos(2 * np.pi * time)], axis=1)
            wfdb.wrsamp(name, 100, ["mV"] * 2, ["I", "II"], p_signal=leads_TC, fmt=["16"] * 2, write_dir=str(folder))
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["record", "patient", "finding"])
            for number, name in enumerate([*names, "q7-missing"]):
                writer.writerow([name, name[:6], ["z-normal", "z-other"][number % 2]])
        settings = {"kind": "waveforms", "path": str(folder / "list.csv"), "patient": "patient"}
        return SourceExample(settings | {"channels": ["I", "II"], "rate_hz": 100}, ["q7-", "z-normal", "z-other"])

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or a reader is not installed."""
        require_readers()
        settings = f"waveforms {self.channels} {self.rate_hz} {self.gaps}"
        return open_listing(self, Reader(self.record, self.read, "waveform", settings, parts=find_parts))

    def read(self, path: Path) -> NDArray[np.float32]:
        """Returns a record, T or T x C. Raises BadRecord, OSError."""
        return read_waveform(path, self.channels, self.rate_hz, self.gaps)


@dataclass(frozen=True)
class _Channel:
    values_T: NDArray[np.float64]
    rate_hz: float
    unit: str


def require_readers() -> None:
    """Raise BadInput where waveforms cannot be read on this machine."""
    if find_spec("wfdb") is None or find_spec("pyedflib") is None:
        raise BadInput("waveforms: expected the packages wfdb and pyedflib; install headwater[waveforms]")


def _import_wfdb() -> Any:
    """Returns the module: only here, since it takes a second, and without its own warnings on pandas."""
    with warnings.catch_warnings(action="ignore"):
        import wfdb
    return wfdb


def find_parts(path: Path) -> list[Path]:
    """Returns the files of a record that are there."""
    if path.suffix.lower() in _EDF:
        return [path]
    stem = _find_stem(path)
    return [file for ending in (".hea", *_SIGNALS) if (file := Path(f"{stem}{ending}")).exists()]


def list_channels(path: Path) -> tuple[list[str], float]:
    """Returns the names of a record's channels, and its samples a second, of its first channel where they differ.

    Raises:
        BadRecord: unreadable.
        OSError: missing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.suffix.lower() not in _EDF:
                require_file(Path(f"{_find_stem(path)}.hea"), "waveform")
                header = _import_wfdb().rdheader(str(_find_stem(path)))
                return [str(name) for name in header.sig_name or []], float(header.fs)
            from pyedflib import EdfReader

            with _READING, EdfReader(str(path)) as file:
                return [str(name).strip() for name in file.getSignalLabels()], float(file.getSampleFrequency(0))
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError):
        raise BadRecord("unreadable waveform") from None


def read_waveform(path: Path, names: Sequence[str], rate_hz: float, gaps: Gaps) -> NDArray[np.float32]:
    """Returns some channels of a record at one rate: T x C, or T of a single one; volts in millivolts.

    Args:
        path: a WFDB header, with or without its ending, or a file of EDF or BDF.
        names: the channels, in the order of the columns.
        rate_hz: samples a second.
        gaps: what an invalid sample means.

    Raises:
        BadRecord: unreadable, a channel is missing or twice, or a gap that is refused.
        OSError: missing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            channels = _read_edf(path, names) if path.suffix.lower() in _EDF else _read_wfdb(path, names)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, MemoryError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError):
        # From None: these messages name the file, and its header names the patient.
        raise BadRecord("unreadable waveform") from None
    columns = [_resample(channel, rate_hz, gaps) for channel in channels]
    length = min(map(len, columns))
    return columns[0] if len(columns) == 1 else np.stack([column[:length] for column in columns], axis=1)


def _find_stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".hea" else path


def _read_wfdb(path: Path, names: Sequence[str]) -> list[_Channel]:
    wfdb = _import_wfdb()
    stem = _find_stem(path)
    require_file(Path(f"{stem}.hea"), "waveform")
    header = wfdb.rdheader(str(stem))
    if isinstance(header, wfdb.MultiRecord):
        raise BadRecord("expected a WFDB record of one segment, got several; join them, or list the segments")
    indices = _find(names, header.sig_name or [])
    frames = [header.samps_per_frame[index] for index in indices]
    for file in {header.file_name[index] for index in indices}:
        # A header is data: it reads no other file than its own.
        if file not in {f"{stem.name}{ending}" for ending in _SIGNALS}:
            raise BadRecord("expected a WFDB record's signals beside its header, as its name with .dat, .mat or .xyz")
        size = require_file(stem.with_name(file), "waveform")
        if size > MAX_FILE_BYTES:
            raise BadRecord(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
        # All channels of a file are read to get one. Where the header does not say how many samples there are, the
        # library counts bytes, of which a sample takes at least one.
        beside = [each for each, name in zip(header.samps_per_frame, header.file_name, strict=True) if name == file]
        _require_size(header.sig_len * sum(beside) if header.sig_len else size)
    record = wfdb.rdrecord(str(stem), channels=indices, smooth_frames=False)
    return [
        _Channel(values_T, header.fs * frame, unit)
        for values_T, frame, unit in zip(record.e_p_signal, frames, record.units, strict=True)
    ]


def _read_edf(path: Path, names: Sequence[str]) -> list[_Channel]:
    from pyedflib import EdfReader

    if require_file(path, "waveform") > MAX_FILE_BYTES:
        raise BadRecord(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
    with _READING, EdfReader(str(path)) as file:
        indices = _find(names, file.getSignalLabels())
        _require_size(sum(int(file.getNSamples()[index]) for index in indices))
        return [
            _Channel(file.readSignal(index), file.getSampleFrequency(index), file.getPhysicalDimension(index))
            for index in indices
        ]


def _find(names: Sequence[str], present: Sequence[str]) -> list[int]:
    listed = [name.strip().lower() for name in present]
    wanted = [name.strip().lower() for name in names]
    for name, want in zip(names, wanted, strict=True):
        if (count := listed.count(want)) != 1:
            raise BadRecord(f"expected one channel {name!r}, got {count or 'none'}")
    return [listed.index(want) for want in wanted]


def _require_size(samples: int) -> None:
    if samples > MAX_SAMPLES:
        raise BadRecord(f"expected at most {MAX_SAMPLES >> 20} million samples")


def _resample(channel: _Channel, rate_hz: float, gaps: Gaps) -> NDArray[np.float32]:
    from scipy.signal import resample_poly  # Here: it takes half a second.

    values_T = checked(channel.values_T * _MILLIVOLTS.get(channel.unit.strip().lower(), 1.0), gaps)
    ratio = Fraction(rate_hz / channel.rate_hz).limit_denominator(1000)
    if ratio == 1:
        return values_T
    if np.isnan(values_T).any():
        raise BadRecord("expected a waveform without gaps, to bring it to another rate; write `gaps: interpolate`")
    if not 0 < ratio <= MAX_RATIO or len(values_T) * ratio > MAX_SAMPLES:
        raise BadRecord(
            f"expected a rate from {rate_hz / MAX_RATIO:g} to {1000 * rate_hz:g} Hz, and at most {MAX_SAMPLES >> 20} "
            f"million samples at {rate_hz:g} Hz"
        )
    brought_T: NDArray[np.float32] = resample_poly(values_T, ratio.numerator, ratio.denominator, padtype="line")
    return brought_T
