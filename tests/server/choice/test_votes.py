"""A coordinator's choice against real sites: votes are paid once, and nothing else that is sent depends on records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from client.app import make_app
from client.choice.answer import vote
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.protocol.approvals import Approvals
from client.protocol.evaluate import evaluate
from client.protocol.prepare import finish
from client.protocol.replies import Replies
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import measure, train
from common import messages
from common.events import (
    ChoiceEnded,
    FileJournal,
    ReplyResent,
    RequestDeclined,
    RunEnded,
    RunEvent,
    SiteRejected,
    VotesCounted,
    read_run_journal,
    read_site_journal,
    select_events,
)
from common.model.backbones import Backbone, open_backbones
from common.offers import list_digests, make_offer
from common.privacy.accounting import Mechanism
from common.privacy.noise import Entropy, SeededEntropy, os_entropy
from common.run import RunConfig
from common.types import BadInput, RunFailed, RunInterrupted, heads_digest
from server.choice.outcome import read_choice, write_choice
from server.choice.votes import run_choice
from server.reports.summary import list_failures, summarize
from server.superlink.watch import describe_event
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.server.rounds.test_loop import federate
from tests.tiny import DIM, TASKS, run_config, site_config, write_records

BACKBONES: dict[str, Any] = {
    # One cosine of a frequency far above any in the records: as good as a random number.
    "poor": {"kind": "identity", "dim": DIM, "projection": {"normalize": False, "kernel": {"width": 1e-3, "dim": 1}}},
    "good": {"kind": "identity", "dim": DIM},
}


def cohort(**changes: Any) -> dict[str, Any]:
    return {"min_sites": 1, "timeout_s": 5, "join_timeout_s": 1, "patience_s": 0.5, "grace_s": 0.2, **changes}


def choice_config(**changes: Any) -> RunConfig:
    """A vote of epsilon 8 on two backbones, from 29 declared units on."""
    values: dict[str, Any] = {
        "backbone": None,
        "backbones": BACKBONES,
        "rounds": 1,
        "tasks": {"colour": TASKS["colour"]},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
        "choice": {"scorer": {"kind": "ridge"}},
        "licences": {"good": "CC0-1.0"},
        "cohort": cohort(),
    }
    return run_config(**{**values, **changes})


def choose(
    folder: Path,
    sites: list[SiteConfig],
    *,
    entropy: Entropy = os_entropy,
    lost: Mapping[str, str] | None = None,
    forged: Mapping[str, messages.VoteReply] | None = None,
    **changes: Any,
) -> list[RunEvent]:
    """Runs a choice and returns its journal.

    Of some sites the answer to a kind of request is lost (site -> kind), or another vote is sent.
    """
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], entropy)

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        name = sites[int(context.node_config["partition-id"])].name
        if (lost or {}).get(name) == message.metadata.message_type:
            raise ConnectionError("lost")
        if message.metadata.message_type == messages.VOTE and name in (forged or {}):
            return Message(messages.encode((forged or {})[name]), reply_to=message)
        return reply

    folder.mkdir(parents=True, exist_ok=True)
    run = choice_config(**changes)
    opened = open_backbones(run)
    run_choice(
        InProcessGrid(app, len(sites)),
        run,
        opened,
        run_id="choice-1",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    write_choice(folder, run, opened)
    return read_run_journal(folder / "journal.jsonl")


def list_charges(site: SiteConfig) -> list[tuple[str, float, int, bool]]:
    """Kind, epsilon, round and state of each charge."""
    ledger = Ledger.find(locate_ledgers(site), site.registry)
    return [
        (charge.mechanism.kind, charge.mechanism.choice_epsilon, charge.round, charge.committed)
        for charge in (ledger.charges() if ledger else ())
    ]


def test_sites_receive_the_candidates_vote_once_and_hear_what_was_chosen(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north", "west")]
    events = choose(tmp_path / "run", sites)
    (counted,) = select_events(events, VotesCounted)
    assert set(counted.votes) == {"east", "north", "west"} and counted.chosen == "good"
    assert (counted.epsilon, counted.sensitivity, counted.min_size) == (8.0, 9.25, 29)
    choice = read_choice(tmp_path / "run")
    assert (choice.chosen, choice.by, choice.task) == ("good", "vote", "colour")
    assert [(row.name, row.dimension, row.licence) for row in choice.rows] == [
        ("poor", 1, None),
        ("good", 4, "CC0-1.0"),
    ]
    assert sum(row.votes or 0 for row in choice.rows) == 3 and choice.price is not None
    for site in sites:
        assert list_charges(site) == [("exponential", 8.0, 1, True)]
        (ended,) = select_events(read_site_journal(site.coordinator_dir / "site.jsonl"), ChoiceEnded)
        assert ended.chosen == "good"
        history = Site(site, os_entropy).ledger().history()
        assert choice.price.budget_used[site.name] == pytest.approx(history.compute_share())
        assert not history.list_earmarked() and not history.earmarks
    lines = [line for event in events if (line := describe_event(event, 0))]
    assert any("a vote on 2 backbones" in line for line in lines) and any("good is chosen" in line for line in lines)


def test_a_choice_that_is_done_again_gets_the_stored_votes_for_nothing(tmp_path: Path) -> None:
    """The coordinator died after the first site's vote had come, or before: it asks all the same again."""
    sites = [site_config(tmp_path, name) for name in ("east", "north", "west")]
    rules = cohort(min_sites=3)
    with pytest.raises(RunInterrupted, match="the vote: expected"):
        choose(tmp_path / "run", sites, lost={"west": messages.VOTE}, cohort=rules)
    votes = select_events(choose(tmp_path / "run", sites, cohort=rules), VotesCounted)[-1].votes
    again = select_events(choose(tmp_path / "again", sites, cohort=rules), VotesCounted)[-1].votes
    assert votes == again and len(votes) == 3
    for site in sites:
        assert list_charges(site) == [("exponential", 8.0, 1, True)]
        assert select_events(read_site_journal(site.coordinator_dir / "site.jsonl"), ReplyResent)


