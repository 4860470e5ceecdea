"""`headwater advise`: the file that it writes, its numbers beside those of `plan`, and one sentence for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from common.plugins import plugin_class
from common.run import RunConfig
from common.yaml import load, read_yaml
from headwater.__main__ import make_app
from simulations.config import SimulationConfig

Advise = Callable[..., Result]
RUN: dict[str, Any] = {
    "name": "advised",
    "seed": 1,
    "rounds": 5,
    "backbone": {"kind": "small_cnn", "input_size": 12, "channels": [4, 8]},
    "tasks": {"colour": {"kind": "classification", "labels": ["red", "blue"]}},
    "solver": {"kind": "dp_gd", "steps": 4, "clip_norm": 0.4, "learning_rate": 1.0},
    "privacy": {"unit": "example", "delta": 1.0e-5, "target_epsilon": 3.0},
    "aggregation": {"kind": "mean"},
    "cohort": {"min_sites": 4},
}


def call(*words: str) -> Result:
    return CliRunner().invoke(make_app(), list(words))


def refused(result: Result, *said: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


@pytest.fixture
def simulated(simulation_file: Path) -> Advise:
    """Advises on the small simulation, at an epsilon at which its few records are of use."""
    return lambda *options: call("advise", str(simulation_file), "--set", "budget.epsilon=60", *options)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def test_the_written_simulation_is_valid_and_has_the_v_and_the_forecast_of_its_plan(
    simulated: Advise, simulation_file: Path
) -> None:
    out = simulation_file.parent / "advised.yaml"
    result = simulated(
        "--set", "run.privacy={unit: example, delta: 1.0e-5, target_epsilon: 30}", "--json", "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    advice = json.loads(result.stdout)["tasks"]["colour"]
    assert advice["trains"] == "head" and advice["together"]
    assert call("simulate", "check", str(out)).exit_code == 0
    plan = json.loads(call("simulate", "plan", str(out), "--json").stdout)["sites"][0]
    assert plan["v"]["colour"] == pytest.approx(advice["v_secure"] if advice["secure"] else advice["v"])
    forecast = plan["forecasts"]["colour"]
    assert (forecast["least"], forecast["most"]) == (advice["forecast"]["least"], advice["forecast"]["most"])
    assert not [warning for warning in plan["warnings"] if "advise" in warning]
    written = load(SimulationConfig, out)
    assert written.run.chosen and written.sources == load(SimulationConfig, simulation_file).sources


def test_a_low_v_is_said_warned_of_by_plan_and_no_file_is_written(simulated: Advise, simulation_file: Path) -> None:
    out = simulation_file.parent / "advised.yaml"
    result = simulated("--set", "run.privacy={unit: example, delta: 1.0e-5, target_epsilon: 0.5}", "--out", str(out))
    refused(result, "--out", "worth training together")
    assert "together: no" in result.stdout and "start-from" in result.stdout and not out.exists()


def test_a_run_file_needs_sizes_and_gets_a_run_file(run_file: Path) -> None:
    refused(call("advise", str(run_file)), "--units", "no sizes")
    out = run_file.parent / "advised.yaml"
    result = call("advise", str(run_file), "--units", "100", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "4 site(s)" in result.stdout and "secure sum" in result.stdout
    written = load(RunConfig, out)
    assert written.trust == "secure_sum" and written.cohort.min_sites == 4 and written.solver.kind == "head_sum"
    more = json.loads(call("advise", str(run_file), "--units", "200", "--sites", "4", "--json").stdout)["tasks"][
        "colour"
    ]
    less = json.loads(call("advise", str(run_file), "--units", "100", "--json").stdout)["tasks"]["colour"]
    assert more["v"] == pytest.approx(2 * less["v"]) and more["loss"] <= less["loss"]


def test_a_run_without_privacy_has_no_v_and_no_secure_sum(run_file: Path) -> None:
    result = call("advise", str(run_file), "--units", "500", "--set", "privacy=non_private", "--json")
    assert result.exit_code == 0, result.output
    advice = json.loads(result.stdout)["tasks"]["colour"]
    assert advice["v"] is None and advice["loss"] is None and not advice["secure"] and advice["together"]


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "regression", "range": [0, 1]},
        {"kind": "anomaly", "normal": "a", "anomalous": "b"},
        {"kind": "embedding", "labels": ["a", "b"]},
    ],
)
def test_a_kind_without_classes_is_advised_on_without_a_v(run_file: Path, task: dict[str, Any]) -> None:
    run_file.write_text(yaml.safe_dump({**RUN, "tasks": {"age": task}}))
    result = call("advise", str(run_file), "--units", "500")
    assert result.exit_code == 0, result.output
    assert "has none" in result.stdout and "expected loss: not known" in result.stdout


def test_events_count_as_two_classes(run_file: Path) -> None:
    run_file.write_text(yaml.safe_dump({**RUN, "tasks": {"death": {"kind": "survival", "boundaries": [1, 2, 3]}}}))
    events = json.loads(call("advise", str(run_file), "--units", "500", "--json").stdout)["tasks"]["death"]
    run_file.write_text(yaml.safe_dump(RUN))
    classes = json.loads(call("advise", str(run_file), "--units", "500", "--json").stdout)["tasks"]["colour"]
    assert events["v"] == pytest.approx(classes["v"])


def test_bad_options_get_one_sentence(run_file: Path, simulated: Advise, tmp_path: Path) -> None:
    sized = ("advise", str(run_file), "--units", "500")
    refused(call("advise", str(tmp_path / "none.yaml")), "none.yaml")
    refused(call("advise", str(run_file), "--units", "0"), "at least 1")
    refused(call(*sized, "--sites", "0"), "at least 1")
    refused(call(*sized, "--distance", "-1"), "--distance")
    refused(call(*sized, "--out", str(tmp_path / "else" / "advised.yaml")), "beside")
    refused(call(*sized, "--out", str(run_file)), "new file")
    refused(simulated("--units", "5"), "run file only")
    refused(call(*sized, "--set", "tasks.colour.kind=colours"), "colours")
    assert read_yaml(run_file) == RUN


def test_a_block_is_named_for_pictures_without_privacy_and_the_written_file_trains_the_head(tmp_path: Path) -> None:
    example = plugin_class("common.backbones", "cifar_resnet").example(tmp_path)
    path, out = tmp_path / "run.yaml", tmp_path / "advised.yaml"
    path.write_text(yaml.safe_dump({**RUN, "backbone": dict(example.settings), "privacy": "non_private"}))
    result = call("advise", str(path), "--units", "100", "--json", "--out", str(out))
    assert result.exit_code == 0, result.output
    advice = json.loads(result.stdout)["tasks"]["colour"]
    assert (advice["modality"], advice["last_block"], advice["num_units"]) == ("picture", "layer3", 400)
    assert "layer3" in advice["trains"] and advice["seconds"] > 0.0
    written = load(RunConfig, out)
    assert not written.trainable and written.rounds == advice["rounds"]
    few = json.loads(call("advise", str(path), "--units", "70", "--json").stdout)["tasks"]["colour"]
    assert few["trains"] == "head"
