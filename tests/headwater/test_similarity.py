"""`similarity`: the table of a finished run follows from what its sites released, and says what it lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from common.serving.means import HOME, FeatureMean, read_means, write_means
from headwater.__main__ import make_app
from tests.server.rounds.test_moments import MEASURED, run_once
from tests.tiny import backbone, site_config


def call(*options: Any) -> Result:
    return CliRunner().invoke(make_app(), ["similarity", *map(str, options)])


def refused(result: Result, *said: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def make_home(path: Path, digest: str) -> FeatureMean:
    home = FeatureMean(HOME, digest, np.array([0.1, 0.2, 0.0, 0.5]), 0.0, 1000, "public records", is_home=True)
    write_means(path, [home])
    return home


def test_a_run_leaves_each_sites_mean_with_its_noise_and_the_table_follows_from_them(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north", "west")]
    run_once(tmp_path, sites)
    means = read_means(tmp_path / "run-1")
    assert [each.name for each in means] == ["east", "north", "west"]
    assert {each.digest for each in means} == {backbone().digest} and {each.units for each in means} == {40}
    # The plan's noise over the declared number of units.
    assert all(each.deviation == pytest.approx(means[0].deviation) for each in means) and means[0].deviation > 0
    home = make_home(tmp_path / "home.safetensors", backbone().digest)
    result = call(tmp_path / "run-1", "--home", tmp_path / "home.safetensors", "--json")
    (found,) = json.loads(result.stdout)["backbones"]
    variance = means[0].deviation ** 2 + means[2].deviation ** 2
    exact = np.square(means[0].mean_D - means[2].mean_D).sum() - 4 * variance
    assert found["distances"]["east"]["west"]["debiased"] == pytest.approx(exact)
    assert found["distances"]["east"]["west"]["distance"] == pytest.approx(max(0.0, exact))
    to_home = np.square(means[1].mean_D - home.mean_D).sum() - 4 * means[1].deviation ** 2
    assert found["distances"][HOME]["north"]["debiased"] == pytest.approx(to_home)
    shown = call(tmp_path / "run-1", "--home", tmp_path / "home.safetensors").stdout
    assert "±" in shown and "north" in shown and "Sharpness dominates" in shown and "Fed-Heart" in shown


def test_without_noise_the_means_are_those_of_the_sites_units(tmp_path: Path) -> None:
    open_ = {"non_private": True, "tasks": "any", "backbones": "any", "solvers": "any"}
    sites = [site_config(tmp_path, name, allow=open_) for name in ("east", "north")]
    solver = {"kind": "sgd", "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0}
    run_once(tmp_path, sites, privacy="non_private", solver=solver, aggregation={"kind": "mean"})
    for each in read_means(tmp_path / "run-1"):
        rows = np.load(tmp_path / f"{each.name}.npz")["train_x"].astype(np.float64)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(each.mean_D, unit.mean(0), atol=1e-3)
        assert each.deviation == 0.0


def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path: Path) -> None:
    refused(call(tmp_path / "absent"), "expected means that were released", "moments.means")
    counts = {"moments": {"means": 0.0, "counts": 0.2}}
    only = {name: {**task, "head": {"bias": False, "prior": True}} for name, task in MEASURED["tasks"].items()}
    run_once(tmp_path, [site_config(tmp_path, "east")], "counted", tasks=only, **counts)
    refused(call(tmp_path / "counted"), "found no means.safetensors", "solver: {kind: auto}")
    run_once(tmp_path, [site_config(tmp_path, "east")])
    refused(call(tmp_path / "run-1"), "expected the means of two sites, got 1; --home")
    refused(call(tmp_path / "run-1", "--home", tmp_path / "home"), "home: expected means", "public-mean")
    refused(call(tmp_path / "run-1", "--home", tmp_path / "run-1"), "--home", "expected a home file", "got a run's")
    make_home(tmp_path / "home", "f" * 64)
    refused(call(tmp_path / "run-1", "--home", tmp_path / "home"), "those of another backbone", "ffffffffffff")


def test_many_sites_are_shown_by_their_distance_from_home_and_from_all_others(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", "f" * 64)
    sites = [replace(home, name=f"site-{number}", is_home=False, deviation=0.01) for number in range(9)]
    write_means(tmp_path / "means.safetensors", sites)
    shown = call(tmp_path, "--home", tmp_path / "home").stdout
    assert "--json has all 10 x 10" in " ".join(shown.split())
    # A name from elsewhere is no instruction to the terminal.
    write_means(tmp_path / "means.safetensors", [replace(sites[0], name="[/red]a"), *sites[1:]])
    assert "[/red]a" in call(tmp_path, "--home", tmp_path / "home").stdout
    assert len(json.loads(call(tmp_path, "--json").stdout)["backbones"][0]["distances"]) == 9
