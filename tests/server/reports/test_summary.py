"""The summary is a view of the journal: nothing else is needed to make it, and its keys are stable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.events import read
from common.privacy.gaussian import gdp_epsilon
from common.types import BadInput, Plan, Unit
from server.reports.summary import failures, summarize, tables
from server.rounds.replies import check_plan
from tests.server.rounds.test_loop import federate
from tests.tiny import run_config, site_config

TOP = {
    "schema",
    "run",
    "path",
    "executor",
    "rounds",
    "status",
    "backbone",
    "backbones",
    "tasks",
    "sites",
    "audit",
    "bytes",
    "seconds",
}
TASK = {"kind", "status", "updates", "sites", "metrics", "per_site", "evaluation", "baselines"}
SITE = {
    "status",
    "reason",
    "epsilon",
    "delta",
    "unit",
    "relation",
    "budget_epsilon",
    "rounds",
    "evaluations",
    "left_out",
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    poor = site_config(folder, "north", budget={"epsilon": 0.1, "delta": 1e-5})
    _, facts = federate(folder / "run", [site_config(folder, "east"), poor])
    return facts


def test_the_summary_has_the_documented_keys(facts: list[dict[str, Any]]) -> None:
    summary = summarize(facts)
    assert set(summary) == TOP and summary["schema"] == 1
    assert all(set(task) == TASK for task in summary["tasks"].values())
    assert all(set(site) == SITE for site in summary["sites"].values())
    json.dumps(summary, allow_nan=False)


def test_a_declined_site_is_in_the_summary_with_its_reason(facts: list[dict[str, Any]]) -> None:
    sites = summarize(facts)["sites"]
    assert (sites["north"]["status"], sites["north"]["reason"]) == ("declined", "declined: budget")
    assert (sites["east"]["status"], sites["east"]["rounds"]) == ("completed", 2)


def test_epsilon_is_composed_over_all_rounds_and_never_added(facts: list[dict[str, Any]]) -> None:
    """Two rounds of two full-batch steps at noise 2: mu = sqrt(4 / 2**2) = 1."""
    got = summarize(facts)["sites"]["east"]["epsilon"]
    assert got == pytest.approx(gdp_epsilon(math.sqrt(4 / 2.0**2), 1e-5), rel=1e-6)


def test_bytes_are_those_of_the_encoded_messages(facts: list[dict[str, Any]]) -> None:
    size = summarize(facts)["bytes"]
    params = 4 * (4 * 3 + 3 + 4 * 2 + 2)
    assert params < size["down_per_site_round"] < params + 3000
    assert params < size["up_per_site_round"] < params + 3000
    assert size["backbone_per_site"] > 0


def test_a_run_cut_short_is_failed_and_says_which_task_was_never_updated(facts: list[dict[str, Any]]) -> None:
    summary = summarize([fact for fact in facts if fact["event"] not in ("run_ended", "round")])
    assert summary["status"] == "failed"
    assert list(failures(summary)) == [
        f"task {name} was never updated: no site's contribution was accepted" for name in ("colour", "size")
    ]


def test_the_tables_name_unit_and_neighbours_beside_epsilon(facts: list[dict[str, Any]]) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(summarize(facts)))
    console.file.close()
    text = console.export_text()
    assert "add_remove" in text and "example" in text and "1e-05" in text


def test_the_journal_on_disk_gives_the_same_summary(tmp_path: Path) -> None:
    _, facts = federate(tmp_path / "run", [site_config(tmp_path, "east")])
    assert summarize(read(tmp_path / "run" / "journal.jsonl")) == summarize(facts)


@pytest.mark.parametrize(("noise", "unit"), [(0.0, Unit.EXAMPLE), (2.0, Unit.PATIENT)])
def test_a_plan_other_than_the_runs_is_refused(noise: float, unit: Unit) -> None:
    plan = Plan(sampling_rate=1.0, steps=1, clip_norm=1.0, noise_multiplier=noise, unit=unit)
    with pytest.raises(BadInput, match="expected a plan"):
        check_plan(plan, run_config())


def test_a_site_that_joined_when_it_was_asked_again_is_not_partial(facts: list[dict[str, Any]]) -> None:
    joined = next(index for index, fact in enumerate(facts) if fact["event"] == "joined" and fact["site"] == "east")
    waiting = {**facts[joined], "event": "set_aside", "reason": "declined: not_approved"}
    before = summarize([*facts[:joined], waiting, *facts[joined:]])["sites"]["east"]
    assert (before["status"], before["reason"]) == ("completed", None)
    after = summarize([*facts[: joined + 1], waiting, *facts[joined + 1 :]])["sites"]["east"]
    assert (after["status"], after["reason"]) == ("partial", "declined: not_approved")
