"""Populations that share patients are noticed by keyed fingerprints, which hold no id."""

from __future__ import annotations

import hmac
from hashlib import sha256
from pathlib import Path

import pytest

from client.config import SiteConfig
from client.connection.checks import Check, check_site, freeze_records
from client.ledger.overlap import forget_patients, record_patients
from client.protocol.purge import purge
from client.protocol.site import Site
from common.privacy.noise import os_entropy
from tests.tiny import site_config

FIRST = [f"patient-{number}" for number in range(100)]


def read_all(ledgers: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (ledgers / ".fingerprints").iterdir()}


def test_common_patients_are_counted_in_both_directions_and_only_between_populations(tmp_path: Path) -> None:
    assert record_patients(tmp_path, "hearts", tmp_path / "a", FIRST) == {}
    assert record_patients(tmp_path, "lungs", tmp_path / "b", [*FIRST[90:], *"xyz"]) == {"hearts": 10}
    assert record_patients(tmp_path, "kidneys", tmp_path / "c", "xyz") == {"lungs": 3}
    assert record_patients(tmp_path, "hearts", tmp_path / "a", FIRST) == {"lungs": 10}
    # Another site file of the same population adds to it.
    assert record_patients(tmp_path, "hearts", tmp_path / "d", "xyz") == {"kidneys": 3, "lungs": 3}
    assert record_patients(tmp_path, "lungs", tmp_path / "b", [*FIRST[90:], *"xyz"]) == {"hearts": 13, "kidneys": 3}


def test_what_is_recorded_last_counts(tmp_path: Path) -> None:
    record_patients(tmp_path, "hearts", tmp_path / "a", FIRST)
    record_patients(tmp_path, "hearts", tmp_path / "a", FIRST[:5])
    assert record_patients(tmp_path, "lungs", tmp_path / "b", FIRST) == {"hearts": 5}
    forget_patients(tmp_path, "hearts", tmp_path / "a")
    assert record_patients(tmp_path, "lungs", tmp_path / "b", FIRST) == {}


def test_the_files_are_the_owners_alone_and_hold_sorted_keyed_hashes_and_no_id(tmp_path: Path) -> None:
    record_patients(tmp_path, "hearts", tmp_path / "a", [*FIRST, FIRST[0]])
    folder = tmp_path / ".fingerprints"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))
    files = read_all(tmp_path)
    [name] = [name for name in files if name.startswith("hearts.")]
    key = files[".key"]
    assert len(key) == 32
    expected = sorted(hmac.digest(key, b"patient " + patient.encode(), sha256)[:8] for patient in FIRST)
    kept = [files[name][at : at + 8] for at in range(8, len(files[name]), 8)]
    assert kept == expected
    assert not any(b"patient" in content for content in files.values())
    # Each machine has a key of its own.
    record_patients(tmp_path / "other", "hearts", tmp_path / "a", FIRST)
    assert not set(kept) & {read_all(tmp_path / "other")[name][at : at + 8] for at in range(0, 808, 8)}


def test_fingerprints_of_a_lost_key_are_left_alone_until_they_are_made_anew(tmp_path: Path) -> None:
    record_patients(tmp_path, "hearts", tmp_path / "a", FIRST)
    (tmp_path / ".fingerprints" / ".key").unlink()
    assert record_patients(tmp_path, "lungs", tmp_path / "b", FIRST) == {}
    assert record_patients(tmp_path, "hearts", tmp_path / "a", FIRST) == {"lungs": 100}


# --- at a site -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "headwater" / "ledgers"


def clinic(folder: Path, registry: str, patients: list[str], unit: str = "patient", column: str = "who") -> SiteConfig:
    """A site with one record of each patient."""
    folder.mkdir()
    rows = [f"{number},{patient},{'ab'[number % 2]}" for number, patient in enumerate(patients)]
    (folder / "rows.csv").write_text("\n".join(["age,who,label", *rows]))
    source = {"kind": "table", "path": str(folder / "rows.csv"), "columns": ["age"]}
    return site_config(
        folder,
        registry,
        registry=registry,
        unit=unit,
        ledger_dir=None,
        sources={"rows": source | ({"patient": column} if column else {})},
        tasks={"label": {"source": "rows", "label": "label", "missing": "refuse", "public_size": 20}},
    )


def find_overlaps(config: SiteConfig) -> list[Check]:
    return [found for found in check_site(config, {}, offline=True) if found.name == "overlap"]


@pytest.mark.parametrize("unit", ["patient", "example"])
def test_check_names_the_other_registry_and_the_number_of_common_patients(tmp_path: Path, unit: str) -> None:
    hearts = clinic(tmp_path / "a", "hearts", [str(1000 + number) for number in range(20)], unit)
    lungs = clinic(tmp_path / "b", "lungs", [f"{1015 + number}.0" for number in range(20)], unit)
    assert [found.outcome for found in find_overlaps(hearts)] == ["pass"]
    [found] = find_overlaps(lungs)
    assert found.outcome == "warn"
    assert found.detail.startswith("5 patient(s) of this site are in registry hearts too: ")
    [found] = find_overlaps(hearts)
    assert found.detail.startswith("5 patient(s) of this site are in registry lungs too: ")


def test_approving_a_run_says_so_too(tmp_path: Path) -> None:
    hearts, lungs = (clinic(tmp_path / name, name, ["7", "8", "9"]) for name in ("hearts", "lungs"))
    assert freeze_records(hearts, []) == []
    [found] = freeze_records(lungs, [])
    assert (found.name, found.outcome) == ("overlap", "warn")


def test_records_without_patients_are_said_not_to_be_compared(tmp_path: Path) -> None:
    [found] = find_overlaps(clinic(tmp_path / "a", "hearts", ["1", "2"], "example", column=""))
    assert (found.outcome, found.detail) == (
        "pass",
        "records without patient ids are not compared with other registries",
    )


def test_a_folder_of_ledgers_that_cannot_be_written_fails_the_check(tmp_path: Path) -> None:
    config = clinic(tmp_path / "a", "hearts", ["1", "2"])
    (tmp_path / "file").write_text("")
    [found] = find_overlaps(config.model_copy(update={"ledger_dir": tmp_path / "file" / "ledgers"}))
    assert found.outcome == "fail" and "ledger_dir" in found.remedy


def test_a_purge_removes_the_sites_fingerprints_and_a_check_makes_them_without_the_patient(
    tmp_path: Path, home: Path
) -> None:
    hearts, lungs = (clinic(tmp_path / name, name, ["7", "8", "9"]) for name in ("hearts", "lungs"))
    find_overlaps(hearts)
    assert [name for name in read_all(home) if name.startswith("hearts.")]
    purge(Site(hearts, os_entropy), ["8"])
    assert not [name for name in read_all(home) if name.startswith("hearts.")]
    find_overlaps(hearts)
    [found] = find_overlaps(lungs)
    assert found.detail.startswith("2 patient(s)")
