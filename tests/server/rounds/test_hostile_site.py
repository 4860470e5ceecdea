"""A malicious site, against the real round loop: the run goes on as if it were not there, and the journal names it.

"As if it were not there" is exact: the final heads are those of the same run without the offender, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import make_app
from client.config import SiteConfig
from client.protocol.site import Site
from common import messages
from common.events import FileJournal, RunEvent, SiteJoined, SiteRejected, read_run_journal, select_events
from common.flower import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    inflate_object_from_contents,
)
from common.model.parameters import create_heads, parameters
from common.privacy.noise import SeededEntropy, os_entropy
from common.privacy.update_norm import bound_update_norms
from common.tasks import open_task
from common.types import DeclineReason, Delta, Heads, Plan, RunFailed, RunInterrupted, Unit, heads_digest
from server.rounds.loop import Outcome, run_federation
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import TASKS, backbone, run_config, site_config

Grid = Callable[[Any, int], InProcessGrid]
EAST, NORTH = FIRST_NODE_ID, FIRST_NODE_ID + 1
NODE_IDS = {EAST: "east", NORTH: "north"}
PLAN = Plan(1.0, 2, 1.0, 2.0, Unit.EXAMPLE)


def federate(
    folder: Path,
    names: Iterable[str],
    *,
    answer: Callable[[Message], RecordDict | None] = lambda asked: None,
    grid: Grid = InProcessGrid,
    node_ids: Mapping[int, str] | None = NODE_IDS,
    run: Mapping[str, Any] | None = None,
    **cohort: Any,
) -> tuple[Outcome, list[RunEvent], list[SiteConfig]]:
    """A run of two rounds in which north answers what `answer` makes, where that is anything."""
    sites = [site_config(folder, name) for name in names]
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0))

    def app(message: Message, context: Context) -> Message:
        forged = answer(message) if context.node_id == NORTH else None
        return honest(message, context) if forged is None else Message(forged, reply_to=message)

    journal = FileJournal(folder / "journal.jsonl")
    outcome = run_federation(
        grid(app, len(sites)),
        run_config(cohort={"min_sites": 1, "timeout_s": 5, "join_timeout_s": 2, **cohort}, **(run or {})),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder,
        journal=journal,
        executor="in_process",
        node_ids=node_ids,
    )
    return outcome, read_run_journal(journal.path), sites


@pytest.fixture(scope="module")
def without_north(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the final heads where there never was a second site."""
    outcome, _, _ = federate(tmp_path_factory.mktemp("alone"), ["east"], node_ids={EAST: "east"})
    return heads_digest(outcome.heads)


def list_rejected(events: Iterable[RunEvent]) -> list[tuple[str, str, str]]:
    return [(event.site, event.stage, event.reason) for event in select_events(events, SiteRejected)]


def public(payload: messages.Payload, **changes: object) -> RecordDict:
    """A payload whose public part says something else."""
    text = json.loads(str(messages.encode(payload).config_records["public"]["json"]))
    return RecordDict({"public": ConfigRecord({"json": json.dumps({**text, **changes})})})


def raw(text: str) -> RecordDict:
    return RecordDict({"public": ConfigRecord({"json": text})})


def joining(**changes: object) -> RecordDict:
    return public(
        messages.JoinReply(
            "north", {"colour": 40, "size": 40}, Unit.EXAMPLE, 1e-5, 100.0, {"backbone": messages.Held(False, ())}
        ),
        **changes,
    )


def zero_heads() -> Heads:
    modules = create_heads({name: open_task(spec, name) for name, spec in TASKS.items()}, dict.fromkeys(TASKS, 4), 0)
    return {name: {key: 0 * value for key, value in parameters(head).items()} for name, head in modules.items()}


