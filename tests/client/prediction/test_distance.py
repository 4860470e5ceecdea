"""`site distance`: a site's exact mean against means that may be known; a unit counts once, nothing is sent or kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.__main__ import app
from client.config import SiteConfig
from client.prediction.distance import measure_distances
from client.protocol.purge import purge
from client.protocol.site import MODELS, Site
from common.privacy.noise import os_entropy
from common.serving.folder import read_config, read_moments
from common.serving.means import HOME, FeatureMean, read_means, write_means
from common.yaml import write_yaml
from tests.server.rounds.test_moments import run_once
from tests.tiny import backbone, site_config


def call(folder: Path, config: SiteConfig, *options: Any) -> Result:
    write_yaml(folder / "site.yaml", config)
    return CliRunner().invoke(app, ["distance", str(folder / "site.yaml"), *map(str, options)])


def refused(result: Result, *said: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def write_home(path: Path, digest: str) -> FeatureMean:
    home = FeatureMean(HOME, digest, np.array([0.1, 0.2, 0.0, 0.5]), 0.0, 1000, "public records", is_home=True)
    write_means(path, [home])
    return home


def average_units(path: Path, groups: Any = None) -> Any:
    """Returns the mean over units of the mean of each unit's rows of length 1; without groups a row is a unit."""
    rows = np.load(path)["train_x"].astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    groups = np.arange(len(unit)) if groups is None else groups
    return np.mean([unit[groups == group].mean(0) for group in np.unique(groups)], axis=0)


@pytest.mark.parametrize("by_model", [False, True])
def test_distances_are_those_of_the_sites_exact_mean_and_nothing_is_spent(tmp_path: Path, by_model: bool) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    run_once(tmp_path, sites)
    home = write_home(tmp_path / "home.safetensors", backbone().digest)
    spent = Site(sites[0], os_entropy).ledger().spent()
    # The model comes from a run at another site: this one took part in none.
    asking = site_config(tmp_path, "new") if by_model else sites[0]
    model = sites[0].coordinator_dir / "runs" / "run-1" / "model"
    options = ["--model", model] if by_model else ["--run", "run-1"]
    files = ["--to", tmp_path / "home.safetensors", "--to", tmp_path / "run-1"]
    before = sorted(path for path in asking.state_dir.rglob("*") if "features" not in path.parts)
    result = call(tmp_path, asking, *files, *options, "--json")
    assert result.exit_code == 0, result.output
    own = average_units(tmp_path / f"{asking.name}.npz")
    found = {each["from"]: each for each in json.loads(result.stdout)["distances"]}
    assert list(found) == [HOME, "east", "north", "all sites"]
    # The feature store keeps 16 bits of each feature.
    assert found[HOME]["debiased"] == pytest.approx(np.square(own - home.mean_D).sum(), abs=2e-3)
    assert found[HOME]["noise"] == 0.0 and found["north"]["noise"] > 0.0
    north = read_means(tmp_path / "run-1")[1]
    exact = np.square(own - north.mean_D).sum() - 4 * north.deviation**2
    assert found["north"]["debiased"] == pytest.approx(exact, abs=5e-3)
    assert Site(sites[0], os_entropy).ledger().spent() == spent
    after = sorted(path for path in asking.state_dir.rglob("*") if "features" not in path.parts)
    # Of a site that was never checked, which records are there is noted, as by every command.
    assert {path.name for path in after if path not in before} <= {"snapshot.json"}
    shown = call(tmp_path, asking, *files, *options).stdout
    assert "nothing was sent or spent" in shown and "Sharpness dominates" in shown


