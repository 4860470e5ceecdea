"""Every DICOM file of pydicom and pydicom-data: the table in docs/dicom.md is true, and pixels are pydicom's own."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.data.sources.parts.dicom.files import open_dicom, quiet
from client.data.sources.parts.dicom.pixels import read_frames
from common.types import BadRecord

DOCS = Path(__file__).resolve().parents[2] / "docs"


@cache
def script() -> ModuleType:
    pytest.importorskip("data_store", reason="pydicom-data is not installed")
    spec = importlib.util.spec_from_file_location("dicom_table", DOCS / "dicom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_of_dicom_files_is_true() -> None:
    page = (DOCS / "dicom.md").read_text(encoding="utf-8")
    assert script().fill_in(page) == page, "run: python docs/dicom.py"


@pytest.mark.slow
def test_pixels_of_single_pictures_are_those_of_pydicoms_own_functions() -> None:
    compared = 0
    for _, path in script().list_examples():
        if path.stat().st_size > 1 << 20:
            continue  # Large ones take most of the time, and are of no other kind.
        with quiet():
            try:
                found = open_dicom(path, pixels=True)
                pixels = read_frames(found, "file", 1).pictures[0]
            except BadRecord:
                continue
            if int(found.get("NumberOfFrames", 1) or 1) > 1 or "PixelPaddingValue" in found:
                continue
            expected = reference(found)
        assert pixels.shape == expected.shape, path.name
        assert np.abs(pixels.astype(int) - expected).max() <= 1, path.name
        compared += 1
    assert compared > 60


def reference(found: Any) -> NDArray[np.float64]:
    """A picture from 0 to 255 by pydicom's functions, as its user guide puts them together."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    stored = found.pixel_array
    if found.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(stored, found)
        return np.floor(colours / 2.0 ** (8 * (colours.dtype.itemsize - 1)))
    if found.SamplesPerPixel == 3:
        return np.floor(stored / 2.0 ** (found.BitsStored - 8))
    values = apply_modality_lut(stored, found)
    shown = np.asarray(apply_voi_lut(values, found), dtype=np.float64)
    # The highest value that the output of a window or of a table may have.
    if found.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** found.VOILUTSequence[0].LUTDescriptor[2] - 1
    else:
        ends = [-(2.0 ** (found.BitsStored - 1)), 2.0 ** (found.BitsStored - 1) - 1]
        low, high = ends if found.PixelRepresentation else (0.0, 2.0**found.BitsStored - 1)
        if "RescaleSlope" in found:
            low, high = (float(found.RescaleSlope) * end + float(found.RescaleIntercept) for end in (low, high))
    scaled = 255.0 * (shown - low) / (high - low)
    return np.asarray(255.0 - scaled if found.PhotometricInterpretation == "MONOCHROME1" else scaled)
