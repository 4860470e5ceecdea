"""Sites that come after the roll call: used from the next round on, without holding anybody up."""

from __future__ import annotations

from collections.abc import Callable
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
    RequestDeclined,
    RoundEnded,
    RunEnded,
    RunEvent,
    RunJoined,
    SiteJoined,
    SiteRejected,
    read_run_journal,
    read_site_journal,
    select_events,
)
from common.privacy.noise import os_entropy
from server.rounds.checkpoint import load_checkpoint
from server.rounds.loop import run_federation
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import backbone, run_config, site_config

ROUNDS = 5
NAMES = ("east", "north", "west", "south")
EAST, NORTH, WEST, SOUTH = (FIRST_NODE_ID + position for position in range(4))


class ComingGrid(InProcessGrid):
    """A grid whose nodes come and go, and whose replies may be a while under way."""

    def __init__(self, app: Callable[[Message, Context], Message], num_sites: int) -> None:
        InProcessGrid.__init__(self, app, num_sites)
        self.connected = {EAST, NORTH}
        self.held_back: Callable[[str, int], bool] = lambda kind, node: False
        self._asked: dict[str, tuple[str, int]] = {}

    def get_node_ids(self) -> list[int]:
        return sorted(self.connected)

    def push_messages(self, messages: Any) -> list[str]:
        sent = list(messages)
        ids = InProcessGrid.push_messages(self, sent)
        self._asked |= {id: (m.metadata.message_type, m.metadata.dst_node_id) for id, m in zip(ids, sent, strict=True)}
        return ids

    def forget(self) -> None:
        """Loses every reply that is under way."""
        self._replies.clear()

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return InProcessGrid.pull_messages(self, [id for id in message_ids if not self.held_back(*self._asked[id])])