def test_a_result_stands_and_who_missed_it_is_told_again(tmp_path: Path) -> None:
    """North did not hear the result, and had not voted; when the choice is resumed it hears it, and is not asked."""
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    events = choose(tmp_path / "run", sites, lost={"north": messages.PREPARE})
    before = (tmp_path / "run" / "choice.json").read_bytes()
    (tmp_path / "north-state" / "runs" / "choice-1" / "chosen").unlink()
    events = choose(tmp_path / "run", sites)
    assert len(select_events(events, VotesCounted)) == 1 and len(select_events(events, RunEnded)) == 2
    assert (tmp_path / "run" / "choice.json").read_bytes() == before and list_charges(sites[1]) == []
    assert (tmp_path / "north-state" / "runs" / "choice-1" / "chosen").exists()


def test_ties_go_to_the_first_of_the_file(tmp_path: Path) -> None:
    """Two sites, one sure of each candidate: the order of the file decides, in the run's folder too."""
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    forged = {"east": messages.VoteReply("good"), "north": messages.VoteReply("poor")}
    for names in (["poor", "good"], ["good", "poor"]):
        folder = tmp_path / names[0]
        backbones = {name: BACKBONES[name] for name in names}
        for site in sites:
            shutil.rmtree(site.state_dir, ignore_errors=True)
        choose(folder, sites, forged=forged, backbones=backbones)
        assert read_choice(folder).chosen == names[0]


def test_who_declares_too_few_is_not_asked_and_nothing_is_held(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, "east"), declare(site_config(tmp_path, "north"), 28)]
    (counted,) = select_events(choose(tmp_path / "run", sites), VotesCounted)
    assert set(counted.votes) == {"east"} and counted.abstained == ("north",)
    assert list_charges(sites[1]) == [] and not Site(sites[1], os_entropy).ledger().history().earmarks
    (ended,) = select_events(read_site_journal(sites[1].coordinator_dir / "site.jsonl"), ChoiceEnded)
    assert ended.chosen == counted.chosen
    # A coordinator that asks all the same learns nothing, and the site pays nothing.
    with pytest.raises(SiteDeclined, match="a vote of epsilon 8 needs 29 declared units"):
        vote(Site(sites[1], os_entropy), messages.VoteRequest("choice-1"))


