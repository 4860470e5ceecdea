"""Settings: what is valid is read, what is wrong is answered with one sentence that names the key."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from client.config import SiteConfig
from client.solvers import open_solver
from common.privacy.accounting import Mechanism, compute_epsilon
from common.run import Privacy, RunConfig
from common.tasks import open_task
from common.types import DELTAS, MAX_STEPS, NOISE_MULTIPLIERS, SAMPLING_RATES, BadInput
from common.yaml import load, parse, read_yaml, write_yaml
from simulations.config import SimulationConfig
from tests.tiny import run_config

RUN: dict[str, Any] = {
    "name": "trial",
    "seed": 1,
    "rounds": 2,
    "backbone": {"kind": "identity", "dim": 3},
    "tasks": {"disease": {"kind": "classification", "labels": ["no", "yes"]}},
    "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0},
    "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
    "aggregation": {"kind": "mean"},
}
SITE: dict[str, Any] = {
    "name": "north",
    "registry": "north-patients",
    "unit": "example",
    "budget": {"epsilon": 3.0, "delta": 1e-5},
    "allow": {"tasks": "any", "backbones": "any", "solvers": ["dp_sgd"]},
    "sources": {"rows": {"kind": "table", "path": "rows.csv"}},
    "tasks": {"disease": {"source": "rows", "label": "sick", "missing": "skip", "public_size": 10}},
    "split": {"test_fraction": 0.2},
    "on_bad_record": "skip",
    "evaluation": "local",
    "state_dir": "state",
}
NOISY = {**RUN, "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0}}
RANGES = {"delta": DELTAS, "noise_multiplier": NOISE_MULTIPLIERS, "sampling_rate": SAMPLING_RATES}


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A deep copy with one key set, or removed for None."""
    copy = yaml.safe_load(yaml.safe_dump(values))
    *parents, last = key.split(".")
    target = copy
    for parent in parents:
        target = target[parent]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return copy


