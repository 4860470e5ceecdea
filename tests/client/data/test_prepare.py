"""From a site's files to units: labels as the site's file maps them, bad records named by file and row."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import stat
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.config import SiteConfig
from client.data.feature_store import FeatureStore
from client.data.prepare import ARRAYS, Encoding, Preparation, open_units, prepare
from client.data.records import Side
from client.data.snapshot import freeze_snapshot, survey_sources
from client.data.sources import open_source
from client.data.units import TaskRecords, Units
from common.model.backbones import Backbone, open_pretrained, open_random
from common.plugins import plugin_class
from common.tasks import Task, open_task
from common.types import BadInput
from common.yaml import parse

CPU = torch.device("cpu")
HEADER = ["a", "b", "colour", "size", "patient", "part"]
TASKS: dict[str, Task] = {
    "colour": open_task({"kind": "classification", "labels": ["red", "green", "blue"]}, "tasks.colour"),
    "size": open_task({"kind": "regression", "range": [0, 10]}, "tasks.size"),
}
BACKBONE: Backbone = open_pretrained(
    {
        "kind": "identity",
        "columns": [{"name": name, "range": [-1000, 1000], "missing": "refuse"} for name in ("a", "b")],
    },
    "backbone",
)


def small_net(input_size: int) -> Backbone:
    """An encoder of pictures."""
    net = {"kind": "small_cnn", "input_size": input_size, "channels": [4], "pool": 1}
    return open_random(net, "backbone", seed=0)


def write(folder: Path, rows: Sequence[Sequence[object]], name: str = "rows.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return folder / name


def task(column: str, **changes: Any) -> dict[str, Any]:
    return {"source": "rows", "label": column, "missing": "refuse", "public_size": 10, **changes}


def site(folder: Path, **changes: Any) -> SiteConfig:
    """A site whose records are in rows.csv."""
    table = {"kind": "table", "path": "rows.csv", "columns": ["a", "b"], "split": "part"}
    values: dict[str, Any] = {
        "name": "here",
        "registry": "here",
        "unit": "example",
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"rows": {**table, **changes.pop("table", {})}},
        "tasks": {"colour": task("colour"), "size": task("size")},
        "split": {"test_fraction": 0.0},
        "on_bad_record": "skip",
        "evaluation": "local",
        "state_dir": "state",
        **changes,
    }
    return parse(SiteConfig, values, base=folder)


def prepared(folder: Path, config: SiteConfig, tasks: Sequence[str] = ("colour", "size")) -> Preparation:
    chosen = {name: TASKS[name] for name in tasks}
    store = FeatureStore(folder / "features")
    return prepare(config, chosen, dict.fromkeys(chosen, BACKBONE), Encoding(store, CPU), folder / "run" / "data")


def units(folder: Path, side: Side = "train", tasks: Sequence[str] = ("colour", "size")) -> Units:
    return open_units(folder / "run" / "data", side, tasks, CPU)


def listed(folder: Path) -> list[list[str]]:
    """The rows of problems.csv."""
    with (folder / "run" / "problems.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "row", "task", "reason"]
    return rows


ROWS = [
    [1, 2, "red", 3, "ann", "train"],
    [4, 5, "blue", 0, "bea", "test"],
    [7, 8, "green", 9, "ann", "train"],
    [10, 11, "green", 5, "cem", "train"],
]


def test_each_side_has_its_records_features_and_labels(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    preparation = prepared(tmp_path, site(tmp_path))
    assert preparation.num_units == {"train": 3, "test": 1}
    assert preparation.problems == ()
    assert listed(tmp_path) == []
    train, test = units(tmp_path), units(tmp_path, "test")
    assert (train.num_units, test.num_units) == (3, 1)
    # [-1000, 1000] becomes [-1, 1].
    torch.testing.assert_close(train.tasks["colour"].features_RD, torch.tensor([[1, 2], [7, 8], [10, 11]]) / 1000)
    assert train.tasks["colour"].labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(
        train.tasks["size"].labels, torch.stack([TASKS["size"].codec.encode([size]) for size in ("3", "9", "5")])
    )
    torch.testing.assert_close(test.tasks["size"].features_RD, torch.tensor([[4, 5]]) / 1000)
    assert test.tasks["colour"].labels.tolist() == [2]
    assert train.tasks["colour"].unit_R.tolist() == [0, 1, 2]
    assert train.tasks["colour"].weight_R.tolist() == [1, 1, 1]
    assert train.tasks["colour"].features_RD is train.tasks["size"].features_RD
    assert set(units(tmp_path, tasks=["size"]).tasks) == {"size"}


def test_a_mask_stands_beside_its_own_records_on_each_side(tmp_path: Path) -> None:
    sides = ["test", "train", "test", "train", "train"]
    write(
        tmp_path, [[1, 1, colour, 5, "", side] for colour, side in zip(["red", "", "", "blue", ""], sides, strict=True)]
    )
    prepared(tmp_path, site(tmp_path, tasks={"colour": task("colour", missing="skip"), "size": task("size")}))
    assert units(tmp_path).tasks["colour"].mask_R.tolist() == [False, True, False]
    assert units(tmp_path, "test").tasks["colour"].mask_R.tolist() == [True, False]


def test_a_patient_is_one_unit_across_sources_and_shares_its_weight_among_its_records(tmp_path: Path) -> None:
    write(tmp_path, [[*row[:5], ""] for row in ROWS])
    write(tmp_path, [[0, 0, "red", 1, patient, ""] for patient in ("dan", "cem", "cem", "cem")], "more.csv")
    table = {"kind": "table", "columns": ["a", "b"], "patient": "patient"}
    config = site(
        tmp_path,
        unit="patient",
        sources={"rows": {**table, "path": "rows.csv"}, "more": {**table, "path": "more.csv"}},
        tasks={"colour": task("colour"), "size": task("size", source="more")},
    )
    assert prepared(tmp_path, config).num_units == {"train": 4, "test": 0}
    found = units(tmp_path)
    colour, size = found.tasks["colour"], found.tasks["size"]
    people: dict[str, int] = {}
    for name, records, patients in (("colour", colour, "ann bea ann cem"), ("size", size, "dan cem cem cem")):
        for unit, patient in zip(records.unit_R.tolist(), patients.split(), strict=True):
            assert people.setdefault(patient, unit) == unit, name
    assert sorted(people.values()) == [0, 1, 2, 3]
    torch.testing.assert_close(colour.weight_R, torch.tensor([1 / 2, 1, 1 / 2, 1]))
    torch.testing.assert_close(size.weight_R, torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]))


def test_examples_of_different_sources_are_different_units(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    table = {"kind": "table", "path": "rows.csv", "columns": ["a", "b"]}
    config = site(
        tmp_path,
        sources={"rows": table, "again": table},
        tasks={"colour": task("colour"), "size": task("size", source="again")},
    )
    assert prepared(tmp_path, config).num_units["train"] == 8
    found = units(tmp_path).tasks
    assert not set(found["colour"].unit_R.tolist()) & set(found["size"].unit_R.tolist())


@pytest.mark.parametrize(
    ("cell", "changes", "label", "reason"),
    [
        ("red", {}, 0, None),
        ("", {}, None, "missing label"),
        ("", {"missing": "skip"}, None, None),
        ("q7-pink", {}, None, "expected one of the task's labels in one column"),
        ("q7-pink", {"unmapped": "skip"}, None, None),
        ("2.0", {"values": {"1": "red", "2": "blue"}}, 2, None),
        # The task's own value needs no mapping.
        ("green", {"values": {"1": "red"}}, 1, None),
        ("q7", {"values": {"q7": "green"}}, 1, None),
    ],
)
def test_a_label_is_mapped_skipped_or_refused_as_the_site_says(
    tmp_path: Path, cell: str, changes: dict[str, Any], label: int | None, reason: str | None
) -> None:
    write(tmp_path, [ROWS[0], [1, 1, cell, 5, "", "train"]])
    config = site(tmp_path, tasks={"colour": task("colour", **changes), "size": task("size")})
    preparation = prepared(tmp_path, config)
    assert listed(tmp_path) == ([] if reason is None else [["rows.csv", "2", "colour", reason]])
    assert [problem.reason for problem in preparation.problems] == ([] if reason is None else [reason])
    found = units(tmp_path).tasks
    # The record stays: another task has its label, and a divisor must not depend on labels.
    assert found["size"].mask_R.tolist() == [True, True]
    assert found["colour"].mask_R.tolist() == [True, label is not None]
    assert found["colour"].labels[1] == (TASKS["colour"].codec.missing() if label is None else label)
    assert found["colour"].weight_R.tolist() == [1, 1]


def test_a_record_without_features_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, [ROWS[0], ["q7", 1, "red", 5, "", "train"], [1, "", "red", 5, "", "test"], ROWS[1]])
    assert prepared(tmp_path, site(tmp_path)).num_units == {"train": 1, "test": 1}
    how = "(a source `table` reads others with `decimal` and `thousands`)"
    assert listed(tmp_path) == [
        ["rows.csv", "2", "", f"column 'a': expected a number with a decimal point {how}"],
        ["rows.csv", "3", "", "column 'b': expected a value, got an empty cell"],
    ]


def test_a_blank_patient_is_refused_by_row(tmp_path: Path) -> None:
    write(tmp_path, [ROWS[0], [1, 1, "red", 5, "  ", "train"]])
    config = site(tmp_path, unit="patient", table={"patient": "patient"})
    assert prepared(tmp_path, config).num_units["train"] == 1
    assert listed(tmp_path) == [["rows.csv", "2", "", "blank patient id"]]


def test_a_patient_unit_needs_a_source_with_patients(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    assert prepared(tmp_path, site(tmp_path, unit="patient")).num_units == {"train": 0, "test": 0}
    assert listed(tmp_path)[0][:2] == ["rows.csv", "1"]
    assert "the unit is patient, and the source has no patients" in listed(tmp_path)[0][3]


def test_bad_records_are_left_out_and_listed_also_where_they_are_to_stop_an_approval(tmp_path: Path) -> None:
    write(tmp_path, [ROWS[0], ["q7", 1, "red", 5, "", "train"], [1, 1, "q7-pink", 5, "", "train"]])
    config = site(tmp_path, on_bad_record="stop")
    assert prepared(tmp_path, config).num_records == 3
    assert [row[1] for row in listed(tmp_path)] == ["2", "3"]
    assert units(tmp_path).tasks["size"].mask_R.tolist() == [True, True]
    write(tmp_path, ROWS)
    freeze_snapshot(config, survey_sources(config))
    assert prepared(tmp_path, config).problems == ()
    assert listed(tmp_path) == []


@pytest.mark.parametrize("rows", [[], [ROWS[1]], [["q7", 1, "red", 5, "", ""]]], ids=["no rows", "test only", "bad"])
@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_a_site_without_a_record_to_train_on_is_reported_and_goes_on(
    tmp_path: Path, rows: list[list[object]], on_bad_record: str
) -> None:
    write(tmp_path, rows)
    assert prepared(tmp_path, site(tmp_path, on_bad_record=on_bad_record)).num_units["train"] == 0
    assert listed(tmp_path)[-1] == ["rows", "", "", "no record to train on"]
    found = units(tmp_path)
    assert found.num_units == 0
    assert found.tasks["colour"].features_RD.shape == (0, 2)
    assert found.tasks["colour"].labels.shape == found.tasks["colour"].mask_R.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": {"colour": task("hue"), "size": task("size")}}, "tasks.colour.label: rows.csv has no column 'hue'"),
        ({"table": {"columns": ["a", "c"]}}, "expected exactly one column 'c'"),
        ({"table": {"path": "absent.csv"}}, "absent.csv: expected a readable table"),
        ({"sources": {"rows": {"kind": "tabel"}}}, "sources.rows.kind: expected one of"),
    ],
)
def test_a_site_file_that_does_not_fit_the_data_is_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(BadInput) as caught:
        prepared(tmp_path, site(tmp_path, **changes))
    assert expected in str(caught.value)


def restricted(folder: Path, text: str, name: str = "part.csv") -> dict[str, Any]:
    (folder / name).write_text(text, encoding="utf-8")
    return {"rows": name}


def test_sites_that_share_a_source_share_its_features_and_keep_their_own_rows(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    prepared(tmp_path, site(tmp_path, table=restricted(tmp_path, "row,split\n4,test\n2,train\n")))
    assert units(tmp_path).tasks["colour"].labels.tolist() == [2]
    assert units(tmp_path, "test").tasks["colour"].labels.tolist() == [1]
    other = site(tmp_path, table=restricted(tmp_path, "row,split\n3,\n1,\n"), state_dir="other")
    prepared(tmp_path, other)
    assert sorted(units(tmp_path).tasks["colour"].labels.tolist()) == [0, 1]
    assert len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("text", ["5,\n", "0,\n", "1,\n1,\n", "q7,\n"])
def test_a_line_of_a_row_list_that_names_no_row_is_listed(tmp_path: Path, text: str) -> None:
    write(tmp_path, ROWS)
    part = restricted(tmp_path, "row,split\n2,train\n" + text)
    assert prepared(tmp_path, site(tmp_path, table=part)).num_units["train"] >= 1
    bad = str(1 + len(text.splitlines()))
    assert listed(tmp_path) == [["part.csv", bad, "", "expected a row of the source, each once"]]


@pytest.mark.parametrize("text", ["row\n1\n", "1,train\n"])
def test_a_row_list_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(BadInput, match=r"part\.csv: expected") as caught:
        prepared(tmp_path, site(tmp_path, table=restricted(tmp_path, text)))
    assert "q7" not in str(caught.value)


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.integers(0, 200), unique=True, min_size=1, max_size=30),
    kept=st.integers(0, 30),
    random=st.randoms(use_true_random=False),
)
def test_no_record_changes_sides_when_the_table_grows_or_is_sorted_anew(
    values: list[int], kept: int, random: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def held_out(numbers: list[int]) -> set[int]:
        folder = tmp_path_factory.mktemp("site")
        write(folder, [[number, 0, "red", 1, f"p{number // 3}", ""] for number in numbers])
        config = site(folder, split={"test_fraction": 0.4}, table={"patient": "patient"})
        prepared(folder, config)
        features_RD = units(folder, "test").tasks["colour"].features_RD
        shutil.rmtree(folder)
        return set((features_RD[:, 0] * 1000).round().int().tolist())

    few = values[:kept]
    random.shuffle(values)
    assert held_out(values) & set(few) == held_out(few)
    people = {number // 3 for number in held_out(values)}
    assert not people & {number // 3 for number in set(values) - held_out(values)}


def test_what_is_written_is_for_its_owner_only(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    before = os.umask(0)
    try:
        prepared(tmp_path, site(tmp_path))
    finally:
        os.umask(before)
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name


def test_units_are_not_opened_before_they_are_prepared_nor_after_their_features_are_gone(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(BadInput, match="prepare the run again"):
        units(tmp_path)
    prepared(tmp_path, site(tmp_path))
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(BadInput, match="prepare the run again"):
        units(tmp_path)


def test_units_are_kept_in_memory_until_somebody_touches_their_files(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    prepared(tmp_path, site(tmp_path))
    first = units(tmp_path)
    assert units(tmp_path) is first
    assert units(tmp_path, "test") is not first and units(tmp_path, tasks=["colour"]) is not first
    for path in (tmp_path / "run" / "data" / ARRAYS, next(tmp_path.glob("features/*/features.npy"))):
        kept = units(tmp_path)
        path.touch()
        assert units(tmp_path) is not kept
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="prepare the run again"):
            units(tmp_path)
        damaged[-1] ^= 1
        path.write_bytes(damaged)


def test_units_whose_values_a_solver_changed_are_read_again(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    prepared(tmp_path, site(tmp_path))
    whole = [each.clone() for each in list_values(units(tmp_path).tasks["colour"])]
    for place, value in enumerate(whole):
        list_values(units(tmp_path).tasks["colour"])[place].zero_()
        assert torch.equal(list_values(units(tmp_path).tasks["colour"])[place], value)


def list_values(records: TaskRecords) -> list[torch.Tensor]:
    assert records.rows is not None
    return [records.features_RD, records.labels, records.mask_R, records.rows.integers, records.rows.scale]


def test_what_is_computed_from_units_is_made_once_and_had_by_one_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    prepared(tmp_path, site(tmp_path))
    made = iter(range(9))
    opened = units(tmp_path)
    with opened.borrow("key", lambda: next(made)) as first, opened.borrow("key", lambda: next(made)) as second:
        assert (first, second) == (0, 1)
    with opened.borrow("key", lambda: next(made)) as again:
        assert again in (first, second)
    with opened.borrow("other", lambda: next(made)) as third:
        assert third == 2
    for key in ("third", "other"):
        with opened.borrow(key, lambda: next(made)) as last:
            assert last == 2 + (key == "third")
    with opened.borrow("key", lambda: next(made)) as gone:
        assert gone == 4


def test_training_on_the_units_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    prepared(tmp_path, site(tmp_path))
    units(tmp_path).tasks["colour"].features_RD.zero_()
    assert units(tmp_path).tasks["colour"].features_RD.abs().sum() > 0


def test_a_canary_in_ids_paths_labels_and_contents_shows_up_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    manifest: Any = plugin_class("client.data.sources", "manifest")
    example = manifest.example(tmp_path)
    (tmp_path / "q7-ann-1.png").write_bytes(b"q7-no-picture")
    images = small_net(6)
    finding = {
        "finding": open_task({"kind": "classification", "labels": ["benign", "malignant"]}, "tasks.finding"),
    }
    texts: list[str] = []
    for values in ({"z-benign": "benign"}, {"z-benign": "benign", "z-malignant": "malignant"}):
        for on_bad_record in ("skip", "stop"):
            config = site(
                tmp_path,
                unit="patient",
                on_bad_record=on_bad_record,
                sources={"rows": dict(example.settings)},
                tasks={"finding": task("finding", values=values)},
            )
            try:
                preparation = prepare(
                    config,
                    finding,
                    {"finding": images},
                    Encoding(FeatureStore(tmp_path / "features"), CPU),
                    tmp_path / "run" / "data",
                )
                texts += [repr(preparation), *map(repr, preparation.problems)]
                texts.append(repr(open_units(tmp_path / "run" / "data", "train", ["finding"], CPU)))
            except BadInput as error:
                texts.append("".join(traceback.format_exception(error)))
            texts.append((tmp_path / "run" / "problems.csv").read_text())
    features = FeatureStore(tmp_path / "features").open_or_encode(
        open_source(example.settings, "s").open(), images, device=CPU
    )
    texts += [repr(features), caplog.text]
    for path in [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "features").rglob("*.json")]:
        texts.append(path.read_bytes().decode(errors="replace"))
    for text in texts:
        assert not [secret for secret in example.secrets if secret in text]
    assert {tuple(row[:2]) for row in listed(tmp_path)} == {("list.csv", "1"), ("list.csv", "5")}


def test_the_true_number_of_units_is_in_no_repr(tmp_path: Path) -> None:
    write(tmp_path, [[number, 0, "red", 1, "", "train"] for number in range(137)])
    assert "137" not in repr(prepared(tmp_path, site(tmp_path))) + repr(units(tmp_path))


def test_brain_mri_keeps_its_own_split(assets: Path, tmp_path: Path) -> None:
    path = assets / "data" / "brain_mri_4class" / "brain_mri_128.npz"
    parts = {side: {"inputs": f"{side}_images", "labels": {"label": f"{side}_labels"}} for side in ("train", "test")}
    source = {"kind": "npz", "path": str(path), "parts": parts, "names": {"label": "classes"}}
    labels = ["glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor"]
    tumour = {"tumour": open_task({"kind": "classification", "labels": labels}, "tasks.tumour")}
    images = small_net(128)
    config = site(tmp_path, sources={"rows": source}, tasks={"tumour": task("label")}, on_bad_record="stop")
    preparation = prepare(
        config, tumour, {"tumour": images}, Encoding(FeatureStore(tmp_path / "f"), CPU), tmp_path / "run" / "data"
    )
    assert preparation.num_units == {"train": 320, "test": 80}
    stored = np.load(path)
    for side in ("train", "test"):
        found = open_units(tmp_path / "run" / "data", side, ["tumour"], CPU).tasks["tumour"].labels
        assert [labels[index] for index in found.tolist()] == stored["classes"][stored[f"{side}_labels"]].tolist()
