"""The journal: whole lines, in order, whatever a crash left behind; and lines of earlier versions stay readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from common.events import (
    AcceptedUpdate,
    ApprovalEvent,
    BackboneSent,
    DaemonEvent,
    Facts,
    FeaturesReady,
    FileJournal,
    ReplySent,
    RequestDeclined,
    RoundEnded,
    RunApproved,
    RunAudited,
    RunEvent,
    RunFailure,
    RunPrepared,
    SiteEvent,
    SiteRejected,
    Summary,
    read_approval_journal,
    read_run_journal,
    read_site_journal,
    select_events,
    summary_schema,
)
from common.types import Plan, Unit

FIRST, SECOND = FeaturesReady(seconds=1.5), RunFailure(reason="too few sites")


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_events_are_read_as_they_were_written_and_in_order(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "deep" / "journal.jsonl")
    events = [FeaturesReady(seconds=float(number)) for number in range(5)]
    for event in events:
        journal.write(event)
    assert read_run_journal(journal.path) == events
    line = json.loads(journal.path.read_text().splitlines()[0])
    assert list(line)[:2] == ["time", "event"] and line["event"] == "features_ready"


def test_a_torn_last_line_is_ignored_and_the_next_one_is_whole(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    journal.write(FIRST)
    with journal.path.open("a") as file:
        file.write('{"event": "to')
    assert read_run_journal(journal.path) == [FIRST]
    journal.write(SECOND)
    assert read_run_journal(journal.path) == [FIRST, SECOND]


def test_a_value_that_is_not_a_number_cannot_be_written() -> None:
    with pytest.raises(ValidationError, match="finite"):
        FeaturesReady(seconds=float("nan"))


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_run_journal(tmp_path / "none.jsonl") == []


def test_lines_that_are_no_event_or_an_unknown_one_are_skipped(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal.jsonl")
    journal.write(FIRST)
    with journal.path.open("ab") as file:
        file.write(b'\xff\xfe\x00\n[1]\n{}\n{"event": "of_the_future", "x": 1}\n{"event": "round"}\n{"event": []}\n')
        file.write(b'{"event": "round", "round": 1, "sites": {"a": {"down": 1, "up": 1, "plan": {"steps": 0}}}}\n')
    journal.write(SECOND)
    assert read_run_journal(journal.path) == [FIRST, SECOND]


def test_a_fact_that_a_later_version_adds_is_ignored(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "j.jsonl", {"time": 1.0, "event": "run_failed", "reason": "no", "colour": "red"})
    assert read_run_journal(path) == [RunFailure(time=1.0, reason="no")]


# --- earlier versions ------------------------------------------------------------------------------------------------


def test_a_runs_journal_of_an_earlier_version_is_read_under_the_present_names(tmp_path: Path) -> None:
    plan = {"sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "noise_multiplier": 2.0, "unit": "example"}
    rejected, sent, ended = read_run_journal(
        write_lines(
            tmp_path / "journal.jsonl",
            {"time": 2.0, "event": "set_aside", "site": "a", "reason": "declined: budget", "at": "join"},
            {"time": 3.0, "event": "backbone_sent", "site": "a", "backbone": "b", "bytes": 70},
            {
                "time": 4.0,
                "event": "round",
                "round": 1,
                "sites": {"a": {"down": 5, "up": 6, "plan": plan}},
                "tasks": {"t": 1},
                "updated": ["t"],
                "seconds": 0.5,
            },
        )
    )
    assert rejected == SiteRejected(time=2.0, site="a", reason="declined: budget", stage="join")
    assert sent == BackboneSent(time=3.0, site="a", backbone="b", size_bytes=70)
    assert isinstance(ended, RoundEnded) and ended.num_updates == {"t": 1}
    assert (ended.sites["a"].bytes_down, ended.sites["a"].bytes_up) == (5, 6)
    assert ended.sites["a"].plan == Plan(1.0, 2, 1.0, 2.0, Unit.EXAMPLE)


def test_a_sites_journal_of_an_earlier_version_is_read_under_the_present_names(tmp_path: Path) -> None:
    verdict = {
        "epsilon_claimed": 4.0,
        "epsilon_lower_95": 1.0,
        "epsilon_lower_99_9": 0.5,
        "epsilon_lower_one_run_95": 0.4,
        "noise_std_ratio": 1.0,
        "delta": 1e-5,
        "rounds": 3,
        "steps": 6,
        "canaries": 100,
        "seconds": 2.0,
        "passed": True,
        "reasons": [],
    }
    events = read_site_journal(
        write_lines(
            tmp_path / "site.jsonl",
            {"time": 1.0, "event": "sent", "run": "r-1", "round": 1, "mechanism": 2, "bytes": 9},
            {"time": 2.0, "event": "sent", "run": "r-1", "round": 2, "what": "evaluation", "mechanism": 1, "bytes": 8},
            {"time": 3.0, "event": "declined", "refusal": "budget", "detail": "spent"},
            {"time": 4.0, "event": "prepared", "run": "r-1", "problems": 3},
            {"time": 5.0, "event": "audit", "run": "r-1", **verdict},
        )
    )
    assert select_events(events, ReplySent) == [
        ReplySent(time=1.0, run_id="r-1", round=1, purpose="training", num_releases=2, size_bytes=9),
        ReplySent(time=2.0, run_id="r-1", round=2, purpose="evaluation", num_releases=1, size_bytes=8),
    ]
    assert select_events(events, RequestDeclined) == [RequestDeclined(time=3.0, reason="budget", detail="spent")]
    assert select_events(events, RunPrepared) == [RunPrepared(time=4.0, run_id="r-1", num_left_out=3)]
    (audited,) = select_events(events, RunAudited)
    assert audited.run_id == "r-1" and audited.verdict.passed and audited.verdict.canaries == 100


def test_approvals_keep_their_format(tmp_path: Path) -> None:
    line = {"time": 1.0, "event": "approved", "digest": "d" * 64, "run": "demo", "by": "ada"}
    path = write_lines(tmp_path / "approvals.jsonl", line)
    (approved,) = read_approval_journal(path)
    assert approved == RunApproved(time=1.0, digest="d" * 64, run="demo", by="ada")
    FileJournal(tmp_path / "again.jsonl").write(approved)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


# --- the models ------------------------------------------------------------------------------------------------------


def facts_below(kind: type[Facts]) -> set[type[Facts]]:
    return {kind}.union(*(facts_below(each) for each in kind.__subclasses__()))


def test_every_field_of_every_event_and_of_the_summary_is_described() -> None:
    bare = [
        f"{kind.__name__}.{name}"
        for kind in facts_below(Facts)
        for name, field in kind.model_fields.items()
        if not (field.description or "").endswith(".")
    ]
    assert not bare


@pytest.mark.parametrize("events", [RunEvent, SiteEvent, ApprovalEvent, DaemonEvent])
def test_the_names_of_a_journals_events_are_distinct(events: Any) -> None:
    names = [name for kind in get_args(events) for name in (kind.event_name, *kind.former_event_names)]
    assert len(names) == len(set(names))


def test_a_summary_is_immutable() -> None:
    assert Summary.model_config["frozen"]
    with pytest.raises(ValidationError, match="frozen"):
        FIRST.seconds = 2.0  # type: ignore[misc]


def test_the_written_schema_is_that_of_the_model() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "summary.schema.json"
    assert path.read_text(encoding="utf-8") == summary_schema(), "write `common.events.summary_schema()` to this file"


def test_sites_whose_updates_are_one_object_stand_together_and_are_read_apart(tmp_path: Path) -> None:
    plan = Plan(1.0, 2, 1.0, 3.0, Unit.EXAMPLE)
    shared, own = (AcceptedUpdate(bytes_down=number, bytes_up=2, plan=plan, weights={"t": 4.0}) for number in (1, 3))
    sites = {**{f"site-{number}": shared for number in range(500)}, "other": own}
    ended = RoundEnded(round=1, sites=sites, num_updates={"t": 501}, updated=("t",), seconds=0.5)
    journal = FileJournal(tmp_path / "journal.jsonl")
    journal.write(ended)
    (read,) = read_run_journal(journal.path)
    assert read == ended and isinstance(read, RoundEnded) and list(read.sites) == list(sites)
    assert journal.path.stat().st_size < 10_000
    alone = ended.model_copy(update={"sites": {"other": own}})
    assert set(alone.model_dump(mode="json")["sites"]) == {"other"}
