"""A coordinator's metrics and status page, from real files: journals, admitted sites and certificates."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.events import (
    Event,
    FileJournal,
    HeadsEvaluated,
    QuorumAwaited,
    RepliesAwaited,
    RoundEnded,
    RunEnded,
    RunFailure,
    RunInterruption,
    RunStarted,
    SiteJoined,
    SiteRejected,
)
from common.privacy.accounting import Mechanism, compute_epsilon
from common.types import Plan, Unit
from server.deployment import admitted_sites, certificates
from server.deployment.federation import Federation
from server.monitoring.counts import classify_reason
from server.monitoring.monitor import Monitor
from server.monitoring.page import list_verdicts
from tests.federation import ROOT
from tests.server.deployment.federations import new_federation, write_key_pair

PLAN = Plan(1.0, 2, 1.0, 4.0, Unit.PATIENT)
HOSTILE = "<script>alert('1')</script>\"&"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = new_federation(tmp_path / "fed")
    for site in ("a", "b"):
        key = write_key_pair(tmp_path, site)
        admitted_sites.admit_site(made, site, key)
    return made


def write_run(federation: Federation, name: str, *events: Event) -> Path:
    folder = federation.runs / name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("name: chest\n")
    journal = FileJournal(folder / "journal.jsonl")
    for event in events:
        journal.write(event)
    return folder


def make_round(number: int, *sites: str) -> RoundEnded:
    update = {"bytes_down": 100, "bytes_up": 40, "plan": PLAN}
    return RoundEnded(
        round=number, sites={site: update for site in sites}, num_updates={"heart": len(sites)}, updated=("heart",),
        seconds=1.5,
    )  # fmt: skip


def join(site: str) -> SiteJoined:
    return SiteJoined(site=site, tasks={"heart": 100}, unit=Unit.PATIENT, delta=1e-5, budget_epsilon=8.0)


def start(rounds: int = 5) -> RunStarted:
    return RunStarted(run_id="chest-1", rounds=rounds, tasks={"heart": "classification"})


def read_metrics(monitor: Monitor) -> dict[str, dict[tuple[str, ...], float]]:
    """Metric -> values of its labels, in the order of the labels' names -> value."""
    text = monitor.list_pages()["/metrics"]().body.decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("headwater_"), {})[
                tuple(value for _, value in sorted(sample.labels.items()))
            ] = sample.value
    return found


def read_page(monitor: Monitor) -> str:
    return monitor.list_pages()["/"]().body.decode()


def test_metrics_are_what_the_journal_says(federation: Federation) -> None:
    rejected = SiteRejected(site="b", reason="declined: budget", stage="train", round=2)
    stranger = SiteRejected(site="x", reason="expected finite values", stage="train", round=2)
    run = (start(), join("a"), join("b"), make_round(1, "a", "b"), rejected, stranger, make_round(2, "a"))
    write_run(federation, "chest-1", *run)
    found = read_metrics(Monitor(federation))
    assert found["run_rounds_done"] == {(): 2}
    assert found["run_rounds"] == {(): 5}
    assert found["rounds_total"] == {(): 2}
    assert found["round_seconds_total"] == {(): 3.0}
    assert found["replies_accepted_total"] == {("a",): 2, ("b",): 1}
    assert found["bytes_sent_total"] == {("a",): 200, ("b",): 100}
    assert found["bytes_received_total"] == {("a",): 80, ("b",): 40}
    assert found["replies_rejected_total"] == {("declined_budget", "b", "train"): 1, ("invalid", "other", "train"): 1}
    of_a = compute_epsilon([Mechanism("gaussian", 4.0, 1.0, 4, 1.0)], 1e-5)
    of_b = compute_epsilon([Mechanism("gaussian", 4.0, 1.0, 2, 1.0)], 1e-5)
    assert found["run_site_epsilon"] == {("a",): of_a, ("b",): of_b}
    assert found["run_site_budget_epsilon"] == {("a",): 8.0, ("b",): 8.0}
    assert found["superlink_up"] == {(): 0}
    assert 300 < found["certificate_days_left"][()] < 400
    assert found["run_under_way"] == {(): 0}


