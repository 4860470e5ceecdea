"""Records are tried with an offered backbone before a run is approved or joined; too few usable ones refuse it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from client.__main__ import app
from client.config import SiteConfig
from client.protocol.approvals import Approvals, read_offer
from common.backbones.seq2seq import Seq2seqBackbone
from common.backbones.small_cnn import SmallCnn
from common.model.backbones import open_backbones
from common.offers import encode_offer, make_offer
from common.run import RunConfig
from common.yaml import write_yaml
from tests.tiny import run_config, site_config

COLUMNS = [{"name": "age", "range": [0, 100], "missing": "refuse"}]
LABELS = {"outcome": {"kind": "classification", "labels": ["no", "yes"]}}
CNN = {"kind": "small_cnn", "input_size": 8}


def row(at: int, age: str) -> str:
    return f"p{at};{age};{'yes' if at % 2 else 'no'};{'test' if at % 5 == 4 else 'train'}"


def a_site(folder: Path, rows: list[str], run: RunConfig | None = None, **changes: Any) -> SiteConfig:
    """Writes a site whose table has these rows, and a kept offer; returns its settings."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.csv").write_text("\n".join(["patient;age;outcome;split", *rows]) + "\n")
    table = {"kind": "table", "path": str(folder / "rows.csv"), "separator": ";", "columns": ["age"]}
    table |= {"patient": "patient", "split": "split"}
    task = {"source": "rows", "label": "outcome", "missing": "skip", "public_size": 50}
    values: dict[str, Any] = {
        "sources": {"rows": table},
        "tasks": {"outcome": {**task, **changes.pop("task", {})}},
        "on_bad_record": "skip",
        "approval": "required",
    }
    config = site_config(folder, "north", **{**values, **changes})
    write_yaml(folder / "site.yaml", config)
    write_offer(folder, run or run_config(backbone={"kind": "identity", "columns": COLUMNS}, tasks=LABELS))
    return config


def write_offer(folder: Path, run: RunConfig) -> None:
    backbones = open_backbones(run)
    digests = {name: each.digest for name, each in backbones.items()}
    (folder / "offers").mkdir(exist_ok=True)
    (folder / "offers" / "tiny.json").write_bytes(encode_offer(make_offer(run, backbones), digests))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def approve(folder: Path) -> Result:
    return invoke("approve", folder / "site.yaml", folder / "offers" / "tiny.json")


def checked(folder: Path, name: str = "task outcome in tiny") -> tuple[str, str]:
    printed = invoke("check", folder / "site.yaml", "--offline", "--json").stdout
    (found,) = [item for item in json.loads(printed)["checks"] if item["name"] == name]
    return found["outcome"], found["detail"]


def test_no_usable_record_fails_check_and_no_approval_is_in_force_until_there_are_some(tmp_path: Path) -> None:
    commas = [row(at, f"{30 + at},5") for at in range(20)]
    config = a_site(tmp_path, commas)
    outcome, detail = checked(tmp_path)
    assert outcome == "fail"
    assert "to train on: 16 records, 16 with a label, 0 usable (16 tried)" in detail
    assert "20 unusable, the first: rows.csv row 1: column 'age': expected a number" in detail
    result = approve(tmp_path)
    assert (
        "NOT IN FORCE: task outcome in tiny: tasks.outcome.min_units: expected at least 1 usable unit " in result.stderr
    )
    offer = read_offer(tmp_path / "offers" / "tiny.json")
    assert not Approvals(config.state_dir).covers(offer.digest, "tiny-1")
    listed = CliRunner().invoke(app, ["approve", str(tmp_path / "site.yaml"), "--list"]).stdout
    assert listed.startswith("approved  tiny") and "; NOT IN FORCE" in listed
    approve(tmp_path)
    a_site(tmp_path, [row(at, "35") for at in range(20)])
    assert "NOT IN FORCE" not in approve(tmp_path).stderr
    approvals = Approvals(config.state_dir)
    assert approvals.use(offer.digest, "tiny-1")
    assert not approvals.covers(offer.digest, "tiny-2"), "three commands gave one approval"


def test_a_site_that_joins_without_approval_makes_the_test_before_it_contacts_anyone(tmp_path: Path) -> None:
    nowhere = {"address": "127.0.0.1:1", "ca": str(tmp_path / "none.crt"), "key": str(tmp_path / "none")}
    a_site(tmp_path, [row(at, "1,5") for at in range(9)], approval="automatic", coordinator=nowhere)
    result = invoke("start", tmp_path / "site.yaml")
    assert result.exit_code == 1 and "min_units" in result.stderr
    a_site(tmp_path, [row(at, "15") for at in range(9)], approval="automatic", coordinator=nowhere)
    assert "coordinator.key" in invoke("start", tmp_path / "site.yaml").stderr


@pytest.mark.parametrize(("least", "code"), [(8, 0), (9, 1)])
def test_fewer_usable_units_than_the_declared_minimum_refuse_a_run(tmp_path: Path, least: int, code: int) -> None:
    """Ten to train on, of which one has no age and one no label."""
    ages = ["50"] * 10 + ["", "50"]
    rows = [row(at, age) for at, age in enumerate(ages)]
    rows[11] = "p11;50;;train"
    a_site(tmp_path, rows, task={"min_units": least})
    result = approve(tmp_path)
    assert ("NOT IN FORCE" in result.stderr) == bool(code)
    assert "to train on: 10 records, 9 with a label, 8 usable" in result.stdout + result.stderr


def test_what_a_sample_says_is_said_to_be_about_all(tmp_path: Path) -> None:
    a_site(tmp_path, [row(at, "50" if at % 3 else "x") for at in range(1000)])
    outcome, detail = checked(tmp_path)
    assert outcome == "warn" and "800 with a label, about " in detail and "(64 tried)" in detail
    about = int(detail.split("about ")[1].split()[0])
    assert 400 < about < 660


