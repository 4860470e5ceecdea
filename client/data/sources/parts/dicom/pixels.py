"""From the stored values of a DICOM file to 8-bit pictures, or to intensities, as the standard says.

(PS3.3, C.7.6.3, C.11 and C.7.6.16.)

Grey values pass through the modality's rescale or table, then through a window or a table of the values of interest;
those of an enhanced file may have their own of both in each frame. What is not understood is refused by its name:
names are repeated only where the standard knows them.

# Shapes: F frames of H x W.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.data.sources.parts.dicom.files import list_errors
from client.data.sources.parts.scans import MAX_VALUES, UNREADABLE, windowed
from common.inputs import spread
from common.types import BadRecord

Window = tuple[float, float] | Literal["file", "full"]

_GREY = ("MONOCHROME1", "MONOCHROME2")
# pydicom turns YBR_FULL and YBR_FULL_422 into RGB; those of JPEG 2000 are, when they are decoded.
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_NOT_READ = ("ARGB", "CMYK", "HSV", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB")
_NO_WINDOW = "DICOM file without a window of its own; write `window: [centre, width]` or `full`"


@dataclass(frozen=True)
class Frames:
    """The pictures of a file.

    Attributes:
        pictures: each H x W, or H x W x 3.
        steps: what was done to the stored values, in words, in this order.
    """

    pictures: list[NDArray[np.uint8]] = field(repr=False)
    steps: tuple[str, ...]


def read_frames(found: Any, window: Window, most: int | None = None) -> Frames:
    """Returns the pictures of a file.

    Args:
        found: the dataset, with its pixels.
        window: of grey values: [centre, width]; `file` takes the file's own, `full` its lowest to highest value.
        most: frames that are read at most, evenly spread over all; None for all of them.

    Raises:
        BadRecord: its pixels cannot be decoded, or are of a kind that is not read.
    """
    try:
        count = count_frames(found)
        kind = _check_picture(found, count)
        chosen = spread(count, most)
        # The lowest and highest value are those of all frames.
        needed = list(range(count)) if window == "full" and kind in _GREY else chosen
        frames = _decode(found, needed)
        if kind in _COLOURS:
            return Frames(list(_to_eight_bits(found, frames)), (f"{kind} of {int(found.BitsStored)} bits",))
        if kind == _PALETTE:
            return Frames(list(_apply_palette(found, frames)), ("palette",))
        grey = _Grey(found, frames, needed, is_turned=kind == "MONOCHROME1")
        return _show_grey(grey, window, chosen)
    except list_errors():
        # From None: pydicom's own messages quote tags.
        raise BadRecord("DICOM file whose tags about its picture cannot be read") from None


def read_intensities(found: Any) -> NDArray[np.float32]:
    """Returns all frames' grey values after rescaling, F x H x W; padding is not a number.

    Which of them are shown dark, as MONOCHROME1 says, does not change what they measure.

    Raises:
        BadRecord: it has colours, or its pixels cannot be decoded.
    """
    try:
        count = count_frames(found)
        kind = _check_picture(found, count)
        if kind not in _GREY:
            raise BadRecord(f"expected grey values, got {kind}")
        numbers = list(range(count))
        grey = _Grey(found, _decode(found, numbers), numbers, is_turned=False)
        values_FHW = np.stack(
            [
                _apply_scale(found, *each).astype(np.float32)
                for each in zip(grey.frames_FHW, grey.find_scales(), strict=True)
            ]
        )
        padding = _find_padding(found, grey.frames_FHW.dtype)
        if padding is not None:
            values_FHW[(grey.frames_FHW >= padding[0]) & (grey.frames_FHW <= padding[1])] = np.nan
        return values_FHW
    except list_errors():
        raise BadRecord("DICOM file whose tags about its picture cannot be read") from None


def count_frames(found: Any) -> int:
    """Returns the number of pictures that a file says it has, at least 1."""
    return max(1, int(found.get("NumberOfFrames", 1) or 1))


def _check_picture(found: Any, count: int) -> str:
    """Returns the photometric interpretation of a file of so many frames. Raises BadRecord: too large, or not read."""
    samples = int(found.get("SamplesPerPixel", 1) or 1)
    if not 0 < count * int(found.Rows) * int(found.Columns) * samples <= MAX_VALUES:
        # A damaged header may ask for any amount of memory.
        raise BadRecord(f"expected at most {MAX_VALUES >> 20} million values")
    return _check_kind(found, samples)


def _check_kind(found: Any, samples: int) -> str:
    """Returns the photometric interpretation. Raises BadRecord: it is not read, or fits nothing else in the file."""
    kind = str(found.get("PhotometricInterpretation") or "").strip()
    if kind not in (*_GREY, *_COLOURS, _PALETTE):
        said = kind if kind in _NOT_READ else "another one" if kind else "none"
        raise BadRecord(
            f"expected the photometric interpretation {', '.join((*_GREY, _PALETTE))} or {', '.join(_COLOURS)}, got "
            f"{said}"
        )
    wanted = 3 if kind in _COLOURS else 1
    if samples != wanted:
        raise BadRecord(f"expected {wanted} sample(s) per pixel of {kind}, got {samples}")
    # Values that are shown in colours, beside others that are shown in grey.
    if str(found.get("PixelPresentation") or "") in ("COLOR", "MIXED"):
        raise BadRecord("a supplemental colour palette is not read")
    if int(found.get("HighBit", 0) or 0) not in (0, int(found.get("BitsStored", 1) or 1) - 1):
        raise BadRecord("expected the values' bits to be the lowest that are stored")
    shape = str(found.get("PresentationLUTShape") or "")
    if found.get("PresentationLUTSequence") or (kind in _GREY and shape not in ("", "IDENTITY", "INVERSE")):
        raise BadRecord("a presentation lookup table is not read")
    if kind in _GREY and shape and (shape == "INVERSE") != (kind == "MONOCHROME1"):
        raise BadRecord(f"photometric interpretation {kind} and presentation {shape} contradict each other")
    return kind


def _decode(found: Any, frames: list[int]) -> NDArray[Any]:
    """Returns the stored values of some frames, F x H x W or F x H x W x 3."""
    from pydicom.pixels import get_decoder, iter_pixels
    from pydicom.uid import UID_dictionary

    syntax = found.file_meta.TransferSyntaxUID
    name = UID_dictionary.get(str(syntax), ("an unknown way",))[0]
    try:
        get_decoder(syntax)
    except (NotImplementedError, *UNREADABLE):
        raise BadRecord(f"its pixels are stored as {name}, which is not read") from None
    try:
        values = np.stack(list(iter_pixels(found, indices=frames)))
    except list_errors():
        raise BadRecord(f"DICOM file without pixels that can be decoded ({name})") from None
    if values.shape[1:3] != (int(found.Rows), int(found.Columns)):
        raise BadRecord("DICOM file whose pixels have another shape than it says")
    return values


# --- colours ---------------------------------------------------------------------------------------------------------


def _to_eight_bits(found: Any, frames: NDArray[Any]) -> NDArray[np.uint8]:
    bits = int(found.BitsStored)
    if frames.ndim != 4 or frames.dtype.kind != "u" or bits < 8:
        raise BadRecord("expected a colour picture of at least 8 bits per value, without signs")
    return (frames >> (bits - 8)).astype(np.uint8)


def _apply_palette(found: Any, frames: NDArray[Any]) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut

    colours = ("Red", "Green", "Blue")
    shapes = {tuple(found[f"{colour}PaletteColorLookupTableDescriptor"].value) for colour in colours}
    if len(shapes) != 1:
        raise BadRecord("expected colour tables of one length")
    if not found.original_encoding[1]:
        # pydicom takes the bytes of a table as they are.
        for name in (f"{colour}PaletteColorLookupTableData" for colour in colours):
            if name in found and len(found[name].value) > (next(iter(shapes))[0] or 1 << 16):
                found[name].value = np.frombuffer(found[name].value, dtype=">u2").astype("<u2").tobytes()
    values = apply_color_lut(frames, found)[..., :3]
    # Tables of 16 bits are found with entries of 8.
    return np.asarray(values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8)


# --- grey values -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grey:
    """Stored grey values.

    Attributes:
        found: the dataset.
        frames_FHW: some frames.
        numbers: their places in the file, from 0.
        is_turned: whether high values are black.
    """

    found: Any
    frames_FHW: NDArray[Any]
    numbers: list[int]
    is_turned: bool

    def find_scales(self) -> list[tuple[float, float] | None]:
        """Returns slope and intercept of each frame."""
        return [_find_scale(self.found, number) for number in self.numbers]


def _show_grey(grey: _Grey, window: Window, chosen: list[int]) -> Frames:
    found, scales, steps = grey.found, grey.find_scales(), []
    padding = _find_padding(found, grey.frames_FHW.dtype)
    if padding is not None:
        steps.append("padding black")
    if found.get("ModalityLUTSequence"):
        steps.append("modality table")
    elif any(scale is not None for scale in scales):
        steps.append("rescale" + " per frame" * (len(set(scales)) > 1))

    def read(at: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        frame = grey.frames_FHW[at]
        outside = None if padding is None else (frame >= padding[0]) & (frame <= padding[1])
        return _apply_scale(found, frame, scales[at]), outside

    extent = _find_extent(map(read, range(len(grey.numbers)))) if window == "full" else None
    shown, windows = [], set()
    for number in chosen:
        values, outside = read(grey.numbers.index(number))
        pixels, said = _apply_window(found, number, values, window if extent is None else extent)
        pixels = 255 - pixels if grey.is_turned else pixels
        shown.append(pixels if outside is None else np.where(outside, np.uint8(0), pixels))
        windows.add(said)
    steps += [*sorted(windows), *(["turned"] if grey.is_turned else [])]
    return Frames(shown, tuple(steps))


@dataclass(frozen=True)
class _Extent:
    low: float
    high: float


def _find_extent(read: Iterable[tuple[NDArray[Any], NDArray[np.bool_] | None]]) -> _Extent:
    """Returns the lowest and the highest value of all frames, the padding left out."""
    ends: list[float] = []
    for values, outside in read:
        inside = values if outside is None else values[~outside]
        ends += [float(inside.min()), float(inside.max())] if inside.size else []
    return _Extent(min(ends, default=0.0), max(ends, default=0.0))


def _find_padding(found: Any, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Returns the lowest and highest stored value that is no part of the picture, as the decoded values have it."""
    ends = [found.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None or dtype.kind not in "iu":
        return None
    bits, unused = 8 * dtype.itemsize, 8 * dtype.itemsize - int(found.BitsStored)
    read = []
    for end in ends:
        # pydicom drops the bits above those that are stored; a padding of -2000 may be written without its sign.
        number = int(ends[0] if end is None else end) % (1 << bits)
        value = np.array([number], dtype=f"u{dtype.itemsize}").view(dtype)
        read.append(int(np.right_shift(np.left_shift(value, unused), unused)[0]))
    return min(read), max(read)


def find_group(found: Any, frame: int, name: str) -> Any:
    """Returns an item of a frame's own functional groups, or of those that all share; None where there is none.

    Args:
        found: the dataset.
        frame: the frame's place in the file, from 0.
        name: name of the group's sequence.
    """
    own, shared = found.get("PerFrameFunctionalGroupsSequence"), found.get("SharedFunctionalGroupsSequence")
    for groups in ([own[frame]] if own and frame < len(own) else [], shared or []):
        for group in groups:
            if group.get(name):
                return group[name].value[0]
    return None


def _find_scale(found: Any, frame: int) -> tuple[float, float] | None:
    """Returns slope and intercept of a frame; None where it has none. Raises BadRecord: one of them is missing or 0."""
    own = find_group(found, frame, "PixelValueTransformationSequence")
    slope, intercept = (
        _read_number((found if own is None else own).get(f"Rescale{x}")) for x in ("Slope", "Intercept")
    )
    if slope is None and intercept is None:
        dose = _read_number(found.get("DoseGridScaling"))
        return None if dose is None else (dose, 0.0)
    if not slope or intercept is None or not np.isfinite((slope, intercept)).all():
        raise BadRecord("expected a rescale of a slope other than 0 and an intercept")
    return slope, intercept


def _apply_scale(found: Any, frame: NDArray[Any], scale: tuple[float, float] | None) -> NDArray[Any]:
    from pydicom.pixels import apply_modality_lut

    if found.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(frame, found))
    return frame if scale is None else frame.astype(np.float64) * scale[0] + scale[1]


