"""The offer of a choice, from a run file and a file of candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.run import RunConfig, resolve_backbone_paths
from common.types import MAX_BACKBONES, BadInput
from common.yaml import load, write_yaml
from server.choice.candidates import make_choice_run
from tests.tiny import DIM, TASKS, run_config

IDENTITY = {"kind": "identity", "dim": DIM}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "candidates.yaml"
    path.write_text(yaml.safe_dump({"candidates": {"b": {**IDENTITY, "licence": "MIT"}, "a": IDENTITY}, **values}))
    return path


def make(folder: Path, epsilon: float = 2.0, task: str | None = "size", **changes: Any) -> RunConfig:
    return make_choice_run(run_config(**changes), write(folder), epsilon, task)


def test_a_choice_has_the_runs_task_unit_and_cohort_and_the_votes_epsilon(tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    path.write_text(
        yaml.safe_dump({"candidates": {"b": {**IDENTITY, "licence": "MIT"}, "a": IDENTITY}}, sort_keys=False)
    )
    run = run_config()
    made = make_choice_run(run, path, 2.0, "size")
    assert (made.name, list(made.backbone_specs), made.licences) == ("choose-tiny", ["b", "a"], {"b": "MIT"})
    assert made.requested_privacy is not None and made.requested_privacy.target_epsilon == 2.0
    assert (made.requested_privacy.delta, made.cohort) == (1e-5, run.cohort)
    assert made.tasks["size"].settings()["labels"] == TASKS["size"]["labels"] and list(made.tasks) == ["size"]
    write_yaml(tmp_path / "config.yaml", resolve_backbone_paths(made))
    again = load(RunConfig, tmp_path / "config.yaml")
    # The order of the file decides ties, also after a restart.
    assert list(again.backbone_specs) == ["b", "a"] and again.choice is not None
    assert again.choice.scorer.kind == "ridge"


def test_a_run_without_a_choice_is_offered_as_before() -> None:
    """Its digest, which sites approved, is over its keys."""
    assert "choice" not in run_config().model_dump(mode="json")


def test_a_path_in_the_file_of_candidates_is_relative_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    resnet = {"kind": "cifar_resnet", "depth": 20, "weights": "./w.pt", "projection": {"normalize": True}}
    made = make_choice_run(run_config(), write(folder, candidates={"a": resnet, "b": IDENTITY}), 2.0, "size")
    assert resolve_backbone_paths(made).backbone_specs["a"].settings()["weights"] == str(folder / "w.pt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": 0.0}, "--epsilon"),
        ({"task": None}, "--task: expected one of colour, size, got nothing"),
        ({"task": "shape"}, "--task: expected one of colour, size, got shape"),
        ({"privacy": "non_private"}, "privacy: expected the unit and delta"),
        ({"tasks": {"size": {"kind": "regression", "range": [0, 1]}}}, "tasks.size: expected a task with classes"),
    ],
)
def test_what_cannot_be_voted_on_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    if changes.get("privacy") == "non_private":
        changes = {**changes, "solver": {"kind": "sgd", "learning_rate": 0.1, "steps": 1}}
    with pytest.raises(BadInput, match=said):
        make(tmp_path, **changes)


def test_more_candidates_than_a_site_receives_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, candidates={f"c{place}": IDENTITY for place in range(MAX_BACKBONES + 1)})
    with pytest.raises(BadInput, match=f"expected at most {MAX_BACKBONES} candidates for real sites.*got 17"):
        make_choice_run(run_config(), path, 2.0, "size")
