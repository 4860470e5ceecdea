"""DICOM pixels, compared with values worked out by hand; a tag whose meaning is not read is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from client.config import SiteConfig
from client.data.checks import data_checks
from client.data.sources import Source, open_source
from client.data.sources.dicom import write_dicom
from common.inputs import Several
from common.types import BadRecord
from common.yaml import parse

VALUES = np.array([[0, 1000, 1024], [1064, 1104, 4095]], dtype=np.uint16)


def listed(folder: Path, *files: str, **settings: Any) -> Source:
    (folder / "list.csv").write_text("file,finding\n" + "".join(f"{name},z\n" for name in files))
    return open_source({"kind": "dicom", "path": str(folder / "list.csv"), **settings}, "sources.scans").open()


def loaded(folder: Path, name: str = "a.dcm", **settings: Any) -> Any:
    return listed(folder, name, **settings).load(0)


def palette(bits: int, *colours: tuple[int, int, int]) -> dict[str, Any]:
    """Tags of tables of 256 colours, the rest of them black."""
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for at, name in enumerate(("Red", "Green", "Blue")):
        table = np.zeros(256, f"<u{bits // 8}")
        table[: len(colours)] = [colour[at] * (257 if bits == 16 else 1) for colour in colours]
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    return tags


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(tmp_path: Path, bits: int) -> None:
    colours = [(255, 0, 0), (0, 200, 0), (0, 0, 7)]
    write_dicom(tmp_path / "a.dcm", np.array([[0, 1], [2, 0]], np.uint8), **palette(bits, *colours))
    assert loaded(tmp_path).tolist() == [[[255, 0, 0], [0, 200, 0]], [[0, 0, 7], [255, 0, 0]]]


def test_each_frame_of_an_enhanced_file_has_its_own_rescale_and_window(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.full((3, 1, 1), 100, np.uint16))
    found = pydicom.dcmread(tmp_path / "a.dcm")
    found.SharedFunctionalGroupsSequence = [group(slope=1, intercept=0, centre=50.5, width=201)]
    own = [group(slope=2, intercept=-100), group(slope=1, intercept=0, centre=100.5, width=201), Dataset()]
    found.PerFrameFunctionalGroupsSequence = own
    found.save_as(tmp_path / "a.dcm")
    # Shared: black at -50, white at 150. 2 * 100 - 100 = 100, in the shared window; 100 in its own, 0 to 200; 100.
    assert [int(item[0, 0]) for item in loaded(tmp_path).items] == [191, 128, 191]
    assert [int(item[0, 0]) for item in loaded(tmp_path, window=[50, 200]).items] == [191, 191, 191]


def group(slope: float, intercept: float, centre: float | None = None, width: float | None = None) -> Dataset:
    """Functional groups of a frame."""
    made, scale, window = Dataset(), Dataset(), Dataset()
    scale.RescaleSlope, scale.RescaleIntercept = slope, intercept
    made.PixelValueTransformationSequence = [scale]
    if centre is not None:
        window.WindowCenter, window.WindowWidth = centre, width
        made.FrameVOILUTSequence = [window]
    return made


def test_padding_is_black_and_no_part_of_lowest_and_highest(tmp_path: Path) -> None:
    values = np.array([[-2000, -2000, 0], [100, 50, -1000]], dtype=np.int16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": 0, "PhotometricInterpretation": "MONOCHROME1"}
    write_dicom(tmp_path / "a.dcm", values, PixelPaddingValue=-2000, **tags)
    # Turned: lowest (-1000) is white, highest (100) black, and the padding stays black.
    assert loaded(tmp_path, window="full").tolist() == [[0, 0, 23], [0, 12, 255]]
    write_dicom(tmp_path / "a.dcm", values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1000, **tags)
    assert loaded(tmp_path, window="full").tolist() == [[0, 0, 255], [0, 127, 0]]


def test_the_functions_of_a_window(tmp_path: Path) -> None:
    for function, expected in (("LINEAR_EXACT", 191), ("SIGMOID", 225), ("LINEAR", 193)):
        values = np.array([[0, 60]], np.uint16)
        write_dicom(tmp_path / "a.dcm", values, WindowCenter=40, WindowWidth=80, VOILUTFunction=function)
        # Exact: 60/80. Sigmoid: 1 / (1 + exp(-4 * 20 / 80)) = .731 -> 186.
        exact = {"LINEAR_EXACT": 60 / 80, "SIGMOID": 1 / (1 + np.exp(-1.0)), "LINEAR": 20.5 / 79 + 0.5}[function]
        assert loaded(tmp_path)[0, 1] == round(255 * exact), expected
    write_dicom(tmp_path / "a.dcm", values, WindowCenter=40, WindowWidth=1)
    assert loaded(tmp_path).tolist() == [[0, 255]]
    write_dicom(tmp_path / "a.dcm", values, WindowCenter=40, WindowWidth=80, VOILUTFunction="CUBIC")
    with pytest.raises(BadRecord, match="LINEAR, LINEAR_EXACT or SIGMOID"):
        loaded(tmp_path)


def test_tables_of_the_modality_and_of_the_values_of_interest_are_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], np.array([0, 10, 20, 40], "<u2").tobytes()
    table.ModalityLUTType = "US"
    shown = Dataset()
    shown.LUTDescriptor, shown.LUTData = [41, 0, 8], np.array([*range(40), 255], "<u2").tobytes()
    values = np.array([[0, 1], [2, 3]], np.uint16)
    write_dicom(tmp_path / "a.dcm", values, ModalityLUTSequence=[table], VOILUTSequence=[shown])
    assert loaded(tmp_path).tolist() == [[0, 10], [20, 255]]
    write_dicom(tmp_path / "a.dcm", values, ModalityLUTSequence=[table])
    assert loaded(tmp_path, window=[20, 40]).tolist() == [[0, 64], [128, 255]]


REFUSED = {
    "another one": {"PhotometricInterpretation": "Q7SECRET"},
    "got HSV": {"PhotometricInterpretation": "HSV", "SamplesPerPixel": 3},
    r"3 sample\(s\) per pixel of RGB, got 1": {"PhotometricInterpretation": "RGB"},
    "contradict": {"PresentationLUTShape": "INVERSE"},
    "presentation lookup table": {"PresentationLUTShape": "LIN OD"},
    "supplemental": {"PixelPresentation": "COLOR"},
    "rescale of a slope other than 0": {"RescaleSlope": 0, "RescaleIntercept": 1},
    "slope other than 0 and an intercept": {"RescaleSlope": 2},
    "bits to be the lowest": {"BitsStored": 12, "HighBit": 15},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES, **REFUSED[reason])
    with pytest.raises(BadRecord, match=reason) as caught:
        loaded(tmp_path, window="full")
    assert "Q7" not in str(caught.value)


def test_a_way_of_compression_without_a_decoder_is_named(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES)
    found = pydicom.dcmread(tmp_path / "a.dcm")
    found.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    found.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
    found.save_as(tmp_path / "a.dcm")
    with pytest.raises(BadRecord, match="stored as MPEG2"):
        loaded(tmp_path, window="full")


def test_dose_has_its_own_scaling(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.array([[0, 100]], np.uint16), DoseGridScaling="0.5")
    assert loaded(tmp_path, window=[50, 100]).tolist() == [[0, 128]]


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big", "deflated", "bare"])
def test_every_way_to_write_tags_gives_the_same_picture(tmp_path: Path, syntax: str) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES, Modality="CT")
    found, uid = pydicom.dcmread(tmp_path / "a.dcm"), pydicom.uid
    known = {"big": uid.ExplicitVRBigEndian, "deflated": uid.DeflatedExplicitVRLittleEndian}
    found.file_meta.TransferSyntaxUID = known.get(syntax, uid.ImplicitVRLittleEndian)
    if syntax == "explicit":
        found.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax == "big":
        found.PixelData = VALUES.astype(">u2").tobytes()
    pydicom.dcmwrite(tmp_path / "b.dcm", found)
    if syntax == "bare":
        # As an archive stores what it received: neither the 128 bytes nor the part about the file itself.
        data = (tmp_path / "b.dcm").read_bytes()
        length = int.from_bytes(data[140:144], "little")
        (tmp_path / "b.dcm").write_bytes(data[144 + length :])
    one, other = (loaded(tmp_path, name, window="full") for name in ("a.dcm", "b.dcm"))
    assert (one == other).all()


def test_a_large_deflated_file_is_not_inflated(tmp_path: Path) -> None:
    """A megabyte of them may hold a gigabyte."""
    values = np.random.default_rng(0).integers(0, 2**16, (800, 800)).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", values)
    found = pydicom.dcmread(tmp_path / "a.dcm")
    found.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "b.dcm", found)
    assert loaded(tmp_path, "a.dcm", window="full").shape == (800, 800)
    with pytest.raises(BadRecord, match="a deflated DICOM file of less than 1 MiB"):
        loaded(tmp_path, "b.dcm")


def write_series(folder: Path, **tags: Any) -> None:
    folder.mkdir()
    for number in range(3):
        write_dicom(folder / f"{number}.dcm", VALUES + number, InstanceNumber=3 - number, **tags)


def write_report(path: Path) -> None:
    write_dicom(path, VALUES)
    found = pydicom.dcmread(path)
    for tag in ("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(found, tag)
    found.save_as(path)


def test_what_lies_beside_a_series_is_passed_over_and_counted(tmp_path: Path) -> None:
    write_series(tmp_path / "series", PatientID="P-1")
    write_report(tmp_path / "series" / "0-report.dcm")
    (tmp_path / "series" / "README.txt").write_text("exported by a viewer")
    (tmp_path / "series" / "DICOMDIR").write_bytes(b"\0" * 300)
    source = listed(tmp_path, "series", window=[2048, 4096], patient_from_tag=True)
    item = source.load(0)
    assert isinstance(item, Several) and item.passed_over == 3
    assert [int(each[1, 2]) for each in item.items] == [255, 255, 255] and len(item.items) == 3
    assert source.index()[0].patient == "P-1"
    values = {
        "name": "here",
        "registry": "here",
        "unit": "example",
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"scans": {"kind": "dicom", "path": "list.csv", "window": "full"}},
        "tasks": {"finding": {"source": "scans", "label": "finding", "missing": "refuse", "public_size": 10}},
        "split": {"test_fraction": 0.0},
        "on_bad_record": "skip",
        "evaluation": "local",
        "state_dir": "state",
    }
    details = {what: detail for what, _, detail, _ in data_checks(parse(SiteConfig, values, base=tmp_path), {})}
    assert details["source scans"] == (
        "1 records, 1 of them opened; 1 of several pages, frames or slices, whose features are averaged; 3 file(s) "
        "beside them passed over"
    )


def test_a_damaged_slice_or_a_second_series_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "one", SeriesInstanceUID="1.2")
    write_series(tmp_path / "two", SeriesInstanceUID="1.3")
    (tmp_path / "two" / "x.dcm").write_bytes(b"damaged")
    with pytest.raises(BadRecord, match="a file of the series is not a DICOM file"):
        loaded(tmp_path, "two", window="full")
    (tmp_path / "two" / "x.dcm").unlink()
    for path in (tmp_path / "two").iterdir():
        path.rename(tmp_path / "one" / f"second-{path.name}")
    with pytest.raises(BadRecord, match="expected the files of one series, got those of 2"):
        loaded(tmp_path, "one", window="full")
