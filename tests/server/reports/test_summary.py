"""The summary is a view of the journal: nothing else is needed to make it, and its keys are stable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from common.events import RoundEnded, RunEnded, RunEvent, SiteJoined, SiteRejected, Summary, read_run_journal
from common.privacy.gaussian import gdp_epsilon
from common.types import BadInput, Plan, Unit
from server.reports import answers, tables
from server.reports.summary import list_failures, summarize
from server.reports.tables import render_summary
from server.rounds.replies import check_plan
from simulations.config import Baseline
from tests.server.rounds.test_loop import federate
from tests.tiny import run_config, site_config


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[RunEvent]:
    folder = tmp_path_factory.mktemp("run")
    poor = site_config(folder, "north", budget={"epsilon": 0.1, "delta": 1e-5})
    _, events = federate(folder / "run", [site_config(folder, "east"), poor])
    return events


def test_the_summary_has_the_documented_keys(events: list[RunEvent]) -> None:
    summary = summarize(events)
    written = json.loads(summary.to_json())
    assert written["schema_version"] == 2
    assert Summary.model_validate_json(summary.to_json()) == summary


def test_a_declined_site_is_in_the_summary_with_its_reason(events: list[RunEvent]) -> None:
    sites = summarize(events).sites
    assert (sites["north"].status, sites["north"].reason) == ("declined", "declined: budget")
    assert (sites["east"].status, sites["east"].rounds) == ("completed", 2)


def test_epsilon_is_composed_over_all_rounds_and_never_added(events: list[RunEvent]) -> None:
    """Two rounds of two full-batch steps at noise 2: mu = sqrt(4 / 2**2) = 1."""
    got = summarize(events).sites["east"].epsilon
    assert got == pytest.approx(gdp_epsilon(math.sqrt(4 / 2.0**2), 1e-5), rel=1e-6)


def test_bytes_are_those_of_the_encoded_messages(events: list[RunEvent]) -> None:
    size = summarize(events).bytes
    params = 4 * (4 * 3 + 3 + 4 * 2 + 2)
    assert params < (size.down_per_site_round or 0) < params + 3000
    assert params < size.up_per_site_round < params + 3000
    assert size.backbone_per_site > 0


def test_a_run_cut_short_is_failed_and_says_which_task_was_never_updated(events: list[RunEvent]) -> None:
    summary = summarize([event for event in events if not isinstance(event, RunEnded | RoundEnded)])
    assert summary.status == "failed"
    assert list(list_failures(summary)) == [
        f"task {name} was never updated: no site's contribution was accepted" for name in ("colour", "size")
    ]


def test_each_baseline_has_a_column_and_a_name() -> None:
    (literal,) = (part for part in get_args(Baseline) if get_args(part))
    assert list(tables.BASELINES) == list(answers.BASELINES) == list(get_args(literal))


def test_the_tables_name_unit_and_neighbours_beside_epsilon(events: list[RunEvent]) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_summary(summarize(events)))
    console.file.close()
    text = console.export_text()
    assert "add_remove" in text and "example" in text and "1e-05" in text


def test_many_sites_with_equal_rows_share_one(events: list[RunEvent]) -> None:
    summary = summarize(events)
    east = summary.sites["east"]
    many = summary.model_copy(update={"sites": summary.sites | {f"east-{number}": east for number in range(30)}})
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_summary(many))
    console.file.close()
    rows = [line for line in console.export_text().splitlines() if "completed" in line]
    assert len(rows) == 2 and "east-0 and 29 more" in rows[1]  # `east` alone has tasks.


def test_the_journal_on_disk_gives_the_same_summary(tmp_path: Path) -> None:
    _, events = federate(tmp_path / "run", [site_config(tmp_path, "east")])
    assert summarize(read_run_journal(tmp_path / "run" / "journal.jsonl")) == summarize(events)


@pytest.mark.parametrize(("noise", "unit"), [(0.0, Unit.EXAMPLE), (2.0, Unit.PATIENT)])
def test_a_plan_other_than_the_runs_is_refused(noise: float, unit: Unit) -> None:
    plan = Plan(sampling_rate=1.0, steps=1, clip_norm=1.0, noise_multiplier=noise, unit=unit)
    with pytest.raises(BadInput, match="expected a plan"):
        check_plan(plan, run_config())


def test_a_site_that_joined_when_it_was_asked_again_is_not_partial(events: list[RunEvent]) -> None:
    joined = next(at for at, event in enumerate(events) if isinstance(event, SiteJoined) and event.site == "east")
    waiting = SiteRejected(site="east", reason="declined: not_approved", stage="join")
    before = summarize([*events[:joined], waiting, *events[joined:]]).sites["east"]
    assert (before.status, before.reason) == ("completed", None)
    after = summarize([*events[: joined + 1], waiting, *events[joined + 1 :]]).sites["east"]
    assert (after.status, after.reason) == ("partial", "declined: not_approved")