def test_where_all_declare_too_few_nobody_votes_and_the_epsilon_that_is_enough_is_said(tmp_path: Path) -> None:
    """25 x 9.25 = 231.25; for 20 units epsilon 11.57 is needed, which only the larger of both budgets covers."""
    small = site_config(tmp_path, "north", budget={"epsilon": 4.0, "delta": 1e-5})
    sites = [declare(site_config(tmp_path, "east"), 20), declare(small, 12)]
    with pytest.raises(
        RunFailed,
        match=r"at least 29 declared units.*got 0; epsilon 11\.57 is enough \(the whole budget of 1 .*no site was",
    ):
        choose(tmp_path / "run", sites)
    assert [list_charges(site) for site in sites] == [[], []]
    assert not any(Site(site, os_entropy).ledger().history().earmarks for site in sites)


def declare(site: SiteConfig, size: int) -> SiteConfig:
    tasks = {name: task.model_copy(update={"public_size": size}) for name, task in site.tasks.items()}
    return site.model_copy(update={"tasks": tasks})


def test_a_site_that_declines_is_named_and_the_others_vote(tmp_path: Path) -> None:
    poor = {"budget": {"epsilon": 2.0, "delta": 1e-5}}
    sites = [
        site_config(tmp_path, "east"),
        site_config(tmp_path, "north", **poor),
        site_config(tmp_path, "south", approval="required"),
        site_config(tmp_path, "west", allow={"tasks": ["size"], "backbones": "any", "solvers": "any"}),
        site_config(tmp_path, "zone", allow={"tasks": "any", "backbones": ["d" * 64], "solvers": "any"}),
    ]
    events = choose(tmp_path / "run", sites)
    assert set(select_events(events, VotesCounted)[-1].votes) == {"east"}
    assert {event.site: event.reason for event in select_events(events, SiteRejected)} == {
        "north": "declined: budget",
        "south": "declined: not_approved",
        "west": "declined: task_not_allowed",
        "zone": "declined: backbone_not_allowed",
    }
    assert not any(list_charges(site) for site in sites[1:])
    # Only the site's own journal says how much is left.
    (declined,) = select_events(read_site_journal(sites[1].coordinator_dir / "site.jsonl"), RequestDeclined)
    assert "the largest epsilon that fits is 0." in declined.detail
    approvals = Approvals(sites[2].coordinator_dir)
    approvals.approve(approvals.waiting()[0])
    assert set(select_events(choose(tmp_path / "again", sites), VotesCounted)[-1].votes) == {"east", "south"}
    # Under this approval no other choice is charged.
    assert [approval.used_by for approval in approvals.all()] == ["choice-1"]