def test_every_metric_is_in_the_documentation(federation: Federation) -> None:
    rejected = SiteRejected(site="b", reason="declined: budget", stage="train", round=2)
    write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"), rejected)
    text = (ROOT / "docs/monitoring.md").read_text()
    names = {*read_metrics(Monitor(federation)), "site_connected", "site_last_contact_timestamp_seconds"}
    assert not [name for name in names if f"`{name}`" not in text]


def test_an_evaluation_is_part_of_epsilon(federation: Federation) -> None:
    released = HeadsEvaluated(round=1, tasks={}, noise_multipliers={"a": 3.0})
    write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"), released)
    kinds = [Mechanism("gaussian", 4.0, 1.0, 2, 1.0), Mechanism("gaussian", 3.0, 1.0, 1, 1.0)]
    assert read_metrics(Monitor(federation))["run_site_epsilon"] == {("a",): compute_epsilon(kinds, 1e-5)}


def test_counters_never_fall_when_an_old_run_is_removed(federation: Federation) -> None:
    old = write_run(federation, "chest-0", start(), join("a"), make_round(1, "a"))
    write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"))
    monitor = Monitor(federation)
    assert read_metrics(monitor)["rounds_total"] == {(): 2}
    for path in old.iterdir():
        path.unlink()
    old.rmdir()
    assert read_metrics(monitor)["rounds_total"] == {(): 2}
    assert "chest-0" not in read_page(monitor)


def test_new_lines_are_added_and_a_torn_line_waits_for_its_end(federation: Federation) -> None:
    folder = write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"))
    monitor = Monitor(federation)
    assert read_metrics(monitor)["run_rounds_done"] == {(): 1}
    whole = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)[-1].replace(b'"round": 1', b'"round": 2')
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(whole[:30])
    assert read_metrics(monitor)["run_rounds_done"] == {(): 1}
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(whole[30:])
    assert read_metrics(monitor)["run_rounds_done"] == {(): 2}
    assert read_metrics(monitor)["rounds_total"] == {(): 2}


def test_a_journal_that_was_replaced_is_read_from_its_beginning(federation: Federation) -> None:
    folder = write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"), make_round(2, "a"))
    monitor = Monitor(federation)
    assert read_metrics(monitor)["replies_accepted_total"] == {("a",): 2}
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "new").write_bytes(b"".join(lines[:3]))
    os.replace(folder / "new", folder / "journal.jsonl")
    assert read_metrics(monitor)["replies_accepted_total"] == {("a",): 1}


def test_labels_are_bounded_whatever_a_site_says(federation: Federation) -> None:
    rejected = [
        SiteRejected(site=f"node {number}", reason=f"a norm of {number}", stage=f"s{number}") for number in range(50)
    ]
    write_run(federation, "chest-1", start(), *rejected)
    assert read_metrics(Monitor(federation))["replies_rejected_total"] == {("invalid", "other", "other"): 50}


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("declined: budget", "declined_budget"),
        ("declined: <b>", "declined_other"),
        ("no reply before the time-out", "no_reply"),
        ("its reply did not arrive (error 4)", "lost"),
        ("error 17", "lost"),
        ("expected an update of norm at most 3, got 9", "invalid"),
    ],
)
def test_a_reason_has_one_of_few_classes(reason: str, expected: str) -> None:
    assert classify_reason(reason) == expected


def test_every_text_on_the_page_is_escaped(federation: Federation) -> None:
    events = (
        RunStarted(run_id=HOSTILE, rounds=2, tasks={HOSTILE: "x"}),
        SiteJoined(site=HOSTILE, tasks={HOSTILE: 1}, unit=Unit.PATIENT, delta=1e-5, budget_epsilon=1.0),
        SiteRejected(site=HOSTILE, reason=f"`{HOSTILE}` ` {HOSTILE}", stage=HOSTILE),
        RepliesAwaited(message_type="train", round=1, node_ids=(7,)),
        RunFailure(reason=HOSTILE),
    )
    write_run(federation, "run<script>", *events)
    page = read_page(Monitor(federation))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot;&amp;") >= 6
    assert "run&lt;script&gt;" in page


