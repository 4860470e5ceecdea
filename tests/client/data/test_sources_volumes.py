"""DICOM series and enhanced files become the volume that lies in the patient, or say in a sentence why they do not.

The body of these tests is a plane: its value at a place is known in the patient's millimetres, whatever stores it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.data.sources import Source, open_source
from client.data.sources.dicom import write_dicom
from common.inputs import Volume
from common.types import BadInput, BadRecord

# Per mm to the patient's right, front and top.
SLOPES_3 = np.array([3.0, -2.0, 5.0])
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
DIRECTIONS = {
    "axial": AXIAL,
    "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "prone, feet first": ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
    "oblique": ((1.0, 0.0, 0.0), (0.0, np.cos(0.3), np.sin(0.3))),
}
ROWS, COLUMNS, SLICES = 6, 8, 5
ROW_MM, COLUMN_MM, STEP_MM = 1.5, 0.5, 2.0


def place_slices(directions: tuple[Any, Any], step_3: Any = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the corner of each slice and the values of each, S x H x W, in the body; `step_3` leads to the next."""
    row, column = map(np.array, directions)
    step = STEP_MM * np.cross(row, column) if step_3 is None else np.array(step_3)
    corners = np.array([-20.0, 30.0, 70.0]) + np.arange(SLICES)[:, None] * step
    across, down = np.arange(COLUMNS) * COLUMN_MM, np.arange(ROWS) * ROW_MM
    places = corners[:, None, None] + down[:, None, None] * column + across[:, None] * row
    # DICOM's axes lead to the left and the back.
    return corners, places * [-1, -1, 1] @ SLOPES_3 + 1000.0


def write_series(
    folder: Path,
    directions: tuple[Any, Any] = AXIAL,
    change: Callable[[int, dict[str, Any]], None] | None = None,
    step_3: Any = None,
) -> NDArray[Any]:
    """Writes a series whose names and numbers say nothing of its order, with a rescale of its own in each slice."""
    folder.mkdir()
    corners, values_SHW = place_slices(directions, step_3)
    for at in range(SLICES):
        slope = 0.25 * (1 + at % 2)
        tags: dict[str, Any] = {
            "PatientID": "P-17", "SeriesInstanceUID": "1.2.3", "InstanceNumber": (3 * at) % SLICES,
            "ImagePositionPatient": [float(f"{number:.6f}") for number in corners[at]],
            "ImageOrientationPatient": [float(f"{number:.9f}") for number in np.ravel(directions)],
            "PixelSpacing": [ROW_MM, COLUMN_MM], "RescaleSlope": slope, "RescaleIntercept": -100,
        }  # fmt: skip
        stored = np.rint((values_SHW[at] + 100) / slope).astype(np.uint16)
        if change is not None:
            change(at, tags)
        if tags.pop("leave out", False):
            continue
        write_dicom(folder / f"{(7 * at) % SLICES}.dcm", tags.pop("stored", stored), **tags)
    return values_SHW


def opened(folder: Path, *files: str, **settings: Any) -> Source:
    (folder / "list.csv").write_text("file,finding\n" + "".join(f"{name},z\n" for name in files))
    return open_source({"kind": "volumes", "path": str(folder / "list.csv"), **settings}, "sources.scans").open()


def load(folder: Path, name: str = "series") -> Volume:
    found = opened(folder, name).load(0)
    assert isinstance(found, Volume)
    return found


def check_body(found: Volume, directions: tuple[Any, Any], values_SHW: NDArray[Any]) -> None:
    """Raises AssertionError unless a volume has the body's values along the patient's axes."""
    row, column = map(np.array, directions)
    axes = np.abs([row, column, np.cross(row, column)])
    lengths, spacing = (COLUMNS, ROWS, SLICES), (COLUMN_MM, ROW_MM, STEP_MM)
    for axis in range(3):
        stored = int(np.argmax(axes[:, axis]))
        assert found.values_XYZ.shape[axis] == lengths[stored]
        assert found.spacing_mm[axis] == pytest.approx(spacing[stored], rel=1e-5)
        # One voxel on leads that far to the patient's right, front or top, and along the plane as far as it is oblique.
        leads = (row, column, np.cross(row, column))[stored] * [-1, -1, 1]
        slope = abs(leads @ SLOPES_3) * np.sign(leads[axis]) * np.sign(leads @ SLOPES_3)
        steps = np.diff(found.values_XYZ, axis=axis)
        np.testing.assert_allclose(steps, slope * spacing[stored], atol=0.6)
    np.testing.assert_allclose(np.sort(found.values_XYZ.ravel()), np.sort(values_SHW.ravel()), atol=0.3)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_series_is_the_volume_of_the_patient_whatever_its_names_numbers_and_plane(name: str, tmp_path: Path) -> None:
    values_SHW = write_series(tmp_path / "series", DIRECTIONS[name])
    check_body(load(tmp_path), DIRECTIONS[name], values_SHW)


