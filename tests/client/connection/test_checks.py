"""`check` finds what would go wrong later, says what to do, and keeps what it saw of the data on this machine."""

from __future__ import annotations

import csv
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.config import SiteConfig
from client.connection.checks import Check, check_site
from client.connection.keys import write_key_pair
from client.data.preview import Preview, write_previews
from client.protocol.site import Site
from common.privacy.noise import os_entropy
from common.run import RunConfig
from tests.federation import Authority
from tests.tiny import run_config, site_config

TASKS = {"finding": {"kind": "classification", "labels": ["no", "yes"]}}


def images(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    """A manifest of small pictures: name, patient, split, report."""
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", "split", "report"])
        writer.writerows(rows)
    for number, (name, *_) in enumerate(rows):
        if not name.startswith("missing"):
            pixels = np.full((20, 20, 3), 10 * number, dtype=np.uint8)
            pixels[0] = 255
            Image.fromarray(pixels).save(folder / name)
    return folder / "list.csv"


ROWS = [
    ("a.png", "p1", "train", "POS"),
    ("b.png", "p1", "train", "NEG"),
    ("c.png", "p2", "train", "NEG"),
    ("d.png", "p3", "test", ""),
]


def config(folder: Path, rows: list[tuple[str, str, str, str]] = ROWS, **changes: Any) -> SiteConfig:
    source = {
        "kind": "manifest",
        "path": str(images(folder, rows)),
        "patient": "patient",
        "split": "split",
    }
    task = {"source": "xrays", "label": "report", "values": {"POS": "yes", "NEG": "no"}, "missing": "skip"}
    values = {
        "unit": "patient",
        "sources": {"xrays": source},
        "tasks": {"finding": {**task, "public_size": 2}},
        "on_bad_record": "skip",
    }
    return site_config(folder, "site", **{**values, **changes})


def offers(**changes: Any) -> dict[str, RunConfig]:
    return {"tiny": run_config(tasks=TASKS, **changes)}


def seen(config: SiteConfig, offered: Mapping[str, RunConfig] | None = None) -> dict[str, Check]:
    found = check_site(config, offers() if offered is None else offered, offline=True)
    return {item.name: item for item in found}


def test_a_site_in_order_passes_and_only_the_coordinator_is_missing(tmp_path: Path) -> None:
    found = seen(config(tmp_path))
    assert [item.name for item in found.values() if item.outcome == "fail"] == ["coordinator"]
    assert found["sides"].detail.startswith("2 patients to train on, 1 held out")
    assert found["labels finding"].detail == "report: NEG 2, POS 1; 1 empty"
    assert found["task finding"].detail == "3 of 4 records have a label of the offered task"
    assert found["size finding"].outcome == "pass"


def test_values_outside_the_mapping_are_counted_and_named(tmp_path: Path) -> None:
    found = seen(config(tmp_path, [*ROWS, ("e.png", "p4", "train", "UNCLEAR"), ("f.png", "p5", "train", "UNCLEAR")]))
    assert found["labels finding"].outcome == "warn"
    assert "not in `values`: UNCLEAR 2" in found["labels finding"].detail
    assert found["labels finding"].remedy == "map them in tasks.finding.values"
    assert "2 do not fit (row 5: " in found["task finding"].detail


@pytest.mark.parametrize(("on_bad_record", "outcome"), [("stop", "fail"), ("skip", "warn")])
def test_a_patient_on_both_sides_fails_or_is_warned_of(tmp_path: Path, on_bad_record: str, outcome: str) -> None:
    found = seen(config(tmp_path, [*ROWS, ("e.png", "p3", "train", "NEG")], on_bad_record=on_bad_record))
    assert (found["sides"].outcome, found["sides"].remedy) == (outcome, "put all records of a patient on one side")
    assert "2 records are of patients on both sides (the first: list.csv row 4)" in found["sides"].detail


def test_pictures_that_are_held_out_and_trained_on_are_warned_of(tmp_path: Path) -> None:
    rows = [*ROWS, (ROWS[0][0], "p7", "test" if ROWS[0][2] == "train" else "train", "NEG")]
    found = seen(config(tmp_path, rows))["sides"]
    assert found.outcome == "warn"
    assert "1 of them are trained on too, as copies" in found.detail


def test_a_missing_picture_is_named_by_row(tmp_path: Path) -> None:
    rows = [*ROWS, ("missing.png", "p4", "train", "NEG")]
    assert "1 unusable (row 5: missing image)" in seen(config(tmp_path, rows))["source xrays"].detail
    assert seen(config(tmp_path, rows))["source xrays"].outcome == "warn"
    assert seen(config(tmp_path, rows, on_bad_record="stop"))["source xrays"].outcome == "fail"


def test_a_source_or_column_that_is_not_there_fails_with_its_key(tmp_path: Path) -> None:
    gone = {"xrays": {"kind": "manifest", "path": str(tmp_path / "gone.csv")}}
    found = seen(config(tmp_path, sources=gone, unit="example"))
    assert found["source xrays"].outcome == "fail"
    assert "gone.csv" in found["source xrays"].detail
    wrong = {"source": "xrays", "label": "reprot", "missing": "skip", "public_size": 2}
    found = seen(config(tmp_path, tasks={"finding": wrong}))
    assert (found["task finding"].outcome, "reprot" in found["task finding"].detail) == ("fail", True)


def test_a_public_size_far_from_the_truth_is_a_warning_only(tmp_path: Path) -> None:
    task = {"source": "xrays", "label": "report", "missing": "skip", "public_size": 500}
    found = seen(config(tmp_path, tasks={"finding": task}))["size finding"]
    assert (found.outcome, "declared 500, counted 2" in found.detail) == ("warn", True)


def test_an_offered_task_without_an_entry_is_a_warning(tmp_path: Path) -> None:
    found = seen(config(tmp_path), {"two": run_config(tasks={**TASKS, "age": {"kind": "regression", "range": [0, 9]}})})
    assert found["task age"].outcome == "warn"


def test_a_state_folder_open_to_others_fails(tmp_path: Path) -> None:
    site = config(tmp_path)
    site.state_dir.mkdir()
    site.state_dir.chmod(0o755)
    assert seen(site)["state"].outcome == "fail"
    site.state_dir.chmod(0o700)
    assert seen(site)["state"].outcome == "pass"


def test_a_ledger_that_is_gone_or_was_made_for_other_terms_fails(tmp_path: Path) -> None:
    site = config(tmp_path)
    assert seen(site)["ledger"].detail == "epsilon 100 of 100 left"
    Site(site, os_entropy).ledger()
    raised = config(tmp_path, budget={"epsilon": 200.0, "delta": 1e-5})
    assert (seen(raised)["ledger"].outcome, seen(raised)["ledger"].remedy) == ("fail", "headwater site amend")
    replies = site.state_dir / "runs" / "run-1" / "replies"
    replies.mkdir(parents=True)
    (replies / "x").write_bytes(b"")
    for path in (site.state_dir / "ledgers").rglob("*"):
        if path.is_file():
            path.unlink()
    assert seen(site)["ledger"].outcome == "fail"


def test_a_key_and_an_authority_are_tried(tmp_path: Path) -> None:
    coordinator = {"address": "x.org:9092", "ca": str(tmp_path / "ca.crt"), "key": str(tmp_path / "key")}
    found = seen(config(tmp_path, coordinator=coordinator))
    assert [found[name].outcome for name in ("key", "authority")] == ["fail", "fail"]
    Authority.new("north").write(tmp_path / "ca.crt")
    write_key_pair(tmp_path / "key", "site")
    found = seen(config(tmp_path, coordinator=coordinator))
    assert [found[name].outcome for name in ("key", "authority")] == ["pass", "pass"]


def test_cuda_without_a_gpu_fails(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert seen(config(tmp_path, device="cuda"))["device"].outcome == "fail"


def test_nothing_is_spent_or_joined_by_checking(tmp_path: Path) -> None:
    site = config(tmp_path, ledger_dir=str(tmp_path / "ledgers"))
    seen(site)
    assert not site.state_dir.exists()
    assert [path.name for path in (tmp_path / "ledgers").iterdir()] == [".fingerprints"]


# --- previews --------------------------------------------------------------------------------------------------------


def test_pictures_are_previewed_as_the_offered_backbone_sees_them_for_the_owner_only(tmp_path: Path) -> None:
    site = config(tmp_path)
    backbone = {"kind": "small_cnn", "input_size": 20}
    raw = write_previews(site, {})
    (preview,) = write_previews(site, offers(backbone={**backbone, "weights": "x.safetensors"}))
    sheet = preview.sheet
    assert sheet is not None
    assert raw == [preview]
    assert sheet.is_relative_to(site.state_dir)
    assert stat.S_IMODE(sheet.stat().st_mode) == 0o600
    assert stat.S_IMODE(sheet.parent.stat().st_mode) == 0o700
    with Image.open(sheet) as opened:
        assert opened.size == (6 * 128, 128)


def test_records_without_pictures_have_no_preview(tmp_path: Path) -> None:
    assert write_previews(site_config(tmp_path, "north"), {}) == [Preview("records", None)]


def test_an_excluded_patients_picture_is_not_previewed(tmp_path: Path) -> None:
    from client.data.exclusions import Exclusions

    site = config(tmp_path)
    Exclusions.read(site.state_dir).with_ids(["p1", "p2", "p3"]).write(site.state_dir)
    assert write_previews(site, {}) == [Preview("xrays", None)]


def outcome_of(config: SiteConfig, name: str) -> tuple[str, str, str]:
    """Outcome, detail and remedy of one check of a site, offline."""
    [found] = [item for item in check_site(config, {}, offline=True) if item.name == name]
    return found.outcome, found.detail, found.remedy


def test_the_place_of_the_ledger_is_said_and_an_old_one_named_with_the_line_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    usual = tmp_path / "home" / "headwater" / "ledgers"
    config = site_config(tmp_path, "north", ledger_dir=None)
    assert outcome_of(config, "ledger_dir") == ("pass", str(usual), "")
    old = config.model_copy(update={"ledger_dir": config.state_dir / "ledgers"})
    Site(old, os_entropy).ledger()
    assert outcome_of(old, "ledger_dir")[0] == "pass"
    outcome, _, remedy = outcome_of(config, "ledger_dir")
    assert outcome == "warn" and f"`ledger_dir: {config.state_dir / 'ledgers'}`" in remedy
    # Another site file of the population opens one at the usual place: both files are told.
    Site(site_config(tmp_path / "b", "north", ledger_dir=None), os_entropy).ledger()
    assert outcome_of(old, "ledger_dir")[0] == "warn"
    assert outcome_of(config, "ledger")[0] == "fail"


def test_a_folder_of_ledgers_that_others_can_read_fails(tmp_path: Path) -> None:
    config = site_config(tmp_path, "north")
    place = config.state_dir / "ledgers"
    Site(config, os_entropy).ledger()
    place.chmod(0o755)
    outcome, _, remedy = outcome_of(config, "ledger_dir")
    assert outcome == "fail" and remedy == f"chmod 700 {place}"
    place.chmod(0o700)
    assert outcome_of(config, "ledger_dir")[0] == "pass"
