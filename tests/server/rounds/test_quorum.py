"""Sites that are away, lose a message or are slow: a round waits for its quorum, and no site pays twice for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from client.app import make_app
from client.config import SiteConfig
from client.protocol.site import Site
from common import messages
from common.events import (
    FileJournal,
    HeadsEvaluated,
    QuorumAwaited,
    RoundEnded,
    RunEnded,
    RunEvent,
    SiteRejected,
    read_run_journal,
    select_events,
)
from common.offers import make_offer
from common.privacy.noise import SeededEntropy, os_entropy
from common.types import DeclineReason, RunInterrupted, heads_digest
from server.reports.summary import count_missed_rounds, find_status, summarize
from server.rounds.checkpoint import load_checkpoint
from server.rounds.inquiry import Inquiry, Quorum, Waiting
from server.rounds.loop import Outcome, run_federation
from server.rounds.messenger import Messenger, Request
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import backbone, run_config, site_config

EAST, NORTH = FIRST_NODE_ID, FIRST_NODE_ID + 1
NODE_IDS = {EAST: "east", NORTH: "north"}
SHORT = {"min_sites": 1, "timeout_s": 30, "join_timeout_s": 2, "grace_s": 1.0, "patience_s": 1.5}


@dataclass
class Network:
    """The lines to the sites.

    Attributes:
        away: returns whether a node is away now.
        lose: returns whether a message to a node is lost on its way.
        hold: returns whether the answer to a request of a kind, round and node is still on its way.
        asked: the kind, round, node and time of every message that was sent.
        answered: the kind, round and node of every answer that was received.
    """

    away: Callable[[int], bool] = lambda node: False
    lose: Callable[[Message], bool] = lambda message: False
    hold: Callable[[str, int, int], bool] = lambda kind, round_, node: False
    asked: list[tuple[str, int, int, float]] = field(default_factory=list)
    answered: set[tuple[str, int, int]] = field(default_factory=set)

    def times(self, kind: str, round_: int, node: int) -> list[float]:
        return [at for *what, at in self.asked if what == [kind, round_, node]]


class NetworkGrid(InProcessGrid):
    """A grid over such a network."""

    def __init__(self, app: Callable[[Message, Context], Message], num_sites: int, network: Network) -> None:
        super().__init__(app, num_sites)
        self.network = network
        self.sent: dict[str, tuple[str, int, int]] = {}

    def get_node_ids(self) -> list[int]:
        return [node for node in InProcessGrid.get_node_ids(self) if not self.network.away(node)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            about, now = message.metadata, time.monotonic()
            self.network.asked.append((about.message_type, int(about.group_id), about.dst_node_id, now))
            assert about.dst_node_id in self.get_node_ids(), "a site that is away was sent a message"
            if self.network.lose(message):
                ids.append(f"lost-{len(self.network.asked)}")
            else:
                (sent,) = InProcessGrid.push_messages(self, [message])
                self.sent[sent] = (about.message_type, int(about.group_id), about.dst_node_id)
                ids.append(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        there = [item for item in message_ids if item in self.sent and not self.network.hold(*self.sent[item])]
        self.network.answered |= {self.sent[item] for item in there}
        return InProcessGrid.pull_messages(self, there)


def federate(
    folder: Path,
    network: Network,
    *,
    answer: Callable[[Message], Message | None] = lambda message: None,
    resume: bool = False,
    sites: list[SiteConfig] | None = None,
    cohort: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Outcome, list[RunEvent], list[SiteConfig]]:
    """Runs two sites, east and north, over a network; `answer` answers in north's place, where it answers at all."""
    sites = sites or [site_config(folder, name) for name in ("east", "north")]
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0))

    def app(message: Message, context: Context) -> Message:
        own = answer(message) if context.node_id == NORTH else None
        return own or honest(message, context)

    journal = FileJournal(folder / "journal.jsonl")
    outcome = run_federation(
        NetworkGrid(app, len(sites), network),
        run_config(cohort={**SHORT, **(cohort or {})}, **changes),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder,
        journal=journal,
        executor="in_process",
        node_ids=NODE_IDS,
        resume=load_checkpoint(folder / "checkpoint.safetensors") if resume else None,
    )
    return outcome, read_run_journal(journal.path), sites


def count_charges(site: SiteConfig) -> int:
    return len(Site(site, os_entropy).ledger().charges())


