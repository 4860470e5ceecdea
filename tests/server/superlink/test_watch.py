"""What a person sees of a run and of a federation: views of the journal, the admitted sites and the node ids."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from common.events import (
    AcceptedUpdate,
    FeaturesReady,
    FileJournal,
    RepliesAwaited,
    RoundEnded,
    RunFailure,
    RunStarted,
    SiteJoined,
    SiteRejected,
)
from common.types import Plan, Unit
from common.yaml import write_yaml
from server.deployment import admitted_sites
from server.reports.status import RunStatus
from server.reports.tables import render_status
from server.superlink import operate
from server.superlink.node_ids import NodeIds
from server.superlink.queue import Order, withdraw_run
from server.superlink.watch import describe_event
from tests import tiny
from tests.server.deployment.federations import new_federation, write_key_pair

PLAN = Plan(sampling_rate=1.0, steps=1, clip_norm=1.0, noise_multiplier=2.0, unit=Unit.EXAMPLE)
UPDATE = AcceptedUpdate(bytes_down=10, bytes_up=20, plan=PLAN)


def end_of_round(number: int, sites: Mapping[str, AcceptedUpdate] = MappingProxyType({})) -> RoundEnded:
    return RoundEnded(round=number, sites=dict(sites), num_updates={}, updated=(), seconds=0.1)


def write_node_ids(path: Path, names: dict[str, str]) -> None:
    path.write_text(json.dumps(names))
    time.sleep(0.02)  # A file system's clock is coarse.


def test_a_round_names_its_sites_and_the_tasks_that_stayed_as_they_were() -> None:
    event = RoundEnded(
        round=3,
        sites=dict.fromkeys(("north", "south"), UPDATE),
        num_updates={"digit": 2, "loop": 1},
        updated=("digit",),
        seconds=1.25,
    )
    assert describe_event(event, 10) == (
        "round 3 of 10: north, south; updates: digit 2, loop 1; not enough for loop, left unchanged; 1.2 s"
    )


def test_a_site_that_may_still_join_is_not_called_rejected() -> None:
    early = SiteRejected(site="north", reason="not connected", stage="join")
    assert describe_event(early, 10) == "north has not joined so far: not connected"
    refused = SiteRejected(site="north", reason="declined: budget", stage="join")
    assert str(describe_event(refused, 10)).startswith("north rejected at join: declined: budget")


def test_a_site_that_is_rejected_is_shown_with_its_reason() -> None:
    event = SiteRejected(site="north", reason="declined: budget", stage="train", round=2)
    assert (
        describe_event(event, 10)
        == "north rejected at train: declined: budget (its budget does not cover what was asked)"
    )
    assert describe_event(RepliesAwaited(message_type="train", round=2, node_ids=(1,)), 10) is None


def test_the_node_ids_follow_their_file_and_forget_no_name(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    write_node_ids(path, {"18446744073709551615": "north"})
    node_ids = NodeIds(path)
    assert dict(node_ids) == {18446744073709551615: "north"}
    write_node_ids(path, {"7": "south"})
    assert dict(node_ids) == {7: "south"}
    assert 18446744073709551615 not in node_ids and len(node_ids) == 1
    assert node_ids[18446744073709551615] == "north"


def test_status_counts_replies_and_continues_over_a_resumed_run(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    folder = federation.runs / "tiny-1"
    folder.mkdir()
    write_yaml(folder / "config.yaml", tiny.run_config())
    journal = FileJournal(folder / "journal.jsonl")
    journal.write(RunStarted(run_id="tiny-1", rounds=4))
    journal.write(SiteJoined(site="north", tasks={"digit": 10}, unit=Unit.EXAMPLE, delta=1e-5, budget_epsilon=8.0))
    journal.write(end_of_round(1, sites={"north": UPDATE}))
    journal.write(RunFailure(reason="killed"))
    journal.write(RunStarted(run_id="tiny-1", rounds=4))
    journal.write(end_of_round(2))
    found = operate.status(federation)
    assert found.run == RunStatus(
        id="tiny-1", state="interrupted", under_way=False, round=2, rounds=4, replies={"north": 1}
    )
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_status(found))
    shown = capture.get()
    assert "round 2 of 4, interrupted" in shown and "not running" in shown and "north" in shown
    withdraw_run(folder, "cancel")
    run = operate.status(federation).run
    assert run is not None and run.state == "cancelled"


def test_status_says_pace_and_time_left_of_a_run_under_way(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    folder = federation.runs / "tiny-1"
    folder.mkdir()
    write_yaml(folder / "config.yaml", tiny.run_config())
    (folder / "order.json").write_text(Order(submitted_at=0.0, attempts=1).model_dump_json())
    journal = FileJournal(folder / "journal.jsonl")
    journal.write(RunStarted(run_id="tiny-1", rounds=10))
    journal.write(FeaturesReady(seconds=1.0, time=100.0))
    for number in (1, 2):
        journal.write(end_of_round(number).model_copy(update={"time": 100.0 + 3.0 * number}))
    run = operate.status(federation).run
    assert run is not None
    assert (run.phase, run.seconds_per_round, run.seconds_left) == ("training", 3.0, 24.0)
    found = operate.status(federation).model_copy(update={"run": run.model_copy(update={"under_way": True})})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_status(found))
    assert "round 2 of 10, training, 3 s a round, about 24 s left, under way" in capture.get()