def write_enhanced(path: Path, directions: tuple[Any, Any]) -> NDArray[Any]:
    """Writes one file of all slices, in no order, which says what they share once."""
    corners, values_SHW = place_slices(directions)
    order = [3, 0, 4, 2, 1]
    write_dicom(path, np.rint(4 * values_SHW[order]).astype(np.uint16), PatientID="P-17")
    found = pydicom.dcmread(path)
    shared, orientation, measures, scale = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [float(f"{number:.9f}") for number in np.ravel(directions)]
    measures.PixelSpacing = [ROW_MM, COLUMN_MM]
    scale.RescaleSlope, scale.RescaleIntercept = 0.25, 0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [scale]
    found.SharedFunctionalGroupsSequence = [shared]
    found.PerFrameFunctionalGroupsSequence = []
    for at in order:
        own, position = Dataset(), Dataset()
        position.ImagePositionPatient = [float(f"{number:.6f}") for number in corners[at]]
        own.PlanePositionSequence = [position]
        found.PerFrameFunctionalGroupsSequence.append(own)
    found.save_as(path)
    return values_SHW


@pytest.mark.parametrize("name", ["sagittal", "oblique"])
def test_an_enhanced_file_is_the_same_volume_as_its_series(name: str, tmp_path: Path) -> None:
    values_SHW = write_enhanced(tmp_path / "a.dcm", DIRECTIONS[name])
    check_body(load(tmp_path, "a.dcm"), DIRECTIONS[name], values_SHW)
    write_series(tmp_path / "series", DIRECTIONS[name])
    one, other = load(tmp_path, "a.dcm"), load(tmp_path)
    np.testing.assert_allclose(one.values_XYZ, other.values_XYZ, atol=0.5)
    assert one.spacing_mm == pytest.approx(other.spacing_mm, rel=1e-6)


def test_the_pictures_of_a_tilted_gantry_are_moved_back(tmp_path: Path) -> None:
    # Each slice lies .8 rows further back than the one before.
    write_series(tmp_path / "series", step_3=[0.0, 0.8 * ROW_MM, STEP_MM])
    found = load(tmp_path)
    assert found.spacing_mm == pytest.approx((COLUMN_MM, ROW_MM, STEP_MM))
    for axis, size in enumerate(found.spacing_mm):
        steps = np.diff(found.values_XYZ, axis=axis)
        np.testing.assert_allclose(steps[~np.isnan(steps)], SLOPES_3[axis] * size, atol=0.6)
    # Of the middle slice nothing is lost, of the outer ones what the others do not reach.
    assert [int(np.isnan(found.values_XYZ[0, :, at]).sum()) for at in range(SLICES)] == [2, 1, 0, 1, 2]


def test_padding_is_outside_the_body_and_monochrome_1_measures_the_same(tmp_path: Path) -> None:
    def pad(at: int, tags: dict[str, Any]) -> None:
        tags["PixelPaddingValue"] = 7
        tags["PhotometricInterpretation"] = "MONOCHROME1"
        if at == 0:
            tags["stored"] = np.full((ROWS, COLUMNS), 7, np.uint16)

    values_SHW = write_series(tmp_path / "series", change=pad)
    found = load(tmp_path).values_XYZ
    assert np.isnan(found[:, :, 0]).all()
    np.testing.assert_allclose(found[:, :, 1:], values_SHW[1:].transpose(2, 1, 0)[::-1, ::-1], atol=0.3)


def test_the_patient_of_the_tag_is_the_unit_when_asked(tmp_path: Path) -> None:
    write_series(tmp_path / "series")
    write_enhanced(tmp_path / "a.dcm", AXIAL)
    (tmp_path / "b.nii").write_bytes(b"no volume")
    files = ("series", "a.dcm", "b.nii", "absent.dcm")
    assert [each.patient for each in opened(tmp_path, *files).index()] == [None] * 4
    assert [each.patient for each in opened(tmp_path, *files, patient_from_tag=True).index()] == [
        "P-17",
        "P-17",
        "",
        "",
    ]
    with pytest.raises(BadInput, match="either the tag or"):
        opened(tmp_path, "series", patient_from_tag=True, patient="finding")


def alter(at: int, **tags: Any) -> Callable[[int, dict[str, Any]], None]:
    def change(number: int, own: dict[str, Any]) -> None:
        if number == at:
            own.update(tags)

    return change