def test_a_valid_run_and_site_are_read() -> None:
    assert parse(RunConfig, RUN, base=Path()).rounds == 2
    assert parse(SiteConfig, SITE, base=Path()).tasks["disease"].public_size == 10


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rounds", 0, ["rounds", "a number of at least 1", "got 0"]),
        ("rounds", "many", ["rounds", "a whole number", "'many'"]),
        ("name", "../escape", ["name", "'../escape'"]),
        ("privacy.unit", "pateint", ["privacy", "unit", "'patient'", "'pateint'", "nearest"]),
        ("privacy.delta", 0, ["delta", "at least", "got 0"]),
        ("privacy.delta", None, ["delta", "expected a value", "explicitly"]),
        ("privacy.unit", None, ["unit", "expected a value"]),
        ("tasks", {}, ["tasks", "at least 1"]),
        ("seed", float("nan"), ["seed"]),
        ("solver", "dp_gd", ["solver: expected keys and values (", "kind", "got 'dp_gd'"]),
        ("licences", "any", ["licences: expected keys and values, got 'any'"]),
        ("audit", [3], ["audit: expected", "got [3]"]),
    ],
)
def test_a_wrong_value_names_key_expectation_and_value(key: str, value: Any, said: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        parse(RunConfig, changed(RUN, key, value), base=Path())
    assert all(word in str(caught.value) for word in said), str(caught.value)
    assert not re.search(r"\n|dictionary|instance|valid list|Input", str(caught.value)), (
        "a word of Python's or a library's"
    )


@pytest.mark.parametrize(
    ("key", "nearest"), [("ronds", "rounds"), ("cohort", None), ("privacy.target_epsilom", "target_epsilon")]
)
def test_an_unknown_key_names_the_nearest_valid_one(key: str, nearest: str | None) -> None:
    values = changed(RUN, key, {"fractoin": 1.0} if nearest is None else 1)
    with pytest.raises(BadInput, match=f"nearest: '{nearest or 'fraction'}'"):
        parse(RunConfig, values, base=Path())


@pytest.mark.parametrize("both", [{}, {"target_epsilon": 1.0, "noise_multiplier": 1.0}])
def test_exactly_one_of_epsilon_and_noise_is_written(both: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="exactly one of"):
        parse(Privacy, {"unit": "example", "delta": 1e-5, **both}, base=Path())


@pytest.mark.parametrize("key", ["budget", "unit", "budget.delta", "allow", "registry", "on_bad_record", "evaluation"])
def test_nothing_that_affects_privacy_has_a_default_at_a_site(key: str) -> None:
    with pytest.raises(BadInput, match="expected a value, got nothing"):
        parse(SiteConfig, changed(SITE, key, None), base=Path())


@pytest.mark.parametrize("value", [1e-300, 1e-150, 1e200, 10**400, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    ("model", "values", "key"),
    [
        (SiteConfig, SITE, "budget.epsilon"),
        (SiteConfig, SITE, "budget.delta"),
        (SiteConfig, {**SITE, "evaluation": {"share": 0.1, "evaluations": 4}}, "evaluation.share"),
        (RunConfig, RUN, "privacy.delta"),
        (RunConfig, RUN, "privacy.target_epsilon"),
        (RunConfig, NOISY, "privacy.noise_multiplier"),
    ],
    ids=["epsilon", "delta", "share", "delta of a run", "target", "noise"],
)
def test_a_number_at_the_edge_is_refused_in_one_sentence(
    model: type[BaseModel], values: dict[str, Any], key: str, value: float
) -> None:
    with pytest.raises(BadInput, match=key.split(".")[0]) as caught:
        parse(model, changed(values, key, value), base=Path())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("kind", ["dp_gd", "dp_sgd"])
@pytest.mark.parametrize(
    "change",
    [{"clip_norm": 1e-300}, {"clip_norm": 1e200}, {"sampling_rate": 1e-150}, {"steps": 10**12}],
    ids=str,
)
def test_settings_of_a_solver_at_the_edge_are_refused(kind: str, change: dict[str, float]) -> None:
    settings = {"kind": kind, "sampling_rate": 0.5, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
    with pytest.raises(BadInput, match=next(iter(change))):
        open_solver({**settings, **change}, "solver")


@pytest.mark.parametrize("ends", list(itertools.product(*(RANGES.values()))), ids=str)
def test_every_number_inside_the_ranges_is_accounted_without_a_warning(ends: tuple[float, ...]) -> None:
    delta, noise, rate = ends
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_epsilon([Mechanism("gaussian", noise, rate, MAX_STEPS, 1.0)], delta) >= 0.0


def test_a_delta_is_at_most_a_tenth_of_one_unit() -> None:
    """Of 10 declared units; a larger delta would let a release give one of them away."""
    assert parse(SiteConfig, changed(SITE, "budget.delta", 0.01), base=Path()).budget.delta == 0.01
    with pytest.raises(BadInput, match=r"budget\.delta: expected at most 0\.01, .* 10 declared units\), got 0\.0101"):
        parse(SiteConfig, changed(SITE, "budget.delta", 0.0101), base=Path())


def test_a_task_must_name_one_of_the_sites_sources() -> None:
    with pytest.raises(BadInput, match=r"tasks.disease.source: expected one of rows, got 'elsewhere'"):
        parse(SiteConfig, changed(SITE, "tasks.disease.source", "elsewhere"), base=Path())


def test_paths_are_relative_to_the_file_they_are_written_in(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "site.yaml").write_text(yaml.safe_dump(SITE))
    assert load(SiteConfig, tmp_path / "deep" / "site.yaml").state_dir == tmp_path / "deep" / "state"


def test_an_overridden_path_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "site.yaml").write_text(yaml.safe_dump(SITE))
    monkeypatch.chdir(tmp_path)
    assert load(SiteConfig, Path("deep/site.yaml"), ["state_dir=./here"]).state_dir == tmp_path / "here"


def test_overrides_go_through_the_same_models(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    assert load(RunConfig, path, ["rounds=7", "privacy.target_epsilon=1.5"]).rounds == 7
    with pytest.raises(BadInput, match="rounds"):
        load(RunConfig, path, ["rounds=-1"])
    with pytest.raises(BadInput, match=r"key\.path=value"):
        load(RunConfig, path, ["rounds"])
    with pytest.raises(BadInput, match="name is a value, not a group"):
        load(RunConfig, path, ["name.deeper=1"])


def test_the_environment_fills_in_variables_and_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: ${HEADWATER_TEST_A}\nb: ${HEADWATER_TEST_B:-there}/x\n")
    monkeypatch.setenv("HEADWATER_TEST_A", "here")
    assert read_yaml(path) == {"a": "here", "b": "there/x"}
    monkeypatch.delenv("HEADWATER_TEST_A")
    with pytest.raises(BadInput, match="a: environment variable HEADWATER_TEST_A is not set"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_a_file_that_is_not_a_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"x\.yaml: expected"):
        read_yaml(path)


def test_a_yaml_tag_builds_no_object(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(BadInput):
        read_yaml(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"\.yaml: expected a readable YAML file, but there is no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = parse(RunConfig, RUN, base=tmp_path)
    write_yaml(tmp_path / "run.yaml", run)
    assert load(RunConfig, tmp_path / "run.yaml") == run


@pytest.mark.parametrize("key", ["k" * 100_000, "\x1b[2J\nforged: line"], ids=["long", "terminal codes"])
def test_an_unknown_key_of_a_stranger_is_named_in_one_short_printable_line(key: str) -> None:
    with pytest.raises(BadInput, match="unknown key") as caught:
        parse(RunConfig, {**run_config().model_dump(mode="json"), key: 1}, base=Path("/nonexistent"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


SEVERAL = {
    "backbones": {"pictures": {"kind": "identity", "dim": 3}, "texts": {"kind": "identity", "dim": 4}},
    "tasks": {
        "disease": {"kind": "classification", "labels": ["no", "yes"], "backbone": "texts"},
        "shade": {"kind": "classification", "labels": ["dark", "light"], "backbone": "pictures"},
    },
}
MIXED = {**{key: value for key, value in RUN.items() if key != "backbone"}, **SEVERAL}


def test_a_run_says_which_backbone_each_task_stands_on() -> None:
    several, one = parse(RunConfig, MIXED, base=Path()), parse(RunConfig, RUN, base=Path())
    assert {task: several.backbone_of(task) for task in several.tasks} == {"disease": "texts", "shade": "pictures"}
    assert [several.backbone_key(name) for name in several.backbone_specs] == ["backbones.pictures", "backbones.texts"]
    assert one.backbone_specs[one.backbone_of("disease")].model_dump() == {"kind": "identity", "dim": 3}
    assert [one.backbone_key(name) for name in one.backbone_specs] == ["backbone"]


def test_a_tasks_own_file_sees_no_backbone() -> None:
    task = parse(RunConfig, MIXED, base=Path()).tasks["disease"]
    assert task.settings() == {"kind": "classification", "labels": ["no", "yes"]}
    assert open_task(task, "tasks.disease").kind == "classification"


def test_a_run_with_several_backbones_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = parse(RunConfig, MIXED, base=tmp_path)
    write_yaml(tmp_path / "run.yaml", run)
    assert load(RunConfig, tmp_path / "run.yaml").model_dump() == run.model_dump()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tasks.shade.backbone", "picture", r"tasks\.shade\.backbone: .* got 'picture' \(nearest: 'pictures'\)"),
        ("tasks.shade.backbone", None, r"tasks\.shade\.backbone: expected one of pictures, texts, got nothing"),
        ("tasks.shade.backbone", "Bad Name", r"tasks\.shade\.backbone"),
        ("tasks.shade.backbone", "texts", r"backbones\.pictures: expected a task that stands on it"),
        ("backbone", {"kind": "identity", "dim": 3}, r"expected either it or `backbones`, several by name; got both"),
        ("backbones", None, r"expected either it or `backbones`, several by name; got neither"),
        ("backbones", {f"b{number}": {"kind": "identity"} for number in range(17)}, "backbones"),
    ],
)
def test_backbones_that_do_not_fit_their_tasks_are_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse(RunConfig, changed(MIXED, key, value), base=Path())


def test_rates_of_a_trunk_need_something_that_trains() -> None:
    rated = changed(RUN, "solver.trunk", {"learning_rate": 0.1})
    with pytest.raises(BadInput, match="solver.trunk: expected `trainable` beside it"):
        parse(RunConfig, rated, base=Path())
    assert parse(RunConfig, {**rated, "trainable": {}}, base=Path()).trainable == {}


def test_rates_of_a_task_that_is_not_there_are_refused() -> None:
    with pytest.raises(BadInput, match=r"solver\.tasks: expected some of .*got 'nobody'"):
        parse(RunConfig, changed(RUN, "solver.tasks", {"nobody": {"learning_rate": 0.1}}), base=Path())
    name = next(iter(RUN["tasks"]))
    own = changed(RUN, "solver.tasks", {name: {"learning_rate": 0.1}})
    assert parse(RunConfig, own, base=Path()).solver.settings()["tasks"] == {name: {"learning_rate": 0.1}}


@pytest.mark.parametrize(
    "rates", [{}, {"trunk": None}, {"tasks": {"disease": {"learning_rate": 1}}, "trunk": {"learning_rate": 0.1}}]
)
def test_a_solvers_settings_are_offered_as_they_were_written(rates: dict[str, Any]) -> None:
    """Sites approve a digest of them: a default that this version filled in would change it."""
    values = {**RUN, "solver": {**RUN["solver"], **rates}, "trainable": {}}
    run = parse(RunConfig, values, base=Path())
    assert json.dumps(run.model_dump(mode="json")["solver"], sort_keys=True) == json.dumps(
        values["solver"], sort_keys=True
    )
    assert run.solver.settings() == values["solver"]


def test_a_file_of_another_owner_is_called_what_it_is(tmp_path: Path) -> None:
    files = {RunConfig: RUN, SiteConfig: SITE, SimulationConfig: {"run": RUN, "partition": {"kind": "iid"}}}
    names = {RunConfig: "run file", SiteConfig: "site file", SimulationConfig: "simulation file"}
    for model in files:
        for other, values in files.items():
            path = tmp_path / "file.yaml"
            path.write_text(yaml.safe_dump(values))
            if model is not other:
                with pytest.raises(BadInput, match=f"expected a {names[model]}, got a {names[other]}"):
                    load(model, path)


def test_up_to_three_errors_are_said_and_of_more_their_number() -> None:
    wrong = {"rounds": 0, "seed": "x", "name": "A"}
    with pytest.raises(BadInput) as caught:
        parse(RunConfig, {**RUN, **wrong}, base=Path())
    assert all(f"{key}: expected" in str(caught.value) or f"{key}: " in str(caught.value) for key in wrong)
    assert "more)" not in str(caught.value)
    with pytest.raises(BadInput, match=r"\(and 3 more\)"):
        parse(RunConfig, {**RUN, **wrong, "max_delta_norm": -1}, base=Path())
