"""DICOM and NIfTI: pixels against values worked out by hand, series and volumes as one record, no tag in any log."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from client.data.sources import Source, open_source
from client.data.sources.dicom import write_dicom
from client.data.sources.parts import scans
from common.inputs import Several, read_mask
from common.types import BadInput, BadRecord

VALUES = np.array([[0, 1000, 1024], [1064, 1104, 4095]], dtype=np.uint16)


def listed(folder: Path, *files: str, kind: str = "dicom", **settings: Any) -> Source:
    rows = "".join(f"{name},z{number}\n" for number, name in enumerate(files))
    (folder / "list.csv").write_text("file,finding\n" + rows)
    return open_source({"kind": kind, "path": str(folder / "list.csv"), **settings}, "sources.scans").open()


def test_rescale_and_window_give_the_pixels_worked_out_by_hand(tmp_path: Path) -> None:
    # Stored 1024 is 0 HU; the window [40, 80] is black at 0 and white at 80.
    write_dicom(tmp_path / "a.dcm", VALUES, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    expected = [[0, 0, 0], [128, 255, 255]]
    # The standard's linear function (C.11.2.1.2.1): ((40 - 39.5) / 79 + 0.5) * 255 = 129.1.
    assert listed(tmp_path, "a.dcm").load(0).tolist() == [[0, 0, 0], [129, 255, 255]]
    assert listed(tmp_path, "a.dcm", window=[40, 80]).load(0).tolist() == expected
    slope = write_dicom(tmp_path / "b.dcm", VALUES, RescaleSlope=2, RescaleIntercept=-2048)
    assert slope is None
    assert listed(tmp_path, "b.dcm", window=[80, 160]).load(0).tolist() == expected


def test_a_large_volume_is_windowed_in_parts_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32).transpose(2, 0, 1)
    expected = (255.0 * ((values.astype(np.float64) + 1.0) / 2.0).clip(0.0, 1.0)).round()
    for part in (scans._PART, 13):
        monkeypatch.setattr(scans, "_PART", part)
        np.testing.assert_array_equal(scans.windowed(values, -1.0, 1.0), expected)


def test_monochrome_1_is_turned(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES, PhotometricInterpretation="MONOCHROME1")
    write_dicom(tmp_path / "b.dcm", VALUES)
    turned, plain = (listed(tmp_path, f"{name}.dcm", window="full").load(0) for name in "ab")
    assert (turned == 255 - plain).all()
    assert turned[0, 0] == 255 and plain[0, 0] == 0


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless], ids=["RLE", "JPEG 2000"])
def test_a_compressed_file_gives_the_same_pixels(tmp_path: Path, syntax: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    write_dicom(tmp_path / "plain.dcm", values)
    dataset = pydicom.dcmread(tmp_path / "plain.dcm")
    dataset.compress(syntax)
    dataset.save_as(tmp_path / "small.dcm")
    source = listed(tmp_path, "plain.dcm", "small.dcm", window="full")
    assert (source.load(0) == source.load(1)).all()


def test_a_lossy_jpeg_is_decoded(tmp_path: Path) -> None:
    values = (127 + 100 * np.sin(np.arange(64) / 9)[:, None] * np.ones(64)).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(values).save(jpeg, "JPEG", quality=95)
    write_dicom(tmp_path / "a.dcm", values)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([jpeg.getvalue()])
    dataset.save_as(tmp_path / "a.dcm")
    found = listed(tmp_path, "a.dcm", window=[127.5, 255]).load(0)
    assert np.abs(found.astype(int) - values).max() <= 4


def test_frames_and_the_files_of_a_series_are_one_record_in_their_order(tmp_path: Path) -> None:
    frames = np.arange(5, dtype=np.uint16)[:, None, None] * np.ones((5, 2, 2), dtype=np.uint16)
    write_dicom(tmp_path / "frames.dcm", frames)
    (tmp_path / "series").mkdir()
    for name, number in (("x", 10), ("y", 9), ("z", 2)):
        # Numbers, not names, say the order: as text "10" would come before "2".
        write_dicom(tmp_path / "series" / name, np.full((2, 2), number, np.uint16), InstanceNumber=number)
    source = listed(tmp_path, "frames.dcm", "series", window=[5, 10])
    first, second = source.load(0), source.load(1)
    assert isinstance(first, Several) and isinstance(second, Several)
    assert [int(item[0, 0]) for item in first.items] == [0, 26, 51, 76, 102]
    assert [int(item[0, 0]) for item in second.items] == [51, 230, 255]
    few = listed(tmp_path, "frames.dcm", "series", window=[5, 10], max_slices=2)
    assert [int(item[0, 0]) for item in few.load(0).items] == [26, 76]
    assert few.digest() != source.digest()


def test_a_colour_picture_stays_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    write_dicom(
        tmp_path / "a.dcm", values[:, :, 0], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
    )
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.PixelData = values.tobytes()
    dataset.save_as(tmp_path / "a.dcm")
    assert (listed(tmp_path, "a.dcm").load(0) == values).all()


def test_the_patient_comes_from_the_tag_only_when_asked(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES, PatientID=" P-17 ")
    write_dicom(tmp_path / "b.dcm", VALUES)
    (tmp_path / "series").mkdir()
    write_dicom(tmp_path / "series" / "1.dcm", VALUES, PatientID="P-18")
    files = ("a.dcm", "b.dcm", "series", "absent.dcm")
    assert [record.patient for record in listed(tmp_path, *files).index()] == [None] * 4
    tagged = listed(tmp_path, *files, patient_from_tag=True).index()
    assert [record.patient for record in tagged] == ["P-17", "", "P-18", ""]
    with pytest.raises(BadInput, match="either the tag or"):
        listed(tmp_path, "a.dcm", patient_from_tag=True, patient="finding")


def test_a_file_without_a_window_asks_for_one(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", VALUES)
    with pytest.raises(BadRecord, match=r"write `window: \[centre, width\]` or `full`"):
        listed(tmp_path, "a.dcm").load(0)


def test_no_identifying_tag_is_logged_warned_of_or_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with warnings.catch_warnings(action="ignore"):
        write_dicom(tmp_path / "a.dcm", VALUES, PatientID="Q" * 80, PatientName="Doe^Jane", WindowCenter=1)
        dataset = pydicom.dcmread(tmp_path / "a.dcm")
        # Values their types do not allow: pydicom warns and quotes them.
        dataset.add(pydicom.DataElement("PatientBirthDate", "DA", "Jane-was-born", validation_mode=0))
        dataset.add(pydicom.DataElement("StudyInstanceUID", "UI", "Jane.1.2", validation_mode=0))
        dataset.save_as(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-7])
    caplog.set_level(logging.DEBUG)
    source = listed(tmp_path, "a.dcm", "b.dcm", window="full", patient_from_tag=True)
    source.index()
    source.load(0)
    with pytest.raises(BadRecord) as caught:
        source.load(1)
    shown = caplog.text + " ".join(str(each.message) for each in recwarn.list) + str(caught.value) + repr(source)
    assert not [word for word in ("Jane", "Doe", "QQQ", "a.dcm", "b.dcm") if word in shown]
    assert not recwarn.list


def test_a_volume_is_sliced_in_the_patients_axes_whatever_way_it_is_stored(tmp_path: Path) -> None:
    import nibabel

    volume = np.zeros((4, 5, 6), dtype=np.float32)
    volume[3, 4, 5] = 100.0  # Right, front, top.
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii")
    flipped = nibabel.Nifti1Image(volume[::-1, ::-1, ::-1].copy(), np.diag([-1.0, -1.0, -1.0, 1.0]))
    nibabel.save(flipped, tmp_path / "b.nii.gz")
    for plane, count, shape, hot in (("axial", 6, (5, 4), 5), ("coronal", 5, (6, 4), 4), ("sagittal", 4, (6, 5), 3)):
        source = listed(tmp_path, "a.nii", "b.nii.gz", kind="nifti", plane=plane, window=[0, 100])
        for position in (0, 1):
            slices = source.load(position).items
            assert len(slices) == count and slices[0].shape == shape
            assert [int(item.max()) for item in slices] == [255 * int(number == hot) for number in range(count)]
            # The top (or front) is the first row; the right is the last column.
            assert slices[hot][0, -1] == 255


def test_a_volume_of_four_dimensions_or_with_nan_is_a_bad_record(tmp_path: Path) -> None:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), dtype=np.float32), np.eye(4)), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), np.nan, dtype=np.float32), np.eye(4)), tmp_path / "b.nii")
    source = listed(tmp_path, "a.nii", "b.nii", "c.nii", "../outside.nii", kind="nifti")
    for position, message in enumerate(("three dimensions", "finite", "missing NIfTI file", "leaves the folder")):
        with pytest.raises(BadRecord, match=message):
            source.load(position)


def test_a_slice_and_its_mask_are_cut_alike_whatever_way_the_two_volumes_are_stored(tmp_path: Path) -> None:
    source = write_labelled(tmp_path, plane="axial", window=[0, 100])
    index = source.index()
    assert [record.row for record in index] == list(range(1, 7)) and len({record.key for record in index}) == 6
    assert {record.patient for record in index} == {"a.nii"}
    for position, record in enumerate(index):
        found = read_mask(record.cells["organ"])
        assert (found * 85 == source.load(position)).all() and found.shape == (5, 4)
    assert read_mask(index[5].cells["organ"])[0, -1] == 3  # Right, front, top.
    few = write_labelled(tmp_path, plane="sagittal", max_slices=2)
    assert [few.load(position).shape for position in range(len(few.index()))] == [(6, 5)] * 2


def write_labelled(folder: Path, **settings: Any) -> Source:
    import nibabel

    labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    labels[3, 4, 5] = 3
    nibabel.save(nibabel.Nifti1Image(labels * 100 / 3, np.eye(4)), folder / "a.nii")
    # Stored the other way round, and as floating-point numbers.
    turned = labels[::-1, :, ::-1].astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(turned, np.diag([-1.0, 1.0, -1.0, 1.0])), folder / "a-organ.nii.gz")
    (folder / "list.csv").write_text("file,organ\na.nii,a-organ.nii.gz\n")
    path = str(folder / "list.csv")
    return open_source({"kind": "nifti_slices", "path": path, "masks": ["organ"], **settings}, "sources.scans").open()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 2, 3)), "of its volume's size"),
        (np.full((2, 2, 2), 0.5), "whole numbers"),
        (np.full((2, 2, 2), np.nan), "whole numbers"),
        (np.full((2, 2, 2), -1), "whole number from 0"),
        (np.zeros((2, 2, 2, 2)), "three dimensions"),
        (None, "missing label volume"),
    ],
)
def test_a_label_volume_that_does_not_fit_costs_its_own_slices(tmp_path: Path, labels: Any, message: str) -> None:
    import nibabel

    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)), tmp_path / f"{name}.nii")
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "b-organ.nii")
    if labels is not None:
        nibabel.save(nibabel.Nifti1Image(labels.astype(np.float32), np.eye(4)), tmp_path / "a-organ.nii")
    (tmp_path / "list.csv").write_text("file,organ\na.nii,a-organ.nii\nb.nii,b-organ.nii\nc.nii,\n")
    settings = {"kind": "nifti_slices", "path": str(tmp_path / "list.csv"), "masks": ["organ"]}
    source = open_source(settings, "sources.scans").open()
    index = source.index()
    assert [record.patient for record in index] == ["a.nii"] * 2 + ["b.nii"] * 2 + ["c.nii"]
    for record in index[:2]:
        with pytest.raises(BadRecord, match=message):
            record.cells["organ"]
    assert [record.cells["organ"] for record in index[2:]] == ["mask 2 2 1*4"] * 2 + [""]
    assert "missing NIfTI file" in index[4].fault
    with pytest.raises(BadRecord, match="missing NIfTI file"):
        source.load(4)