FAULTS: dict[str, Any] = {
    "gaps or uneven": alter(3, **{"leave out": True}),
    "got gaps or": alter(3, ImagePositionPatient=[-20, 30, 70 + 3 * STEP_MM + 0.6]),
    "one slice at each place, got several": alter(3, ImagePositionPatient=[-20, 30, 70 + 2 * STEP_MM]),
    "beside the others": alter(3, ImagePositionPatient=[-10, 30, 70 + 3 * STEP_MM]),
    "slices of one size": alter(3, stored=np.zeros((ROWS, COLUMNS + 1), np.uint16)),
    "slices of one orientation": alter(3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
    "pixels of one size": alter(3, PixelSpacing=[ROW_MM, 2 * COLUMN_MM]),
    "files of one series": alter(3, SeriesInstanceUID="1.2.4"),
    "say where they lie": alter(3, ImagePositionPatient=[1, 2]),
    "right angles": alter(3, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
    "a mosaic of them": alter(3, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]),
    "slope other than 0": alter(3, RescaleSlope=0),
    "expected grey values": alter(
        3, PhotometricInterpretation="RGB", SamplesPerPixel=3, stored=np.zeros((ROWS, COLUMNS), np.uint8)
    ),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_series_that_is_no_volume_says_why_in_one_sentence(said: str, tmp_path: Path) -> None:
    write_series(tmp_path / "series", change=FAULTS[said])
    with pytest.raises(BadRecord, match=said) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "series/" not in str(caught.value)


def test_a_file_of_one_picture_and_frames_without_a_place_are_no_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), ImagePositionPatient=[0, 0, 0],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])  # fmt: skip
    with pytest.raises(BadRecord, match=r"slices of a volume, got 1 picture"):
        load(tmp_path, "a.dcm")
    write_dicom(tmp_path / "b.dcm", np.zeros((3, 2, 2), np.uint16), ImagePositionPatient=[0, 0, 0],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])  # fmt: skip
    with pytest.raises(BadRecord, match="for each frame of a file"):
        load(tmp_path, "b.dcm")
    with pytest.raises(BadRecord, match="missing volume"):
        load(tmp_path, "absent")


SCANS = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"


def test_frames_that_a_file_only_says_it_has_are_not_counted_one_by_one(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "many.dcm", AXIAL)
    found = pydicom.dcmread(tmp_path / "many.dcm")
    shared = found.SharedFunctionalGroupsSequence[0]
    shared.PlanePositionSequence = found.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    for count, side in ((2_000_000_000, ROWS), (200_000_000, 1)):
        found.NumberOfFrames, found.Rows, found.Columns = count, side, side
        found.save_as(tmp_path / "many.dcm")
        with pytest.raises(BadRecord, match="at most 65536 frames"):
            load(tmp_path, "many.dcm")


def test_series_of_real_scanners_are_volumes_or_say_what_is_missing(tmp_path: Path) -> None:
    """The 5 slices of CT5N are whole; of CT2 most are left out of pydicom's files, and MR700 turns around an axis."""
    (tmp_path / "list.csv").write_text("file\n98892001/CT5N\n77654033/CT2\n98892003/MR700\n")
    spec = {"kind": "volumes", "path": str(tmp_path / "list.csv"), "root": str(SCANS)}
    scans = open_source(spec, "sources.scans").open()
    found = scans.load(0)
    slices = [pydicom.dcmread(path) for path in sorted((SCANS / "98892001" / "CT5N").iterdir())]
    slices.sort(key=lambda each: float(each.ImagePositionPatient[2]))
    expected = np.stack([each.pixel_array.T[::-1, ::-1] * 1.0 - 1024 for each in slices], axis=-1)
    np.testing.assert_array_equal(found.values_XYZ, expected)
    assert found.spacing_mm == pytest.approx((0.488281, 0.488281, 2.5))
    for at, said in ((1, "got gaps"), (2, "one orientation")):
        with pytest.raises(BadRecord, match=said):
            scans.load(at)


@pytest.mark.slow
def test_monais_reader_has_the_same_volume_of_a_series_in_order(tmp_path: Path) -> None:
    import nibabel
    from monai.data.image_reader import PydicomReader

    series = SCANS / "98892001" / "CT5N"
    reader = PydicomReader(swap_ij=True)
    values, meta = reader.get_data(reader.read(str(series)))
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(values, np.float32), meta["affine"]))
    (tmp_path / "list.csv").write_text("file\nCT5N\n")
    spec = {"kind": "volumes", "path": str(tmp_path / "list.csv"), "root": str(series.parent)}
    ours = open_source(spec, "s").open().load(0)
    np.testing.assert_allclose(ours.values_XYZ, np.asarray(theirs.dataobj), atol=1e-3)
    assert ours.spacing_mm == pytest.approx(tuple(theirs.header.get_zooms()), rel=1e-5)