def test_what_the_model_holds_of_classes_is_compared_with_no_file(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    run_once(tmp_path, sites, moments={"means": 0.2, "counts": 0.2, "classes": 0.2})
    model = sites[0].coordinator_dir / "runs" / "run-1" / "model"
    released = {name: read_moments(model, read_config(model), name) for name in ("colour", "size")}
    own = average_units(tmp_path / "east.npz")
    found = json.loads(call(tmp_path, sites[0], "--json").stdout)["distances"]
    assert [each["from"] for each in found] == ["run-1", "run-1"]
    for each, (name, moments) in zip(found, released.items(), strict=True):
        variance = len(moments.counts_C) * (moments.sums_deviation / 80) ** 2
        exact = np.square(own - moments.sums_CD.sum(0) / 80).sum() - 4 * variance
        assert each["debiased"] == pytest.approx(exact, abs=5e-3) and name in each["source"] and each["noise"] > 0.0
    # The same of a site that took part in no run.
    new = call(tmp_path, site_config(tmp_path, "new"), "--model", model, "--json")
    assert [each["from"] for each in json.loads(new.stdout)["distances"]] == ["run-1", "run-1"]


def test_a_patient_counts_once(tmp_path: Path) -> None:
    config = site_config(tmp_path, "east")
    arrays = dict(np.load(tmp_path / "east.npz"))
    patients = np.array(["p1"] * 30 + ["p2"] * 8 + ["p3"] * 2)
    arrays |= {"train_patient": patients, "test_patient": np.array(["q"] * len(arrays["test_x"]))}
    np.savez(tmp_path / "east.npz", **arrays)
    source: Any = json.loads(config.model_dump_json(by_alias=True))["sources"]["records"]
    for part in source["parts"]:
        source["parts"][part]["patient"] = f"{part}_patient"
    whole = site_config(tmp_path, "east", unit="patient", sources={"records": source})
    run_once(tmp_path, [whole], privacy={"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0})
    home = write_home(tmp_path / "home", backbone().digest)
    result = call(tmp_path, whole, "--to", tmp_path / "home", "--json")
    own = average_units(tmp_path / "east.npz", patients)
    (found,) = json.loads(result.stdout)["distances"]
    assert found["debiased"] == pytest.approx(np.square(own - home.mean_D).sum(), abs=2e-3)


def test_what_cannot_be_measured_is_said_in_one_sentence(tmp_path: Path) -> None:
    config = site_config(tmp_path, "east")
    write_home(tmp_path / "home", backbone().digest)
    refused(call(tmp_path, config, "--to", tmp_path / "home"), "expected a run that has ended")
    refused(call(tmp_path, config, "--to", tmp_path / "home", "--run", "other"), "--run other", "did not join")
    run_once(tmp_path, [config])
    refused(call(tmp_path, config), "--to: expected a home file", "moments.classes")
    refused(call(tmp_path, config, "--to", tmp_path / "absent"), "absent: expected means", "public-mean")
    write_home(tmp_path / "another", "f" * 64)
    refused(call(tmp_path, config, "--to", tmp_path / "another"), "those of another backbone", "ffffffffffff")
    both = ["--run", "run-1", "--model", tmp_path]
    refused(call(tmp_path, config, "--to", tmp_path / "home", *both), "--run, --model: expected one of them")
    refused(call(tmp_path, config, "--to", tmp_path / "home", "--model", tmp_path / "x"), "expected a model's folder")


def test_what_a_killed_measurement_leaves_lies_where_a_purge_looks(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    run_once(tmp_path, sites)
    write_home(tmp_path / "home.safetensors", backbone().digest)
    new = site_config(tmp_path, "new")
    seen: list[Path] = []

    def note(done: int, total: int) -> None:
        seen.extend((new.state_dir / MODELS).glob("*"))

    model = sites[0].coordinator_dir / "runs" / "run-1" / "model"
    measure_distances(Site(new, os_entropy, note), [tmp_path / "home.safetensors"], model=model)
    assert seen and not list((new.state_dir / MODELS).glob("*"))
    (seen[0] / "data").mkdir(parents=True)
    purge(Site(new, os_entropy), ["train_x/0"])
    assert not (seen[0] / "data").exists()