def test_the_page_asks_for_nothing_and_runs_nothing(federation: Federation) -> None:
    page = read_page(Monitor(federation))
    for word in (
        "<script",
        "src=",
        "href=",
        "url(",
        "@import",
        "style=",
        "onload",
        "<form",
        "<iframe",
        "http:",
        "https:",
    ):
        assert word not in page, word


def test_problems_come_first_with_what_to_do(federation: Federation) -> None:
    write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"), RunFailure(reason="the disk is full"))
    certificates.write_server(federation.tls, ["localhost"], days=9)
    levels = [(level, what, first) for level, what, first in list_verdicts(Monitor(federation).look())]
    assert [level for level, _, _ in levels] == ["bad", "bad", "attention"]
    assert levels[0][1] == "The SuperLink inside the coordinator does not answer."
    assert levels[1][1] == "Run chest-1 failed: the disk is full"
    assert levels[1][2].startswith(f"`headwater coordinator resume {federation.folder} chest-1`")
    assert levels[2][1] == "The server's certificate expires in 8 day(s)."
    assert f"<code>headwater coordinator renew {federation.folder}</code>" in read_page(Monitor(federation))


def test_runs_that_wait_are_counted_and_are_not_the_newest_begun(federation: Federation) -> None:
    write_run(
        federation, "chest-1", start(), join("a"), make_round(1, "a"), RunInterruption(reason="b is not connected")
    )
    for name in ("chest-2", "chest-3"):
        (write_run(federation, name) / "order.json").write_text('{"submitted_at": 9e9}')
    monitor = Monitor(federation)
    found = read_metrics(monitor)
    assert (found["queue_length"], found["run_info"]) == ({(): 2}, {("chest-1",): 1})
    assert "Run chest-1 was interrupted: b is not connected" in [what for _, what, _ in list_verdicts(monitor.look())]
    (federation.runs / "chest-3/order.json").write_text('{"submitted_at": 9e9, "wanted": "cancel"}')
    assert read_metrics(monitor)["queue_length"] == {(): 1}
    page = read_page(monitor)
    assert [page.count(f"<td>{state}</td>") for state in ("queued", "cancelled", "interrupted")] == [1, 1, 1]


def test_a_round_that_waits_for_its_quorum_is_said(federation: Federation) -> None:
    awaited = QuorumAwaited(round=2, sites={"b": "not connected"}, seconds=600)
    write_run(federation, "chest-1", start(), join("a"), make_round(1, "a"), awaited)
    seen = replace(Monitor(federation).look(), current="chest-1", answering=True)
    [what] = [what for level, what, _ in list_verdicts(seen) if level == "bad" and "too few" in what]
    assert what.startswith("Run chest-1 has too few sites in round 2 and waits for them until ")
    assert what.endswith(": b: not connected.")


def test_a_run_that_completed_is_no_problem(federation: Federation) -> None:
    ended = RunEnded(updates={"heart": 1}, heads="0" * 64, num_received=1, num_sites=1)
    write_run(federation, "chest-1", start(1), join("a"), make_round(1, "a"), ended)
    assert not [what for _, what, _ in list_verdicts(Monitor(federation).look()) if "chest-1" in what]


def test_a_scrape_of_a_long_journal_is_cheap(federation: Federation) -> None:
    folder = write_run(federation, "chest-1", start(10_000), join("a"), make_round(1, "a"))
    line = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with (folder / "journal.jsonl").open("ab") as file:
        file.writelines(line.replace(b'"round": 1', b'"round": %d' % number) for number in range(2, 10_001))
    monitor = Monitor(federation)
    assert read_metrics(monitor)["rounds_total"] == {(): 10_000}
    monitor.look()
    before = time.process_time()
    monitor.look()
    # The first look reads 2 MB; a later one only asks for the file's size.
    assert time.process_time() - before < 0.2