def bomb(shape: object, data: object = b"1234") -> RecordDict:
    """A train reply whose first parameter claims this shape, and whose bytes are these."""
    records = messages.encode(messages.TrainReply(Delta(zero_heads()), PLAN))
    layout = json.loads(str(records.config_records["heads"]["layout"]))
    layout["colour"] = {next(iter(layout["colour"])): shape}
    records["heads"] = ConfigRecord({"layout": json.dumps(layout), "data": data})  # type: ignore[dict-item]
    return records


def heads_record(layout: str) -> RecordDict:
    records = messages.encode(messages.TrainReply(Delta(zero_heads()), PLAN))
    records["heads"] = ConfigRecord({"layout": layout, "data": b""})
    return records


def padded() -> RecordDict:
    """Valid in everything but its size: only the bound refuses it."""
    records = messages.encode(messages.TrainReply(Delta(zero_heads()), PLAN))
    about = records.config_records["heads"]
    layout = str(about["layout"]) + " " * messages.MAX_JSON_BYTES
    records["heads"] = ConfigRecord({"layout": layout, "data": about["data"]})
    return records


def planned(**changes: object) -> RecordDict:
    records = messages.encode(messages.TrainReply(Delta(zero_heads()), PLAN))
    text = json.loads(str(records.config_records["public"]["json"]))
    text["plan"] |= changes
    records["public"] = ConfigRecord({"json": json.dumps(text)})
    return records


def train_reply(delta: Heads, plan: Plan = PLAN) -> RecordDict:
    return messages.encode(messages.TrainReply(Delta(delta), plan))


def stretch(norm: float) -> RecordDict:
    """A well-formed update of a norm in one weight of one head."""
    heads = {name: {key: value.copy() for key, value in params.items()} for name, params in zero_heads().items()}
    next(iter(heads["colour"].values())).flat[0] = norm
    return train_reply(heads)


def allowed() -> float:
    """Largest norm that the run's plan allows a change of the head of colours."""
    return bound_update_norms(run_config(), {"colour": 40, "size": 40}, zero_heads())["colour"]