def test_a_site_that_votes_for_no_candidate_is_named_and_not_counted(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    events = choose(tmp_path / "run", sites, forged={"north": messages.VoteReply("other")})
    assert set(select_events(events, VotesCounted)[-1].votes) == {"east"}
    ((site, stage, reason),) = [(each.site, each.stage, each.reason) for each in select_events(events, SiteRejected)]
    assert (site, stage) == ("north", "vote") and "no candidate" in reason


def test_a_vote_that_would_hold_a_site_for_hours_is_declined(tmp_path: Path) -> None:
    """Of 10^8 declared units and 10^4 features it has 10^16 products; 2^44 is 1.8 x 10^13."""
    wide = {**BACKBONES["poor"], "projection": {"normalize": False, "kernel": {"width": 1.0, "dim": 10_000}}}
    site = declare(site_config(tmp_path, "east"), 100_000_000)
    with pytest.raises(RunFailed, match="bad_request"):
        privacy = {"unit": "example", "delta": 1e-9, "target_epsilon": 8.0}
        choose(tmp_path / "run", [site], backbones={**BACKBONES, "wide": wide}, privacy=privacy)
    (declined,) = select_events(read_site_journal(site.coordinator_dir / "site.jsonl"), RequestDeclined)
    assert "products" in declined.detail


def test_a_candidate_that_reads_no_record_is_not_chosen_and_the_coordinator_hears_nothing_of_it(tmp_path: Path) -> None:
    sound = {"kind": "log_mel", "sample_rate": 8000, "bands": 12, "range_hz": [60, 3800]}
    sites = [site_config(tmp_path, name, on_bad_record="skip") for name in ("east", "north")]
    events = choose(tmp_path / "run", sites, backbones={"sound": sound, **BACKBONES})
    (counted,) = select_events(events, VotesCounted)
    assert set(counted.votes.values()) == {"good"} and not select_events(events, SiteRejected)


def test_everything_a_site_sends_but_its_vote_is_the_same_whatever_its_records(tmp_path: Path) -> None:
    """Of two sites one has other records, one of them damaged; the noise is the same, and so are the bytes."""
    sent = []
    for place, seed in enumerate((1, 2)):
        (folder := tmp_path / str(place)).mkdir()
        write_records(folder / "east.npz", seed, count=40 + 7 * place)
        if place:
            arrays = dict(np.load(folder / "east.npz"))
            arrays["train_x"][3] = np.nan
            np.savez(folder / "east.npz", **arrays)
        site = site_config(folder, "east", on_bad_record="skip")
        run = choice_config()
        opened = open_backbones(run)
        app = make_app(lambda context, site=site: site, SeededEntropy(0))  # type: ignore[misc]
        sent.append(list(answer_choice(app, run, opened)))
    votes = [json.loads(replies.pop(-2)) for replies in sent]
    assert sent[0] == sent[1]
    assert all(each.pop("vote") in BACKBONES for each in votes) and votes[0] == votes[1]


def answer_choice(app: Any, run: RunConfig, opened: Mapping[str, Backbone]) -> Iterator[str]:
    """Yields the public part of every answer to an honest coordinator; its last but one is the vote."""
    grid = InProcessGrid(app, 1)
    digests = list_digests(opened)
    blobs = [each.blob() for each in opened.values()]
    requests: list[tuple[str, messages.Request]] = [
        (messages.JOIN, messages.JoinRequest("run-1", make_offer(run, opened), digests)),
        *((messages.PART, messages.PartRequest("run-1", blob.digest, 0, 1, bytes(blob.weights))) for blob in blobs),
        (messages.PREPARE, messages.PrepareRequest("run-1", {blob.digest: blob.spec for blob in blobs})),
        (messages.VOTE, messages.VoteRequest("run-1")),
        (messages.FINISH, messages.FinishRequest("run-1", {}, heads_digest({}), chosen="good")),
    ]
    for kind, payload in requests:
        message = Message(messages.encode(payload), dst_node_id=FIRST_NODE_ID, message_type=kind)
        [reply] = grid.send_and_receive([message])
        assert set(reply.content) == {"public"}
        values = json.loads(str(reply.content["public"]["json"]))  # type: ignore[index]
        if values.get("witness"):
            values["witness"] = values["witness"]["length"]  # Its digests have a key of the ledger's own.
        yield json.dumps(values, separators=(",", ":"))


def test_a_site_that_is_killed_in_its_vote_does_not_pay_again(tmp_path: Path) -> None:
    """Killed between charge and stored vote nothing has left; once a vote was stored, a new one is a new charge."""
    (site,) = sites = [site_config(tmp_path, "east")]
    digest = messages.request_digest(messages.VoteRequest("choice-1"))
    mechanism = Mechanism.of_choice(8.0, 9.25)
    Site(site, os_entropy).ledger().reserve(mechanism, run="choice-1", round=1, request=digest)
    choose(tmp_path / "run", sites)
    assert list_charges(site) == [("exponential", 8.0, 1, True)]
    folder = site.coordinator_dir / "runs" / "choice-1"
    (folder / "replies" / digest).unlink()
    (folder / "chosen").unlink()
    choose(tmp_path / "again", sites)
    assert list_charges(site) == [("exponential", 8.0, 1, True)] * 2


def test_a_vote_that_may_have_left_is_charged_anew_where_it_is_lost(tmp_path: Path) -> None:
    """Killed between the stored vote and the ledger's line about it, and the vote was then removed by hand."""
    (site,) = sites = [site_config(tmp_path, "east")]
    digest = messages.request_digest(messages.VoteRequest("choice-1"))
    Site(site, os_entropy).ledger().reserve(Mechanism.of_choice(8.0, 9.25), run="choice-1", round=1, request=digest)
    folder = site.coordinator_dir / "runs" / "choice-1"
    folder.mkdir(parents=True)
    with Replies.exclusive(folder) as replies:
        replies.store(digest, b"a vote")
    (folder / "replies" / digest).unlink()
    choose(tmp_path / "run", sites)
    assert list_charges(site) == [("exponential", 8.0, 1, False), ("exponential", 8.0, 1, True)]


def test_requests_that_are_not_for_a_choice_are_declined(tmp_path: Path) -> None:
    (site,) = sites = [site_config(tmp_path, "east")]
    choose(tmp_path / "run", sites)
    opened = Site(site, os_entropy)
    for request in (
        messages.TrainRequest("choice-1", 1, {"colour": {}}),
        messages.MomentsRequest("choice-1"),
        messages.EvaluateRequest("choice-1", 1, {"colour": {}}),
        messages.FinishRequest("choice-1", {}, heads_digest({}), chosen="other"),
        messages.FinishRequest("choice-1", {"colour": {}}, heads_digest({}), chosen="good"),
    ):
        answer: Any = {
            messages.TrainRequest: train,
            messages.MomentsRequest: measure,
            messages.EvaluateRequest: evaluate,
            messages.FinishRequest: finish,
        }[type(request)]
        with pytest.raises(SiteDeclined):
            answer(opened, request)
    privacy = {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0}
    federate(tmp_path / "trained", sites, run_id="run-1", privacy=privacy)
    with pytest.raises(SiteDeclined, match="the run is no choice"):
        vote(opened, messages.VoteRequest("run-1"))
    assert [charge for charge in list_charges(site) if charge[0] == "exponential"] == [("exponential", 8.0, 1, True)]


def test_a_vote_that_was_not_given_in_time_is_not_paid_for_later(tmp_path: Path) -> None:
    """The site was ready when the others' votes were counted."""
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    choose(tmp_path / "run", sites, lost={"north": messages.PREPARE})
    assert list_charges(sites[1]) == []
    with pytest.raises(SiteDeclined, match="votes of this choice were counted"):
        vote(Site(sites[1], os_entropy), messages.VoteRequest("choice-1"))
    assert list_charges(sites[1]) == [] and not Site(sites[1], os_entropy).ledger().history().earmarks


def test_a_file_that_asks_for_training_in_a_choice_is_refused() -> None:
    training: dict[str, Any] = {
        "rounds": 2,
        "tasks": TASKS,
        "backbones": {"good": BACKBONES["good"]},
        "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0},
        "evaluation": {"every": 1},
        "audit": "required",
        "trust": "secure_sum",
    }
    for key, value in training.items():
        with pytest.raises(BadInput, match=key):
            choice_config(**{key: value})


def test_the_summary_of_a_choice_has_what_each_vote_cost(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, "east"), declare(site_config(tmp_path, "north"), 28)]
    events = choose(tmp_path / "run", sites)
    summary = summarize(events)
    assert summary.status == "completed" and not list(list_failures(summary))
    assert (summary.sites["east"].epsilon, summary.sites["north"].epsilon) == (8.0, None)