class Federation:
    """A run of four sites, of which west and south connect when a test says so."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.sites = [site_config(folder, name) for name in NAMES]
        self.changes = {"rounds": ROUNDS, **changes}
        self.before: Callable[[str, int, ComingGrid], None] = lambda kind, round_, grid: None
        self.asked: list[tuple[str, str, int]] = []
        honest = make_app(lambda context: self._find(context))

        def app(message: Message, context: Context) -> Message:
            kind, round_ = message.metadata.message_type, int(message.metadata.group_id)
            name = self._find(context).name
            self.asked.append((name, kind, round_))
            if name == "east":
                self.before(kind, round_, self.grid)
            return honest(message, context)

        self.grid = ComingGrid(app, len(NAMES))

    def _find(self, context: Context) -> SiteConfig:
        return self.sites[int(context.node_config["partition-id"])]

    def run(self, *, resume: bool = False, names: dict[int, str] | None = None) -> list[RunEvent]:
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = FileJournal(self.folder / "journal.jsonl")
        run_federation(
            self.grid,
            run_config(**self.changes),
            {"backbone": backbone()},
            run_id="run-1",
            folder=self.folder,
            journal=journal,
            executor="in_process",
            node_ids=names or dict(zip((EAST, NORTH, WEST, SOUTH), NAMES, strict=True)),
            resume=load_checkpoint(self.folder / "checkpoint.safetensors") if resume else None,
        )
        return read_run_journal(journal.path)

    def noises(self, position: int) -> list[float]:
        charges = Site(self.sites[position], os_entropy).ledger().charges()
        return [charge.mechanism.noise_multiplier for charge in charges]


def rounds_of(events: list[RunEvent]) -> list[list[str]]:
    return [sorted(event.sites) for event in select_events(events, RoundEnded)]


def connect_west(at: int) -> Callable[[str, int, ComingGrid], None]:
    def before(kind: str, round_: int, grid: ComingGrid) -> None:
        if kind == messages.TRAIN and round_ == at:
            grid.connected.add(WEST)

    return before


BOTH, ALL = ["east", "north"], ["east", "north", "west"]
TARGET = {"privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}}


def test_a_site_that_comes_after_the_roll_call_takes_part_in_the_rest(tmp_path: Path) -> None:
    federation = Federation(tmp_path, **TARGET)
    federation.before = connect_west(at=2)
    events = federation.run()
    assert rounds_of(events) == [BOTH] * 2 + [ALL] * 3
    [late] = [event for event in select_events(events, SiteJoined) if event.site == "west"]
    assert (late.first_round, late.tasks) == (3, {"colour": 40, "size": 40})
    [joined] = select_events(read_site_journal(federation.sites[2].state_dir / "site.jsonl"), RunJoined)
    assert (joined.first_round, joined.rounds) == (3, ROUNDS)
    [ended] = select_events(events, RunEnded)
    assert (ended.num_received, ended.num_sites) == (3, 3)
    # Fewer rounds at the same epsilon: less noise in each of them.
    assert len(federation.noises(2)) == 3
    assert max(federation.noises(2)) < min(federation.noises(0))
    assert {("west", messages.PART, 0), ("west", messages.PREPARE, 0)} <= set(federation.asked)


def test_a_site_that_prepares_for_long_holds_no_round_up_and_joins_when_it_is_ready(tmp_path: Path) -> None:
    federation = Federation(tmp_path, **TARGET)
    ready = [False]

    def before(kind: str, round_: int, grid: ComingGrid) -> None:
        if kind == messages.TRAIN:
            grid.connected.add(WEST)
            ready[0] = round_ >= 3

    federation.before = before
    federation.grid.held_back = lambda kind, node: node == WEST and kind == messages.PREPARE and not ready[0]
    events = federation.run()
    assert rounds_of(events) == [BOTH] * 3 + [ALL] * 2
    # It agreed to rounds 2 to 5 first, and planned anew for those that were left when it was ready.
    joined = select_events(read_site_journal(federation.sites[2].state_dir / "site.jsonl"), RunJoined)
    assert [event.first_round for event in joined] == [2, 4]
    ledger = Site(federation.sites[2], os_entropy).ledger()
    assert [line.event.event for line in ledger.lines()].count("earmarked") == 2
    assert ledger.history().earmarks == {}


def test_a_site_that_comes_in_the_last_round_is_told_that_it_is_too_late(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    grid = federation.grid

    def before(kind: str, round_: int, grid: ComingGrid) -> None:
        if kind == messages.TRAIN and round_ == ROUNDS:
            grid.connected.add(WEST)
            # North's answer takes a while, in which the newcomer is looked at.
            waits = iter(range(15))
            grid.held_back = lambda kind, node: node == NORTH and next(waits, None) is not None

    federation.before = before
    events = federation.run()
    assert rounds_of(events) == [BOTH] * ROUNDS
    [rejected] = select_events(events, SiteRejected)
    assert (rejected.site, rejected.reason, rejected.stage) == ("west", "declined: overtaken", "join")
    [declined] = select_events(read_site_journal(federation.sites[2].state_dir / "site.jsonl"), RequestDeclined)
    assert "came too late" in declined.detail
    assert Site(federation.sites[2], os_entropy).ledger().history().earmarks == {}
    assert grid.connected == {EAST, NORTH, WEST}


def test_a_site_that_refused_for_good_is_not_asked_again(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.sites[2] = site_config(tmp_path, "west", budget={"epsilon": 0.1, "delta": 1e-5})
    federation.grid.connected.add(WEST)
    events = federation.run()
    assert rounds_of(events) == [BOTH] * ROUNDS
    [rejected] = select_events(events, SiteRejected)
    assert rejected.reason == "declined: budget"
    assert [kind for name, kind, _ in federation.asked if name == "west"] == [messages.JOIN]


def test_a_site_under_anothers_name_does_not_come_in_late(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.before = connect_west(at=1)
    events = federation.run(names={EAST: "east", NORTH: "north", WEST: "south"})
    assert rounds_of(events) == [BOTH] * ROUNDS
    [rejected] = select_events(events, SiteRejected)
    assert rejected.site == "south"
    assert "another name" in rejected.reason


def test_a_site_that_joined_late_keeps_its_plan_when_the_run_is_resumed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, **TARGET)

    def before(kind: str, round_: int, grid: ComingGrid) -> None:
        if kind == messages.TRAIN and round_ == 1:
            grid.connected.add(WEST)
        if kind == messages.TRAIN and round_ == 4 and not resumed:
            raise KeyboardInterrupt

    resumed: list[bool] = []
    federation.before = before
    with pytest.raises(KeyboardInterrupt):
        federation.run()
    resumed.append(True)
    federation.grid.connected.add(SOUTH)  # New to the run: it plans for the two rounds that are left.
    events = federation.run(resume=True)
    assert rounds_of(events) == [BOTH, ALL, ALL, sorted(NAMES), sorted(NAMES)]
    noises = [federation.noises(position) for position in range(4)]
    assert [len(each) for each in noises] == [5, 5, 4, 2]
    assert all(len(set(each)) == 1 for each in noises)
    assert noises[0][0] == noises[1][0] > noises[2][0] > noises[3][0]


def test_a_site_that_left_while_it_prepared_is_offered_the_run_when_it_is_back(tmp_path: Path) -> None:
    """And what it was asked before is forgotten."""
    federation = Federation(tmp_path)

    def before(kind: str, round_: int, grid: ComingGrid) -> None:
        if kind == messages.TRAIN:
            if round_ == 3:
                grid.connected.discard(WEST)
            else:
                grid.connected.add(WEST)

    federation.before = before
    silent = iter((True, True))
    federation.grid.held_back = lambda kind, node: node == WEST and kind == messages.PREPARE and next(silent, False)
    events = federation.run()
    assert rounds_of(events) == [BOTH] * 4 + [ALL]
    assert [kind for name, kind, _ in federation.asked if name == "west"].count(messages.JOIN) >= 2


def test_a_message_to_a_newcomer_that_was_lost_is_sent_again(tmp_path: Path) -> None:
    """A site that was killed and came back within seconds was never seen to be away."""
    federation = Federation(tmp_path)
    federation.before = connect_west(at=1)
    lost: list[bool] = []

    def lose_first(kind: str, node: int) -> bool:
        if node == WEST and kind == messages.JOIN and not lost:
            lost.append(True)
            federation.grid.forget()
        # Rounds last until the message is sent again, after seconds: else the run would be over by then.
        times = [kind for name, kind, _ in federation.asked if name == "west"].count(messages.JOIN)
        return (kind, node) == (messages.TRAIN, EAST) and times < 2

    federation.grid.held_back = lose_first
    events = federation.run()
    assert lost
    assert "west" in rounds_of(events)[-1]