ANYWHERE: dict[str, Callable[[], RecordDict]] = {
    "nothing": RecordDict,
    "nested JSON": lambda: raw("[" * 200_000),
    "an oversized public part": lambda: raw(" " * (messages.MAX_JSON_BYTES + 1)),
    "a number of a million digits": lambda: raw("1" * 1_000_000),
    "another payload": lambda: messages.encode(messages.TrainRequest("run-1", 1, {})),
    "a pickle": lambda: RecordDict({"public": ConfigRecord({"json": b"\x80\x04cos\nsystem\n(S'id'\ntR."})}),
    "a refusal that is not on the list": lambda: public(
        messages.Declined(DeclineReason.BUDGET, "north"), refusal="epsilon=0.3"
    ),
    "a refusal in a terminal's codes": lambda: public(
        messages.Declined(DeclineReason.BUDGET, "north"), site="\x1b[2Jeast"
    ),
    "a refusal in another's name": lambda: messages.encode(messages.Declined(DeclineReason.BUDGET, "east")),
}
AT_JOIN: dict[str, Callable[[], RecordDict]] = {
    "another's name": lambda: joining(site="east"),
    "the name of nobody": lambda: joining(site="south"),
    "a name with a terminal's codes": lambda: joining(site="\x1b[2J"),
    "a name of a megabyte": lambda: joining(site="x" * 1_000_000),
    "an enormous public size": lambda: joining(tasks={"colour": 10**12}),
    "a public size of 400 digits": lambda: joining(tasks={"colour": 10**400}),
    "a budget of 400 digits": lambda: joining(budget_epsilon=10**400),
    "no public size": lambda: joining(tasks={"colour": 0}),
    "tasks of no run": lambda: joining(tasks={"colour": 40, "smell": 40}),
    "no tasks": lambda: joining(tasks={}),
    "a million held parts": lambda: joining(backbones={"backbone": {"whole": False, "parts": list(range(100_000))}}),
    "held parts that are no numbers": lambda: joining(backbones={"backbone": {"whole": False, "parts": ["0"]}}),
    "a backbone of no run": lambda: joining(backbones={"other": {"whole": True, "parts": []}}),
    "no backbones": lambda: joining(backbones={}),
    "backbones that are a list": lambda: joining(backbones=["backbone"]),
    "a field too many": lambda: joining(accuracy=0.9),
}
AT_TRAIN: dict[str, Callable[[], RecordDict]] = {
    "a shape that promises more than it holds": lambda: bomb([10**6, 10**6]),
    "a shape of 400 digits": lambda: bomb([10**400, 10**400]),
    "a negative shape": lambda: bomb([-1]),
    "a shape of a thousand sides": lambda: bomb([1] * 1000),
    "an empty shape of a thousand digits": lambda: bomb([0, 10**999], b""),
    "a shape that is nested": lambda: bomb([[1]]),
    "bytes that are none": lambda: bomb([1], "1234"),
    "a pickle as bytes": lambda: bomb([10], b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    "a layout of nested JSON": lambda: heads_record("[" * 200_000),
    "a layout of a list": lambda: heads_record("[1, 2]"),
    "an oversized layout that is right otherwise": padded,
    "more heads than a run has tasks": lambda: heads_record(json.dumps({str(n): {} for n in range(5000)})),
    "an array of Flower's own": lambda: RecordDict({**planned(), "heads": ArrayRecord({"w": Array(np.zeros(3))})}),
    "steps of 400 digits": lambda: planned(steps=10**400),
    "half a step": lambda: planned(steps=1.5),
    "a plan without noise": lambda: planned(noise_multiplier=0.0),
    "a plan of another unit": lambda: planned(unit="patient"),
    "an infinite plan": lambda: planned(noise_multiplier=float("inf")),
    "a plan of text": lambda: planned(clip_norm="x" * 100_000),
    "a plan of less noise": lambda: planned(noise_multiplier=1.0),
    "a plan of more noise": lambda: planned(noise_multiplier=2000.0),
    "a plan of another clip norm": lambda: planned(clip_norm=1000.0),
    "a plan of more steps": lambda: planned(steps=3),
    "a plan of another sampling rate": lambda: planned(sampling_rate=0.5),
    "an update a little longer than the plan allows": lambda: stretch(1.01 * allowed()),
    "an update three times as long as the plan allows": lambda: stretch(3 * allowed()),
    "an update of norm 7,746": lambda: stretch(7746.0),
}
CASES = [
    *[(messages.JOIN, name, make) for name, make in {**ANYWHERE, **AT_JOIN}.items()],
    *[(messages.TRAIN, name, make) for name, make in {**ANYWHERE, **AT_TRAIN}.items()],
    *[(messages.PREPARE, name, make) for name, make in ANYWHERE.items()],
]
WHERE = {messages.JOIN: "join", messages.TRAIN: "train", messages.PREPARE: "prepare"}


@pytest.mark.parametrize(("kind", "name", "make"), CASES, ids=[f"{WHERE[kind]}: {name}" for kind, name, _ in CASES])
def test_a_malicious_reply_costs_its_sender_its_place_and_nothing_else(
    tmp_path: Path, without_north: str, kind: str, name: str, make: Callable[[], RecordDict]
) -> None:
    outcome, events, [east, _] = federate(
        tmp_path,
        ["east", "north"],
        answer=lambda asked: make() if asked.metadata.message_type == kind else None,
    )
    assert heads_digest(outcome.heads) == without_north
    assert outcome.updates == {"colour": 2, "size": 2}
    said = list_rejected(events)
    assert {(site, at) for site, at, _ in said} == {("north", WHERE[kind])}
    assert all(reason.isprintable() and len(reason) < 200 for _, _, reason in said), name
    assert [(charge.run, charge.round) for charge in Site(east, os_entropy).ledger().charges()] == [
        ("run-1", 1),
        ("run-1", 2),
    ]
    assert (tmp_path / "journal.jsonl").stat().st_size < 20_000


def test_the_longest_update_that_the_plan_allows_is_used_and_a_longer_one_is_named_in_one_sentence(
    tmp_path: Path, without_north: str
) -> None:
    def answer(factor: float) -> Callable[[Message], RecordDict | None]:
        return lambda asked: stretch(factor * allowed()) if asked.metadata.message_type == messages.TRAIN else None

    used, events, _ = federate(tmp_path / "used", ["east", "north"], answer=answer(0.99))
    assert heads_digest(used.heads) != without_north and not list_rejected(events)
    _, events, _ = federate(tmp_path / "longer", ["east", "north"], answer=answer(10))
    (reason,) = {reason for _, _, reason in list_rejected(events)}
    assert reason == (
        f"colour: expected a change of norm at most {allowed():.3g}, which is all that the run's steps, rates, "
        f"clip norm and noise make possible, got {10 * allowed():.3g}"
    )


def test_a_run_files_smaller_bound_stays(tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted, match=r"east: .*\(`max_delta_norm`\)"):
        federate(tmp_path, ["east"], node_ids={EAST: "east"}, run={"max_delta_norm": 1e-6})


@pytest.mark.parametrize("kind", [messages.PART, messages.FINISH])
def test_a_site_that_spoils_the_backbones_way_or_the_end_does_not_hold_up_the_others(tmp_path: Path, kind: str) -> None:
    outcome, events, _ = federate(
        tmp_path, ["east", "north"], answer=lambda asked: RecordDict() if asked.metadata.message_type == kind else None
    )
    assert outcome.updates == {"colour": 2, "size": 2}
    assert "north" in {site for site, _, _ in list_rejected(events)}
    assert "east" not in {site for site, _, _ in list_rejected(events)}


def test_a_site_that_claims_to_have_the_backbone_is_rejected_where_it_cannot_prepare(
    tmp_path: Path, without_north: str
) -> None:
    def lie(asked: Message) -> RecordDict | None:
        return (
            joining(backbones={"backbone": {"whole": True, "parts": []}})
            if asked.metadata.message_type == messages.JOIN
            else None
        )

    outcome, events, _ = federate(tmp_path, ["east", "north"], answer=lie)
    assert heads_digest(outcome.heads) == without_north
    assert {(site, at) for site, at, _ in list_rejected(events)} == {("north", "prepare")}


# --- replies that Flower itself cannot take apart ----------------------------------------------------------------


def _object(contents: dict[str, bytes], kind: str) -> str:
    return next(key for key, data in contents.items() if get_object_head_values_from_object_content(data)[0] == kind)


def _missing(contents: dict[str, bytes]) -> None:
    del contents[_object(contents, "ConfigRecord")]


def _garbage(kind: str) -> Callable[[dict[str, bytes]], None]:
    def change(contents: dict[str, bytes]) -> None:
        name = _object(contents, kind)
        head, _, _ = contents[name].partition(b"\x00")
        contents[name] = head + b"\x00" + b"\xff\xfe garbage"

    return change


def _unknown_kind(contents: dict[str, bytes]) -> None:
    name = _object(contents, "ConfigRecord")
    contents[name] = contents[name].replace(b"ConfigRecord", b"os.ExecFiles", 1)


def _headless(contents: dict[str, bytes]) -> None:
    contents[_object(contents, "RecordDict")] = b""


def _circle(contents: dict[str, bytes]) -> None:
    """A part that is its own child, for ever."""
    name, dictionary = _object(contents, "ConfigRecord"), _object(contents, "RecordDict")
    contents[name] = contents[dictionary]
    for key in list(contents):
        contents[key] = contents[dictionary]


DAMAGES: dict[str, Callable[[dict[str, bytes]], None]] = {
    "a part that is missing": _missing,
    "a message of garbage": _garbage("Message"),
    "records of garbage": _garbage("RecordDict"),
    "settings of garbage": _garbage("ConfigRecord"),
    "a part of an unknown kind": _unknown_kind,
    "a part without a head": _headless,
    "parts in a circle": _circle,
}


class DamagedGrid(InProcessGrid):
    """North's train replies reach Flower's own decoder damaged; like Flower's client, what was fetched is gone."""

    def damage(self, contents: dict[str, bytes]) -> None:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = InProcessGrid.pull_messages(self, message_ids)
        for reply in replies:
            if reply.metadata.src_node_id == NORTH and reply.metadata.message_type == messages.TRAIN:
                contents = {key: item.deflate() for key, item in get_all_nested_objects(reply).items()}
                self.damage(contents)
                inflate_object_from_contents(reply.object_id, contents)
        return replies


@pytest.mark.parametrize("name", DAMAGES)
def test_a_reply_that_the_engine_cannot_take_apart_ends_no_run_and_loses_no_other_reply(
    tmp_path: Path, without_north: str, name: str
) -> None:
    class Damaged(DamagedGrid):
        def damage(self, contents: dict[str, bytes]) -> None:
            DAMAGES[name](contents)

    outcome, events, _ = federate(tmp_path, ["east", "north"], grid=Damaged)
    assert heads_digest(outcome.heads) == without_north
    assert list_rejected(events) == [("north", "train", "a reply that cannot be read")] * 2


# --- sites that are not there ----------------------------------------------------------------------------------------


class LossyGrid(InProcessGrid):
    """North takes some kinds of messages and never answers; `dropped` says whether the SuperLink takes them at all."""

    kinds: tuple[str, ...] = ()
    dropped = False
    lose = 10**9

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            about = message.metadata
            if about.dst_node_id == NORTH and about.message_type in self.kinds and self.lose > 0:
                self.lose -= 1
                pushed.append("" if self.dropped else f"lost-{about.message_type}-{about.group_id}-{self.lose}")
            else:
                pushed += InProcessGrid.push_messages(self, [message])
        return pushed


def test_a_site_that_was_removed_during_the_run_is_rejected_and_the_run_goes_on(
    tmp_path: Path, without_north: str
) -> None:
    class Removed(LossyGrid):
        kinds, dropped = (messages.TRAIN, messages.FINISH), True

    outcome, events, _ = federate(tmp_path, ["east", "north"], grid=Removed)
    assert heads_digest(outcome.heads) == without_north
    assert list_rejected(events) == [("north", at, "not reached") for at in ("train", "train", "finish")]


def test_a_site_that_is_silent_when_sites_join_holds_nobody_up_beyond_the_deadline(
    tmp_path: Path, without_north: str
) -> None:
    class Silent(LossyGrid):
        kinds = (messages.JOIN,)

    started = time.monotonic()
    outcome, events, _ = federate(tmp_path, ["east", "north"], grid=Silent, timeout_s=3600)
    assert time.monotonic() - started < 20.0
    assert heads_digest(outcome.heads) == without_north
    assert list_rejected(events) == [("north", "join", "no reply before the time-out")]


def test_a_site_whose_first_answer_was_lost_is_asked_again(tmp_path: Path) -> None:
    class LostOnce(LossyGrid):
        kinds, lose, dropped = (messages.JOIN,), 1, True

    _, events, _ = federate(tmp_path, ["east", "north"], grid=LostOnce, min_sites=2, join_timeout_s=30)
    assert [event.site for event in select_events(events, SiteJoined)] == ["east", "north"]
    assert list_rejected(events) == [("north", "join", "not reached")]


def test_a_message_that_is_too_large_for_the_engine_is_one_sentence(tmp_path: Path) -> None:
    class Full(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return []

    with pytest.raises(RunFailed, match="too large"):
        federate(tmp_path, ["east"], grid=Full)
