"""The units of a run and their sides are frozen by the site's staff; a record that came later moves none of them."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.config import SiteConfig
from client.data.feature_store import FeatureStore
from client.data.prepare import Encoding, Preparation, prepare
from client.data.snapshot import SNAPSHOT, freeze_snapshot, name_units, open_snapshot, survey_sources
from common.model.backbones import open_pretrained
from common.tasks import open_task
from common.types import BadInput, Unit
from tests.client.data.test_trial import a_site, approve, invoke, row

BACKBONE = open_pretrained({"kind": "identity", "columns": [{"name": "age", "range": [0, 100], "missing": 0}]}, "b")
TASK = open_task({"kind": "classification", "labels": ["no", "yes"]}, "outcome")
ROWS = [f"p{at};{10 + at};{'yes' if at % 2 else 'no'};{'test' if at == 3 else 'train'}" for at in range(6)]


def prepared(config: SiteConfig) -> Preparation:
    encoding = Encoding(FeatureStore(config.state_dir / "features"), torch.device("cpu"))
    return prepare(config, {"outcome": TASK}, {"outcome": BACKBONE}, encoding, config.state_dir / "run" / "data")


def freeze(config: SiteConfig) -> None:
    freeze_snapshot(config, survey_sources(config))


def reasons(found: Preparation) -> list[str]:
    return [f"{problem.row}: {problem.reason.split(' of ')[0]}" for problem in found.problems]


@pytest.mark.parametrize("unit", ["example", "patient"])
@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_records_of_new_units_are_left_out_and_listed_until_the_next_check(
    tmp_path: Path, unit: str, on_bad_record: str
) -> None:
    config = a_site(tmp_path, ROWS, unit=unit, on_bad_record=on_bad_record)
    freeze(config)
    before = prepared(config)
    assert (before.num_units, before.problems) == ({"train": 5, "test": 1}, ())
    config = a_site(tmp_path, ["new;55;yes;train", *reversed(ROWS)], unit=unit, on_bad_record=on_bad_record)
    after = prepared(config)
    assert (after.num_units, reasons(after)) == (before.num_units, ["1: new since the check"])
    freeze(config)
    assert prepared(config).num_units == {"train": 6, "test": 1}


def test_a_later_record_moves_no_unit_to_the_other_side(tmp_path: Path) -> None:
    freeze(a_site(tmp_path, ROWS, unit="patient"))
    config = a_site(tmp_path, [*ROWS, "p3;60;yes;train", "p1;61;no;test"], unit="patient")
    assert prepared(config).num_units == {"train": 5, "test": 1}


def test_equal_records_that_are_units_of_their_own_are_counted(tmp_path: Path) -> None:
    equal = ["p;20;yes;train", "p;20;yes;train"]
    freeze(a_site(tmp_path, equal))
    config = a_site(tmp_path, [*equal, equal[0]])
    found = prepared(config)
    assert (found.num_units["train"], reasons(found)) == (2, ["3: new since the check"])


@pytest.mark.parametrize("changes", [{"unit": "patient"}, {"split": {"test_fraction": 0.5}}])
def test_a_changed_site_file_declines_for_every_record_alike(tmp_path: Path, changes: dict[str, object]) -> None:
    freeze(a_site(tmp_path, ROWS))
    config = a_site(tmp_path, ROWS, **changes)
    with pytest.raises(BadInput, match=r"^sources\.rows: the site file was changed since the check of .*site check`$"):
        prepared(config)
    freeze(config)
    prepared(config)


def test_a_damaged_snapshot_is_named_with_what_to_do(tmp_path: Path) -> None:
    config = a_site(tmp_path, ROWS)
    freeze(config)
    for damage in (b"", b"{}", b'{"key": 1}'):
        (config.state_dir / SNAPSHOT).write_bytes(damage)
        with pytest.raises(BadInput, match=r"^snapshot\.json: .*run `headwater site check`$"):
            open_snapshot(config, ["rows"])


def test_the_file_is_its_owners_only_and_holds_no_patient(tmp_path: Path) -> None:
    config = a_site(tmp_path, [line.replace("p", "canary-") for line in ROWS], unit="patient")
    freeze(config)
    path = config.state_dir / SNAPSHOT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "canary" not in path.read_text()
    assert len(json.loads(path.read_text())["sides"]) == len(ROWS)


def test_names_of_units_stay_when_records_are_reordered(tmp_path: Path) -> None:
    for unit in Unit:
        before = survey_sources(a_site(tmp_path, ROWS, unit=unit.value)).placed
        after = survey_sources(a_site(tmp_path, ROWS[::-1], unit=unit.value)).placed
        assert sorted(name_units(before, unit)) == sorted(name_units(after, unit))
        assert len(set(name_units(before, unit))) == len(ROWS)


def test_a_file_name_that_is_no_text_is_a_name_like_any_other(tmp_path: Path) -> None:
    config = a_site(tmp_path, ROWS)
    survey = survey_sources(config)
    odd = replace(survey.placed[0], record=replace(survey.placed[0].record, key="sc\udce4n.png"))
    snapshot = freeze_snapshot(config, replace(survey, placed=(odd, *survey.placed[1:])))
    assert len(snapshot.place([odd], Unit.EXAMPLE)[0]) == 1


# --- the commands ----------------------------------------------------------------------------------------------------


def frozen_units(config: SiteConfig) -> int | None:
    path = config.state_dir / SNAPSHOT
    return len(json.loads(path.read_text())["sides"]) if path.exists() else None


def test_check_and_approve_freeze_what_they_saw_unless_they_refuse(tmp_path: Path) -> None:
    good = [row(at, "50") for at in range(10)]
    config = a_site(tmp_path, [row(at, "x") for at in range(10)])
    assert "NOT IN FORCE" in approve(tmp_path).stderr
    invoke("check", tmp_path / "site.yaml", "--offline")
    assert frozen_units(config) is None
    a_site(tmp_path, good)
    assert "NOT IN FORCE" not in approve(tmp_path).stderr
    assert frozen_units(config) == 10
    a_site(tmp_path, [*good, row(10, "50")])
    invoke("check", tmp_path / "site.yaml", "--offline")
    assert frozen_units(config) == 11


def test_start_freezes_where_no_approval_is_needed_and_decides_before_it_knows_a_run(tmp_path: Path) -> None:
    nowhere = {"address": "127.0.0.1:1", "ca": str(tmp_path / "none.crt"), "key": str(tmp_path / "none")}
    config = a_site(tmp_path, ROWS, approval="automatic", coordinator=nowhere, task={"min_units": 6})
    (tmp_path / "offers" / "tiny.json").unlink()
    result = invoke("start", tmp_path / "site.yaml")
    assert result.exit_code == 1
    assert "tasks.outcome.min_units: expected at least 6 units with a label to train on, got 5" in result.stderr
    assert frozen_units(config) is None
    a_site(tmp_path, ROWS, approval="automatic", coordinator=nowhere, task={"min_units": 5})
    invoke("start", tmp_path / "site.yaml")
    assert frozen_units(config) == 6


def test_a_patient_on_both_sides_refuses_where_records_may_not_be_left_out(tmp_path: Path) -> None:
    rows = [row(at, "50") for at in range(10)]
    config = a_site(tmp_path, [*rows, "p0;50;yes;test"], unit="patient", on_bad_record="stop")
    result = approve(tmp_path)
    assert "NOT IN FORCE" in result.stderr and "its patient is on both sides" in result.stderr
    assert frozen_units(config) is None