def is_train(message: Message, round_: int, node: int = NORTH) -> bool:
    about = message.metadata
    return (about.message_type, about.group_id, about.dst_node_id) == (messages.TRAIN, str(round_), node)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the heads of three rounds over a network that loses nothing."""
    outcome, events, _ = federate(tmp_path_factory.mktemp("calm"), Network(), rounds=3)
    assert summarize(events).status == "completed"
    return heads_digest(outcome.heads)


# --- quorum and patience ---------------------------------------------------------------------------------------------


def test_a_round_that_all_sites_leave_interrupts_the_run_and_resume_goes_on(tmp_path: Path, calm: str) -> None:
    network = Network()
    path = tmp_path / "journal.jsonl"
    network.away = lambda node: bool(select_events(read_run_journal(path), RoundEnded))
    started = time.monotonic()
    with pytest.raises(RunInterrupted) as error:
        federate(tmp_path, network, rounds=3)
    assert time.monotonic() - started < 20
    assert str(error.value) == ("round 2: expected updates of at least 1 site(s), got 0: east, north: not connected")
    events = read_run_journal(path)
    assert [event.round for event in select_events(events, RoundEnded)] == [1]
    (waits,) = select_events(events, QuorumAwaited)
    assert (waits.round, sorted(waits.sites)) == (2, ["east", "north"]) and 0 < waits.seconds <= SHORT["patience_s"]
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").rounds_done == 1
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    outcome, events, _ = federate(tmp_path, Network(), resume=True, sites=sites, rounds=3)
    assert heads_digest(outcome.heads) == calm
    assert [count_charges(site) for site in sites] == [3, 3]
    assert summarize(events).status == "completed"


def test_a_quorum_that_comes_back_in_time_is_asked_at_once_and_nothing_is_missed(tmp_path: Path, calm: str) -> None:
    network, path = Network(), tmp_path / "journal.jsonl"
    gone: list[float] = []

    def away(node: int) -> bool:
        if not gone and path.exists() and select_events(read_run_journal(path), RoundEnded):
            gone.append(time.monotonic())
        return bool(gone) and time.monotonic() < gone[0] + 1.5

    network.away = away
    outcome, events, sites = federate(tmp_path, network, rounds=3, cohort={"min_sites": 2, "patience_s": 20})
    assert heads_digest(outcome.heads) == calm
    assert [count_charges(site) for site in sites] == [3, 3]
    assert summarize(events).status == "completed"
    # Presence is looked at once a second.
    assert network.times(messages.TRAIN, 2, EAST)[0] < gone[0] + 1.5 + 1.5


def test_a_site_that_failed_is_asked_again_where_the_quorum_needs_it(tmp_path: Path, calm: str) -> None:
    failures = [1]

    def answer(message: Message) -> Message | None:
        if is_train(message, 2) and failures:
            failures.pop()
            return Message(messages.encode(messages.Declined(DeclineReason.INTERNAL, "north")), reply_to=message)
        return None

    network = Network()
    outcome, events, _ = federate(tmp_path, network, answer=answer, rounds=3, cohort={"min_sites": 2, "patience_s": 20})
    assert len(network.times(messages.TRAIN, 2, NORTH)) == 2
    assert heads_digest(outcome.heads) == calm
    assert summarize(events).status == "completed"


def test_a_site_that_failed_holds_up_no_quorum_of_others(tmp_path: Path) -> None:
    declined = messages.Declined(DeclineReason.INTERNAL, "north")

    def answer(message: Message) -> Message | None:
        return Message(messages.encode(declined), reply_to=message) if is_train(message, 2) else None

    network = Network()
    _, events, _ = federate(tmp_path, network, answer=answer, rounds=3)
    assert len(network.times(messages.TRAIN, 2, NORTH)) == 1
    assert [sorted(event.sites) for event in select_events(events, RoundEnded)] == [
        ["east", "north"],
        ["east"],
        ["east", "north"],
    ]
    assert count_missed_rounds(events) == {"north": 1}
    summary = summarize(events)
    assert (summary.status, summary.sites["north"].status, summary.sites["north"].missed) == ("partial", "partial", 1)
    assert summary.sites["east"].status == "completed"


def test_a_quorum_that_cannot_be_reached_ends_the_run_at_once(tmp_path: Path) -> None:
    declined = messages.Declined(DeclineReason.BUDGET, "north")

    def answer(message: Message) -> Message | None:
        return Message(messages.encode(declined), reply_to=message) if is_train(message, 2) else None

    started = time.monotonic()
    with pytest.raises(RunInterrupted, match=r"got 1: north: declined: budget \(its budget does not cover"):
        federate(tmp_path, Network(), answer=answer, rounds=3, cohort={"min_sites": 2, "patience_s": 600})
    assert time.monotonic() - started < 30


# --- asking again ----------------------------------------------------------------------------------------------------


def test_a_message_that_was_lost_is_sent_again_and_charged_once(tmp_path: Path, calm: str) -> None:
    """So it is with a site that was killed with the message in its hands and is back before it was missed."""
    network = Network()
    network.lose = lambda message: is_train(message, 2) and len(network.times(messages.TRAIN, 2, NORTH)) == 1
    outcome, events, sites = federate(tmp_path, network, rounds=3, cohort={"grace_s": 20})
    first, second = network.times(messages.TRAIN, 2, NORTH)
    assert 2.5 < second - first < 6
    assert heads_digest(outcome.heads) == calm
    assert [count_charges(site) for site in sites] == [3, 3]
    assert select_events(events, SiteRejected) == []
    assert summarize(events).status == "completed"


def test_the_first_of_several_answers_counts_and_the_others_are_no_strangers(tmp_path: Path, calm: str) -> None:
    network = Network()
    # The first message is answered after the second was sent, and both at the same moment.
    network.hold = lambda *asked: asked == (messages.TRAIN, 2, NORTH) and len(network.times(*asked)) < 2
    outcome, events, sites = federate(tmp_path, network, rounds=3, cohort={"grace_s": 20})
    assert len(network.times(messages.TRAIN, 2, NORTH)) == 2
    assert heads_digest(outcome.heads) == calm
    assert [count_charges(site) for site in sites] == [3, 3]
    assert select_events(events, SiteRejected) == []


@pytest.mark.parametrize("held", [[], [False, True]], ids=["both at once", "one after the other"])
def test_a_failure_does_not_count_while_the_site_has_the_request_once_more(
    tmp_path: Path, calm: str, held: list[bool]
) -> None:
    """Its second answer would be paid for after a round that went on without it."""
    network, asked, is_held = Network(), list[Message](), iter(held)

    def answer(message: Message) -> Message | None:
        if not is_train(message, 2):
            return None
        asked.append(message)
        declined = messages.Declined(DeclineReason.INTERNAL, "north")
        return Message(messages.encode(declined), reply_to=message) if len(asked) == 1 else None

    network.hold = lambda *request: (
        request == (messages.TRAIN, 2, NORTH) and (len(network.times(*request)) < 2 or next(is_held, False))
    )
    outcome, events, sites = federate(tmp_path, network, answer=answer, rounds=3, cohort={"grace_s": 20})
    assert len(asked) == 2
    assert heads_digest(outcome.heads) == calm
    assert [count_charges(site) for site in sites] == [3, 3]
    assert select_events(events, SiteRejected) == []


def test_a_lost_evaluation_and_lost_final_heads_are_asked_for_again(tmp_path: Path) -> None:
    held_out = {"evaluation": {"share": 0.2, "evaluations": 1}, "split": {"test_fraction": 0.2, "salt": ""}}
    sites = [site_config(tmp_path, name, **held_out) for name in ("east", "north")]
    network, seen = Network(), set[str]()

    def lose(message: Message) -> bool:
        kind = message.metadata.message_type
        first = message.metadata.dst_node_id == NORTH and kind in (messages.EVALUATE, messages.FINISH)
        return first and kind not in seen and not seen.add(kind)  # type: ignore[func-returns-value]

    network.lose = lose
    _, events, _ = federate(tmp_path, network, sites=sites, rounds=1, evaluation={"every": 1}, cohort={"grace_s": 20})
    assert seen == {messages.EVALUATE, messages.FINISH}
    assert sorted(select_events(events, HeadsEvaluated)[0].noise_multipliers) == ["east", "north"]
    (ended,) = select_events(events, RunEnded)
    assert (ended.num_received, ended.missing) == (2, {})


def test_a_site_without_its_final_heads_is_named_and_gets_them_when_the_run_is_resumed(tmp_path: Path) -> None:
    network, path = Network(), tmp_path / "journal.jsonl"
    network.away = lambda node: node == NORTH and len(select_events(read_run_journal(path), RoundEnded)) == 2
    _, events, sites = federate(tmp_path, network)
    (ended,) = select_events(events, RunEnded)
    assert (ended.num_received, dict(ended.missing)) == (1, {"north": "not connected"})
    assert find_status(events) == "partial"
    assert not (sites[1].state_dir / "runs" / "run-1" / "final_heads.bin").exists()
    _, events, _ = federate(tmp_path, Network(), sites=sites, resume=True)
    assert (sites[1].state_dir / "runs" / "run-1" / "final_heads.bin").exists()
    assert find_status(events) == "completed"
    assert [count_charges(site) for site in sites] == [2, 2]


# --- grace and late answers ------------------------------------------------------------------------------------------


def test_a_round_with_its_quorum_waits_no_longer_than_the_grace_for_a_silent_site(tmp_path: Path) -> None:
    network = Network(lose=lambda message: is_train(message, 2))
    _, events, _ = federate(tmp_path, network, rounds=3)
    first, second, third = select_events(events, RoundEnded)
    assert (sorted(first.sites), sorted(second.sites)) == (["east", "north"], ["east"])
    assert SHORT["grace_s"] <= second.seconds < 10 < SHORT["timeout_s"]
    del third


def test_a_site_that_is_away_for_long_is_waited_for_in_one_round_only(tmp_path: Path) -> None:
    network, path = Network(), tmp_path / "journal.jsonl"
    network.away = lambda node: node == NORTH and bool(select_events(read_run_journal(path), RoundEnded))
    _, events, sites = federate(tmp_path, network, rounds=5)
    seconds = [event.seconds for event in select_events(events, RoundEnded)]
    assert sum(each >= 0.9 for each in seconds[1:]) == 1
    assert [len(network.times(messages.TRAIN, round_, NORTH)) for round_ in range(1, 6)] == [1, 0, 0, 0, 0]
    assert [count_charges(site) for site in sites] == [5, 1]
    assert count_missed_rounds(events) == {"north": 4}


def test_a_late_update_is_used_in_the_next_round_in_place_of_a_second_one(tmp_path: Path) -> None:
    network = Network()

    def hold(kind: str, round_: int, node: int) -> bool:
        if kind != messages.TRAIN:
            return False
        if (round_, node) == (2, NORTH):
            return not network.times(messages.TRAIN, 3, EAST)
        return (round_, node) == (3, EAST) and (messages.TRAIN, 2, NORTH) not in network.answered

    network.hold = hold
    _, events, sites = federate(tmp_path, network, rounds=4)
    rounds = select_events(events, RoundEnded)
    assert [sorted(event.sites) for event in rounds] == [
        ["east", "north"],
        ["east"],
        ["east", "north"],
        ["east", "north"],
    ]
    assert [event.sites["north"].round for event in rounds if "north" in event.sites] == [None, 2, None]
    # It was never asked for round 3, and so it paid for what was used and for nothing else.
    assert network.times(messages.TRAIN, 3, NORTH) == []
    assert [count_charges(site) for site in sites] == [4, 3]
    assert count_missed_rounds(events) == {"north": 1}


def test_an_update_that_is_two_rounds_late_is_named_and_not_used(tmp_path: Path) -> None:
    network = Network()
    network.hold = lambda *asked: asked == (messages.TRAIN, 2, NORTH) and not network.times(messages.TRAIN, 4, EAST)
    _, events, sites = federate(tmp_path, network, rounds=4, cohort={"grace_s": 0.5})
    rounds = select_events(events, RoundEnded)
    assert all(event.sites["north"].round is None for event in rounds if "north" in event.sites)
    late = [event for event in select_events(events, SiteRejected) if "too late to be used" in event.reason]
    assert [(event.site, event.round) for event in late] == [("north", 2)]
    assert [count_charges(site) for site in sites] == [4, 3]


def test_a_late_update_is_not_taken_where_the_caller_cannot_use_it(tmp_path: Path) -> None:
    network = Network(lose=lambda message: True)
    messenger = Messenger(
        NetworkGrid(lambda message, context: message, 1, network),
        run_config(),
        "run-1",
        FileJournal(tmp_path / "journal.jsonl"),
        lambda phase, done, total: None,
    )
    for takes_late in (False, True):
        request = Request(
            messages.TRAIN,
            {EAST: messages.TrainRequest("run-1", 1, {})},
            messages.TrainReply,
            Waiting(0.3),
            round=1,
            takes_late=takes_late,
        )
        assert [item.reason for item in messenger.send(request).rejected] == ["no reply before the time-out"]
        assert list(messenger.late) == ([EAST] if takes_late else [])
    assert [inquiry.round for inquiry in messenger.overdue] == [1]


# --- the rules as values ---------------------------------------------------------------------------------------------


def make_inquiry(node: int, **changes: Any) -> Inquiry:
    values = {"started": 100.0, "interval_s": 3.0, "asked_at": {"m": 100.0}, **changes}
    return Inquiry(node, messages.TRAIN, 1, records=None, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("silent", "longest_s", "until"),
    [
        ({}, None, 200.0),  # It has never answered: as long as the run gives a round.
        ({}, 7.0, 100.0 + 2 * 7.0 + 10.0),
        ({"away_since": 130.0}, 7.0, 140.0),
        ({"away_since": 50.0}, 7.0, 100.0),  # Its grace was over before the round began.
        ({"preparing": True}, 7.0, 200.0),
        ({}, 60.0, 200.0),  # Never longer than the time-out.
    ],
)
def test_a_silent_site_is_waited_for_by_what_is_known_of_it(
    silent: dict[str, Any], longest_s: float | None, until: float
) -> None:
    waiting = Waiting(100.0, 10.0, 600.0, quorum=Quorum(1, {}, {1: (), 2: ()}), since_lost=True)
    inquiries = [make_inquiry(1, accepted=True), make_inquiry(2, **silent)]
    known = {} if longest_s is None else {2: longest_s}
    assert not waiting.is_over(inquiries, known, 100.0, until - 0.1) or until == 100.0
    assert waiting.is_over(inquiries, known, 100.0, until + 0.1)


@pytest.mark.parametrize(("silent", "until"), [({}, 100.0 + 100.0 + 600.0), ({"away_since": 130.0}, 730.0)])
def test_a_missing_quorum_is_waited_for_as_long_as_the_patience_says(silent: dict[str, Any], until: float) -> None:
    waiting = Waiting(100.0, 10.0, 600.0, quorum=Quorum(2, {}, {1: (), 2: ()}), since_lost=True)
    inquiries = [make_inquiry(1, accepted=True), make_inquiry(2, **silent)]
    assert not waiting.is_over(inquiries, {2: 1.0}, 100.0, until - 0.1)
    assert waiting.is_over(inquiries, {2: 1.0}, 100.0, until + 0.1)


def test_a_site_is_asked_again_ever_more_seldom_and_seldom_with_much() -> None:
    intervals = []
    inquiry = make_inquiry(1)
    for _ in range(9):
        inquiry.note_sent("m", 0.0)
        intervals.append(inquiry.ask_again_at)
    assert intervals == [3, 6, 12, 24, 48, 96, 120, 120, 120]
    large = Inquiry.new(1, messages.TRAIN, 1, records=None, size=200 * 2**20, now=0.0)  # type: ignore[arg-type]
    large.note_sent("m", 0.0)
    assert large.ask_again_at == 200


def test_a_site_that_leaves_all_the_time_is_asked_at_once_a_bounded_number_of_times() -> None:
    inquiry, asked = make_inquiry(1), 0
    for second in range(100, 1000):
        inquiry.note_presence(False, second, second)
        inquiry.note_presence(True, second, second)
        if inquiry.ask_again_at <= second:
            inquiry.note_sent("m", second)
            asked += 1
    assert asked < 40


def test_new_keys_of_the_cohort_change_no_offer_that_does_not_use_them() -> None:
    frozen = {"backbone": backbone()}
    written = {"min_sites": 1, "timeout_s": 5, "join_timeout_s": 1}
    assert set(make_offer(run_config(cohort=written), frozen)["cohort"]) == {
        "fraction",
        "min_sites",
        "min_replies_per_task",
        "timeout_s",
        "join_timeout_s",
    }
    used = make_offer(run_config(cohort={**written, "grace_s": 30.0}), frozen)["cohort"]
    assert used["grace_s"] == 30.0 and "patience_s" not in used