def _apply_window(
    found: Any, frame: int, values: NDArray[Any], window: Window | _Extent
) -> tuple[NDArray[np.uint8], str]:
    """Returns a frame's values from black to white, and how they were made so."""
    from pydicom.pixels import apply_voi

    if isinstance(window, _Extent):
        return windowed(values, window.low, window.high), "lowest to highest"
    if not isinstance(window, str):
        half = window[1] / 2
        return windowed(values, window[0] - half, window[0] + half), "window"
    tables = found.get("VOILUTSequence")
    if tables:
        # Values are rounded into the table, as the modality's may be fractions.
        highest = (1 << int(tables[0].LUTDescriptor[2])) - 1
        return windowed(apply_voi(np.rint(values), found), 0.0, float(highest)), "table of values of interest"
    own = find_group(found, frame, "FrameVOILUTSequence")
    tags = found if own is None else own
    centre, width = (_read_number(tags.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 0:
        raise BadRecord(_NO_WINDOW)
    return _apply_function(values, centre, width, str(tags.get("VOILUTFunction") or "LINEAR"))


def _apply_function(values: NDArray[Any], centre: float, width: float, function: str) -> tuple[NDArray[np.uint8], str]:
    """Returns values in a window of a file's own (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            shares = 1.0 / (1.0 + np.exp(-4.0 * (values.astype(np.float64) - centre) / width))
        return windowed(shares, 0.0, 1.0), "sigmoid window"
    if function == "LINEAR_EXACT":
        return windowed(values, centre - width / 2, centre + width / 2), "exact window"
    if function != "LINEAR":
        raise BadRecord("expected a window that is LINEAR, LINEAR_EXACT or SIGMOID, got another function")
    if width < 1:
        raise BadRecord("expected a linear window of a width of at least 1")
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if width == 1:
        # A step: `windowed` takes equal ends for a picture of one value.
        return np.where(values > low, np.uint8(255), np.uint8(0)), "window"
    return windowed(values, low, high), "window"


def _read_number(value: Any) -> float | None:
    """Returns the first of one or several numbers of a tag."""
    try:
        return float(value if isinstance(value, int | float | str) else value[0])
    except UNREADABLE:
        return None