def test_patients_are_counted_once(tmp_path: Path) -> None:
    rows = [f"p{at % 4};{'x' if at % 4 == 3 else 50};no;train" for at in range(40)]
    privacy = {"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0}
    run = run_config(backbone={"kind": "identity", "columns": COLUMNS}, tasks=LABELS, privacy=privacy)
    a_site(tmp_path, rows, run, unit="patient")
    assert "30 usable of 3 patients (40 tried)" in checked(tmp_path)[1]


def test_where_records_may_not_be_left_out_every_one_is_read(tmp_path: Path) -> None:
    rows = [row(at, "50") for at in range(500)]
    a_site(tmp_path, rows, on_bad_record="stop")
    assert approve(tmp_path).exit_code == 0
    for at in (123, 127):
        rows[at] = row(at, "x")
    a_site(tmp_path, rows, on_bad_record="stop")
    result = approve(tmp_path)
    assert "NOT IN FORCE" in result.stderr and "2 unusable, the first: rows.csv row 124" in result.stderr


def pictures(folder: Path, size: int) -> dict[str, Any]:
    for at in range(6):
        Image.new("RGB", (size, size), (40 * at, 0, 0)).save(folder / f"{at}.png")
    lines = [f"{at}.png,{'no' if at % 2 else 'yes'}" for at in range(6)]
    (folder / "list.csv").write_text("\n".join(["image,outcome", *lines]) + "\n")
    return {"rows": {"kind": "manifest", "path": str(folder / "list.csv")}}


def with_weights(folder: Path, scale: float = 1.0) -> tuple[dict[str, Any], bytes]:
    """A small network's settings, with weights in a file, and the bytes of an offer that names it."""
    state = SmallCnn(**CNN).architecture().module.state_dict()
    weights = {name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(weights, folder / "weights.safetensors")
    settings = {**CNN, "weights": str(folder / "weights.safetensors")}
    backbones = open_backbones(run_config(backbone=settings))
    run = make_offer(run_config(backbone=settings, tasks=LABELS), backbones)
    return settings, encode_offer(run, {name: each.digest for name, each in backbones.items()})


@pytest.mark.parametrize(("size", "code"), [(8, 0), (20, 1)])
def test_without_weights_records_are_preprocessed(tmp_path: Path, size: int, code: int) -> None:
    _, offer = with_weights(tmp_path)
    a_site(tmp_path, [], sources=pictures(tmp_path, size))
    (tmp_path / "offers" / "tiny.json").write_bytes(offer)
    result = approve(tmp_path)
    assert ("NOT IN FORCE" in result.stderr) == bool(code), result.output
    assert "tried without the backbone's weights" in result.stdout + result.stderr


@pytest.mark.parametrize(("scale", "code"), [(1.0, 0), (1e30, 1)])
def test_with_the_sites_own_copy_of_the_weights_records_are_encoded(tmp_path: Path, scale: float, code: int) -> None:
    own, offer = with_weights(tmp_path, scale)
    a_site(tmp_path, [], sources=pictures(tmp_path, 8), own_backbones=[own])
    (tmp_path / "offers" / "tiny.json").write_bytes(offer)
    result = approve(tmp_path)
    assert ("NOT IN FORCE" in result.stderr) == bool(code), result.output
    said = result.stdout + result.stderr
    assert "without" not in said and ("features are not finite" in said) == bool(code)


def test_a_column_in_another_unit_than_the_run_s_range_is_warned_of(tmp_path: Path) -> None:
    a_site(tmp_path, [row(at, str(3000 + at if at < 15 else 40)) for at in range(20)])
    outcome, detail = checked(tmp_path)
    assert outcome == "warn"
    assert detail.endswith("; numbers beyond the run's ranges, which are clipped, of 20 tried: age 15")
    a_site(tmp_path, [row(at, str(3000 if at < 8 else 40)) for at in range(20)])
    assert checked(tmp_path)[0] == "pass", "a few outliers are clipped without a word"


def test_sources_in_the_language_that_is_to_be_written_are_warned_of(tmp_path: Path) -> None:
    """The backbone writes German; each sentence is another, so that each is a record of its own."""
    own = dict(Seq2seqBackbone.example(tmp_path).settings)
    backbones = open_backbones(run_config(backbone=own))
    tasks = {"german": {"kind": "seq2seq", "max_tokens": own["max_tokens"]}}
    offer = make_offer(run_config(backbone=own, tasks=tasks), backbones)
    words = [" ".join(pair) for pair in itertools.permutations(["Befund", "Schatten", "gut", "kein"], 2)]
    lines = {"de": words, "en": [f"a {word[::-1].lower()}" for word in words]}
    for name, written in lines.items():
        (tmp_path / name).write_text("\n".join(written) + "\n", encoding="utf-8")
    found = {}
    for source, target in (("en", "de"), ("de", "en")):
        pairs = {"kind": "pairs", "source": str(tmp_path / source), "target": str(tmp_path / target)}
        task = {"source": "captions", "label": "target", "missing": "refuse", "public_size": 10}
        a_site(tmp_path, [], sources={"captions": pairs}, tasks={"german": task}, own_backbones=[own])
        digests = {name: each.digest for name, each in backbones.items()}
        (tmp_path / "offers" / "tiny.json").write_bytes(encode_offer(offer, digests))
        found[source] = checked(tmp_path, "task german in tiny")
    assert found["en"][0] == "pass"
    assert found["de"][0] == "warn" and "the sources are of the language that is to be written" in found["de"][1]
