"""WFDB records and EDF files: the named channels, in one order, unit and rate, or a bad record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyedflib
import pytest
import wfdb
from numpy.typing import NDArray

from client.data.sources import Source, open_source
from client.data.sources.waveforms import MAX_SAMPLES
from common.types import BadRecord

TIME = np.arange(1000) / 500
LEADS = np.stack([np.sin(2 * np.pi * 3 * TIME), np.cos(2 * np.pi * 2 * TIME), TIME], axis=1)


def write(folder: Path, values_TC: NDArray[np.float64] = LEADS, rate: float = 500, units: str = "mV,mV,mmHg") -> None:
    names, count = ["I", "aVR", "ABP"], values_TC.shape[1]
    form = {"units": units.split(",")[:count], "sig_name": names[:count], "fmt": ["16"] * count}
    wfdb.wrsamp("a", rate, p_signal=values_TC, write_dir=str(folder), comments=["Ann Example"], **form)


def write_edf(folder: Path, rates: dict[str, int], unit: str = "uV") -> None:
    with pyedflib.EdfWriter(str(folder / "a.edf"), len(rates)) as file:
        form: dict[str, Any] = {"dimension": unit, "physical_min": -2000, "physical_max": 2000}
        file.setSignalHeaders([{"label": name, "sample_frequency": rate, **form} for name, rate in rates.items()])
        file.writeSamples([1000 * np.sin(2 * np.pi * 3 * np.arange(4 * rate) / rate) for rate in rates.values()])


def open_list(folder: Path, name: str = "a", channels: str = "I,aVR", rate: float = 500, **changes: Any) -> Source:
    (folder / "list.csv").write_text(f"record\n{name}\n", encoding="utf-8")
    named = {"channels": channels.split(","), "rate_hz": rate, **changes}
    return open_source({"kind": "waveforms", "path": str(folder / "list.csv"), **named}, "sources.ecg").open()


@pytest.mark.parametrize("name", ["a", "a.hea"])
def test_channels_come_by_their_names_in_the_order_of_the_settings(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    found = open_list(tmp_path, name, "ABP,avr").load(0)
    assert found.dtype == np.float32
    assert np.abs(found - LEADS[:, [2, 1]]).max() < 1e-4


def test_one_channel_is_a_series_without_channels(tmp_path: Path) -> None:
    write(tmp_path)
    assert open_list(tmp_path, channels="I").load(0).shape == (1000,)


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1e-3), ("V", 1e3), ("mV", 1.0), ("mmHg", 1.0)])
def test_volts_come_in_millivolts_and_other_units_as_they_are(tmp_path: Path, unit: str, factor: float) -> None:
    write(tmp_path, units=f"{unit},{unit},mmHg")
    assert open_list(tmp_path).load(0) == pytest.approx(LEADS[:, :2] * factor, abs=1e-4 * factor)


def test_another_rate_is_resampled(tmp_path: Path) -> None:
    write(tmp_path, LEADS[:, :2])
    found = open_list(tmp_path, rate=100).load(0)
    assert found.shape == (200, 2)
    # Away from the ends, of which a filter knows one side.
    assert np.abs(found - LEADS[::5, :2])[20:-20].max() < 0.01


def test_channels_of_different_rates_come_at_one(tmp_path: Path) -> None:
    write_edf(tmp_path, {"ECG": 200, "Resp": 50})
    found = open_list(tmp_path, "a.edf", "ECG,Resp", rate=100).load(0)
    assert found.shape == (400, 2)
    wave = np.sin(2 * np.pi * 3 * np.arange(400) / 100)
    assert np.abs(found - wave[:, None])[20:-20].max() < 0.01


def test_several_samples_of_a_frame_are_a_higher_rate(tmp_path: Path) -> None:
    fast, slow = LEADS[:, 0], LEADS[::2, 0]
    form = {"fmt": ["16"] * 2, "samps_per_frame": [2, 1], "write_dir": str(tmp_path)}
    wfdb.wrsamp("a", 250, ["mV"] * 2, ["I", "aVR"], e_p_signal=[fast, slow], **form)
    assert open_list(tmp_path, channels="I", rate=500).load(0) == pytest.approx(fast, abs=1e-4)
    assert open_list(tmp_path, channels="aVR", rate=250).load(0) == pytest.approx(slow, abs=1e-4)


def test_a_file_of_the_package_is_read() -> None:
    folder = Path(pyedflib.__file__).parent / "data"
    listed = folder / "test_generator.edf"
    with pyedflib.EdfReader(str(listed)) as file:
        (name,) = [label for label in file.getSignalLabels() if label.startswith("sine 8 Hz")]
    values = read_alone(listed, name)
    peak = np.abs(np.fft.rfft(values - values.mean())).argmax() / len(values) * 200
    assert peak == pytest.approx(8, abs=0.01)


def read_alone(path: Path, name: str) -> NDArray[np.float32]:
    settings = {"kind": "waveforms", "path": "list.csv", "channels": [name], "rate_hz": 200}
    found: NDArray[np.float32] = open_source(settings, "sources.ecg").read(path)  # type: ignore[attr-defined]
    return found


def test_invalid_samples_are_gaps(tmp_path: Path) -> None:
    values = LEADS[:, :2].copy()
    values[100] = np.nan
    write(tmp_path, values)
    with pytest.raises(BadRecord, match="without gaps"):
        open_list(tmp_path).load(0)
    found = open_list(tmp_path, gaps="hold").load(0)
    assert (found[100] == found[99]).all()
    assert found[101] == pytest.approx(values[101], abs=1e-4)


@pytest.mark.parametrize(
    ("channels", "said"), [("I,V6", "one channel 'V6', got none"), ("I,", "one channel '', got none")]
)
def test_a_channel_that_is_not_there_is_named(tmp_path: Path, channels: str, said: str) -> None:
    write(tmp_path)
    with pytest.raises(BadRecord, match=said):
        open_list(tmp_path, channels=channels).load(0)


def test_a_channel_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    write(tmp_path)
    header = tmp_path / "a.hea"
    header.write_text(header.read_text().replace(" aVR", " i"))
    with pytest.raises(BadRecord, match="one channel 'I', got 2"):
        open_list(tmp_path, channels="I").load(0)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("a 2 500 1000\n../b.dat 16 1000/mV 16 0 0 0 0 I\n../b.dat 16 1000/mV 16 0 0 0 0 aVR\n", "unreadable waveform"),
        ("a 2 500 1000\nb.dat 16 1000/mV 16 0 0 0 0 I\na.dat 16 1000/mV 16 0 0 0 0 aVR\n", "beside its header"),
        ("a 2 500 1000\ns3://x/a.dat 16 1 16 0 0 0 0 I\na.dat 16 1000/mV 16 0 0 0 0 aVR\n", "unreadable waveform"),
        ("a 2 500 999999999999\na.dat 16 1000/mV 16 0 0 0 0 I\na.dat 16 1000/mV 16 0 0 0 0 aVR\n", "million samples"),
        (
            "a 2 500 1000\na.dat 16 1000/mV 16 0 0 0 0 I\na.dat 16x999999 1000/mV 16 0 0 0 0 aVR\n",
            "at most 128 million samples",
        ),
        ("a 2 .0001 2\na.dat 16 1000/mV 16 0 0 0 0 I\na.dat 16 1000/mV 16 0 0 0 0 aVR\n", "a rate from 5 to 500000 Hz"),
        ("a/2 3 500 1000\nb 500\nc 500\n", "one segment"),
        ("Ann Example", "unreadable waveform"),
        ("", "unreadable waveform"),
        ("a 2 500 4000\na.dat 16 1000/mV 16 0 0 0 0 I\na.dat 16 1000/mV 16 0 0 0 0 aVR\n", "unreadable waveform"),
    ],
)
def test_a_header_that_is_wrong_costs_its_record_alone(tmp_path: Path, header: str, said: str) -> None:
    write(tmp_path, LEADS[:, :2])
    (tmp_path / "a.hea").write_text(header, encoding="utf-8")
    with pytest.raises(BadRecord, match=said) as caught:
        open_list(tmp_path, channels="I").load(0)
    assert "Ann" not in str(caught.value)


def test_a_large_file_whose_header_says_no_length_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, LEADS[:, :1])
    (tmp_path / "a.hea").write_text("a 1 500\na.dat 80 1000/mV 8 128 0 0 0 I\n", encoding="utf-8")
    assert len(open_list(tmp_path, channels="I", gaps="hold").load(0)) == 2000
    with (tmp_path / "a.dat").open("r+b") as file:
        file.truncate(MAX_SAMPLES + 1)
    with pytest.raises(BadRecord, match="million samples"):
        open_list(tmp_path, channels="I").load(0)


@pytest.mark.parametrize("part", ["a.hea", "a.dat"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, part: str) -> None:
    write(tmp_path)
    (tmp_path / "root").mkdir()
    for name in ("a.hea", "a.dat"):
        place = tmp_path / "root" / name
        place.symlink_to(tmp_path / name) if name == part else place.hardlink_to(tmp_path / name)
    with pytest.raises(BadRecord, match="a link out of the folder"):
        open_list(tmp_path, channels="I", root=str(tmp_path / "root")).load(0)


@pytest.mark.parametrize("data", [b"", b"0" * 256, b"not an EDF file"])
def test_an_edf_file_that_is_none_is_a_bad_record(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.edf").write_bytes(data)
    with pytest.raises(BadRecord, match="unreadable waveform"):
        open_list(tmp_path, "a.edf").load(0)


def test_a_change_of_the_signals_alone_changes_the_digest(tmp_path: Path) -> None:
    write(tmp_path)
    before = open_list(tmp_path).digest()
    assert open_list(tmp_path).digest() == before
    with (tmp_path / "a.dat").open("ab") as file:
        file.write(b"\0\0")
    assert open_list(tmp_path).digest() != before
