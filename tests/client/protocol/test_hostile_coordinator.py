"""A malicious coordinator, through the real client app: the site stays up, loses nothing, and logs who asked what.

Each attack is a message as Flower would deliver it. Afterwards an honest run still works and only it was charged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from client.app import make_app
from client.config import SiteConfig
from client.protocol.answer import MAX_CHARGES
from client.protocol.approvals import MAX_WAITING, Approvals
from client.protocol.site import Site
from common import messages
from common.events import RequestDeclined, read_site_journal, select_events
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.offers import make_offer
from common.privacy.accounting import Mechanism
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import MAX_ROUND_STEPS, MAX_STEPS, DeclineReason, Heads
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import TASKS, backbone, forged, offered, run_config, site_config


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(spec, name) for name, spec in TASKS.items()}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 3)
    return {name: parameters(module) for name, module in modules.items()}


class Coordinator:
    """Sends one site whatever it likes."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._grid = InProcessGrid(make_app(lambda context: config), 1)

    def send(self, kind: str, records: RecordDict) -> RecordDict:
        [reply] = self._grid.send_and_receive([Message(records, dst_node_id=FIRST_NODE_ID, message_type=kind)])
        assert not reply.has_error(), "the site raised instead of answering"
        return reply.content

    def refused(self, kind: str, records: RecordDict) -> DeclineReason:
        return messages.decode(self.send(kind, records), messages.Declined).refusal

    def honest_run(self, frozen: Backbone, run_id: str = "honest") -> None:
        """A whole round, as an honest coordinator would do it."""
        blob = frozen.blob()
        for kind, payload, expected in (
            (messages.JOIN, offered(run_id, run_config(), frozen), messages.JoinReply),
            (messages.PART, messages.PartRequest(run_id, frozen.digest, 0, 1, blob.weights), messages.Ready),
            (messages.PREPARE, messages.PrepareRequest(run_id, {blob.digest: blob.spec}), messages.Ready),
            (messages.TRAIN, messages.TrainRequest(run_id, 1, heads(frozen)), messages.TrainReply),
        ):
            messages.decode(self.send(kind, messages.encode(payload)), expected)


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(site_config(tmp_path, "north", on_bad_record="skip"))


def rewritten(frozen: Backbone, **changes: Any) -> RecordDict:
    """An offer with some of its plain values replaced: what no honest file would pass."""
    values = {**make_offer(run_config(), {"backbone": frozen}), **changes}
    return messages.encode(messages.JoinRequest("run-x", values, {"backbone": frozen.digest}))


def solver(**changes: Any) -> dict[str, Any]:
    return {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0, **changes}


def privacy(**changes: Any) -> dict[str, Any]:
    return {"unit": "example", "delta": 1e-5, "target_epsilon": None, "noise_multiplier": 2.0, **changes}


def edited(frozen: Backbone, change: Callable[[dict[str, Any]], object]) -> RecordDict:
    records = messages.encode(offered("run-x", run_config(), frozen))
    public = json.loads(str(records.config_records["public"]["json"]))
    change(public)
    return RecordDict({"public": ConfigRecord({"json": json.dumps(public)})})


ABSURD_OFFERS: dict[str, dict[str, Any]] = {
    "no noise": {"privacy": privacy(noise_multiplier=0.0)},
    "almost no noise": {"privacy": privacy(noise_multiplier=1e-6)},
    "negative noise": {"privacy": privacy(noise_multiplier=-1.0)},
    "no privacy": {"privacy": "non_private", "solver": {**solver(), "kind": "sgd"}},
    "privacy of a solver without": {"solver": {"kind": "sgd", "sampling_rate": 1.0, "steps": 2, "learning_rate": 1}},
    "a billion steps": {"solver": solver(steps=10**9)},
    "more steps than a site works for": {"solver": solver(steps=MAX_ROUND_STEPS), "rounds": MAX_STEPS},
    "more steps in one round than a site takes": {"solver": solver(steps=MAX_ROUND_STEPS + 1)},
    "a rate above 1": {"solver": solver(sampling_rate=1.5)},
    "a rate of 0": {"solver": solver(sampling_rate=0.0)},
    "an infinite clip norm": {"solver": solver(clip_norm=1e999)},
    "no clip norm": {"solver": solver(clip_norm=None)},
    "a learning rate that is text": {"solver": solver(learning_rate="fast")},
    "an unknown key": {"upload_records": True},
    "an unknown solver": {"solver": {"kind": "os.system"}},
    "a solver by path": {"solver": {"kind": "../../evil"}},
    "a backbone by path": {"backbone": {"kind": "../evil"}},
    "another unit": {"privacy": privacy(unit="patient")},
    "a task by path": {"tasks": {"../../etc": {"kind": "classification", "labels": ["a", "b"]}}},
    "a task of an unknown kind": {"tasks": {"colour": {"kind": "__import__"}}},
    "a million labels": {"tasks": {"colour": {"kind": "classification", "labels": [f"l{i}" for i in range(10**6)]}}},
    "no rounds": {"rounds": 0},
    "too many rounds": {"rounds": 10**12},
    "a name with a path": {"name": "../../../etc/passwd"},
}


@pytest.mark.parametrize("attack", ABSURD_OFFERS)
def test_an_absurd_offer_is_declined_logged_and_costs_nothing(
    coordinator: Coordinator, frozen: Backbone, attack: str
) -> None:
    word = coordinator.refused(messages.JOIN, rewritten(frozen, **ABSURD_OFFERS[attack]))
    assert word in (
        DeclineReason.BAD_REQUEST,
        DeclineReason.SOLVER_NOT_ALLOWED,
        DeclineReason.UNIT_DIFFERS,
        DeclineReason.TASK_NOT_ALLOWED,
        DeclineReason.BUDGET,
    )
    [line] = select_events(read_site_journal(coordinator.config.state_dir / "site.jsonl"), RequestDeclined)
    assert line.reason == word.value
    assert line.detail
    assert not list((coordinator.config.state_dir / "runs").glob("run-x/*"))
    coordinator.honest_run(frozen)
    charges = Site(coordinator.config, os_entropy).ledger().charges()
    assert [(charge.run, charge.round) for charge in charges] == [("honest", 1)]


@pytest.mark.parametrize("key", ["k" * 900_000, "\x1b[2J\nforged: line"], ids=["long", "terminal codes"])
def test_what_a_coordinator_writes_into_an_offer_does_not_fill_the_journal_or_reach_a_terminal(
    coordinator: Coordinator, frozen: Backbone, key: str
) -> None:
    assert coordinator.refused(messages.JOIN, rewritten(frozen, **{key: 1})) is DeclineReason.BAD_REQUEST
    journal = coordinator.config.state_dir / "site.jsonl"
    assert journal.stat().st_size < 1000
    [line] = read_site_journal(journal)
    assert line.message_type == messages.JOIN
    assert line.detail.isprintable()


def test_text_in_place_of_another_sites_task_kind_does_not_wait_for_approval(tmp_path: Path, frozen: Backbone) -> None:
    """It would be shown to whoever approves the run, between the lines that say what it costs."""
    careful = Coordinator(site_config(tmp_path, "north", approval="required"))
    forged = "classification)\nprice     epsilon 0.01 per example\x1b[2K"
    tasks = {**TASKS, "elsewhere": {"kind": forged}}
    assert careful.refused(messages.JOIN, rewritten(frozen, tasks=tasks)) is DeclineReason.BAD_REQUEST
    assert Approvals(careful.config.state_dir).waiting() == []
    [line] = read_site_journal(careful.config.state_dir / "site.jsonl")
    assert "tasks.elsewhere.kind" in line.detail
    assert line.detail.isprintable()


def test_a_flood_of_offers_keeps_few_of_them_on_the_disk(tmp_path: Path, frozen: Backbone) -> None:
    careful = Coordinator(site_config(tmp_path, "north", approval="required"))
    for seed in range(MAX_WAITING + 8):
        assert careful.refused(messages.JOIN, rewritten(frozen, seed=seed)) is DeclineReason.NOT_APPROVED
    kept = list((careful.config.state_dir / "waiting").iterdir())
    assert len(kept) == MAX_WAITING
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)


@pytest.mark.parametrize(
    "run_id", ["../../outside", "/etc/cron.d/x", "a/b", "", "x" * 129, "..", "ligne\nbreak", "nul\0", "ünicode"]
)
@pytest.mark.parametrize("kind", [messages.JOIN, messages.TRAIN, messages.FINISH, messages.PART])
def test_a_run_id_that_could_be_a_path_goes_nowhere(
    coordinator: Coordinator, frozen: Backbone, run_id: str, kind: str, tmp_path: Path
) -> None:
    payloads: dict[str, messages.Request] = {
        messages.JOIN: offered(run_id, run_config(), frozen),
        messages.TRAIN: messages.TrainRequest(run_id, 1, heads(frozen)),
        messages.FINISH: messages.FinishRequest(run_id, heads(frozen), "0" * 64),
        messages.PART: messages.PartRequest(run_id, frozen.digest, 0, 1, b"1"),
    }
    before = {path for path in tmp_path.rglob("*") if "north-state" not in path.parts}
    assert coordinator.refused(kind, messages.encode(payloads[kind])) is DeclineReason.BAD_REQUEST
    assert {path for path in tmp_path.rglob("*") if "north-state" not in path.parts} == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("another version", lambda public: public.update(version=messages.VERSION + 1)),
        ("no version", lambda public: public.pop("version")),
        ("a version of a later shape", lambda public: public.update(version=99, surprise=[1])),
        ("a message of a later name", lambda public: public.update(version=99, payload="Invitation")),
        ("a later version without anything known", lambda public: [public.clear(), public.update(version=99)]),
        ("a version that only looks equal", lambda public: public.update(version=True)),
    ],
)
def test_a_coordinator_of_another_version_hears_so(
    coordinator: Coordinator, frozen: Backbone, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    assert coordinator.refused(messages.JOIN, edited(frozen, change)) is DeclineReason.VERSION, name


def bomb(layout: str, data: bytes) -> Callable[[Backbone], RecordDict]:
    def make(frozen: Backbone) -> RecordDict:
        records = messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))
        records["heads"] = ConfigRecord({"layout": layout, "data": data})
        return records

    return make


def pickled(frozen: Backbone) -> RecordDict:
    records = messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))
    array = Array("float32", (1,), "numpy.ndarray", b"\x80\x04cos\nsystem\n(S'id'\ntR.")
    records["heads"] = ArrayRecord({"weight": array})
    return records


def with_heads(change: Callable[[dict[str, dict[str, np.ndarray]]], None]) -> Callable[[Backbone], RecordDict]:
    def make(frozen: Backbone) -> RecordDict:
        own = {task: dict(params) for task, params in heads(frozen).items()}
        change(own)
        return messages.encode(messages.TrainRequest("honest", 2, own))

    return make


def poison(value: float) -> Callable[[dict[str, dict[str, np.ndarray]]], None]:
    def change(own: dict[str, dict[str, np.ndarray]]) -> None:
        own["colour"] = {name: np.full_like(array, value) for name, array in own["colour"].items()}

    return change


BAD_ROUNDS: dict[str, Callable[[Backbone], RecordDict]] = {
    "a shape that promises more than it holds": bomb('{"colour":{"weight":[1000000,1000000]}}', b"1234"),
    "a negative shape": bomb('{"colour":{"weight":[-4]}}', b""),
    "a nested layout": bomb("[" * 200_000, b""),
    "a pickle": pickled,
    "another shape": with_heads(lambda own: own["colour"].update(weight=np.zeros((2, 2), np.float32))),
    "no heads": with_heads(lambda own: own.clear()),
    "a head of another task": with_heads(lambda own: own.update(extra=own["size"])),
    "a head too few": with_heads(lambda own: own.pop("size") and None),
    "heads that are not numbers": with_heads(poison(float("nan"))),
    "infinite heads": with_heads(poison(float("inf"))),
    "a round of the past": lambda frozen: messages.encode(messages.TrainRequest("honest", 0, heads(frozen))),
    "a round after the run": lambda frozen: messages.encode(messages.TrainRequest("honest", 3, heads(frozen))),
    "a run that was never offered": lambda frozen: messages.encode(messages.TrainRequest("other", 1, heads(frozen))),
    "nothing": lambda frozen: RecordDict(),
    "nested JSON": lambda frozen: RecordDict({"public": ConfigRecord({"json": "[" * 200_000})}),
    "a megabyte of JSON": lambda frozen: RecordDict(
        {"public": ConfigRecord({"json": " " * (messages.MAX_JSON_BYTES + 1)})}
    ),
    "another payload": lambda frozen: messages.encode(messages.FinishRequest("honest", heads(frozen), "0" * 64)),
}


@pytest.mark.parametrize("attack", BAD_ROUNDS)
def test_a_bad_round_is_declined_logged_and_not_charged(
    coordinator: Coordinator, frozen: Backbone, attack: str
) -> None:
    coordinator.honest_run(frozen)
    site = Site(coordinator.config, os_entropy)
    before = site.ledger().spent()
    coordinator.refused(messages.TRAIN, BAD_ROUNDS[attack](frozen))
    assert site.ledger().spent() == before
    assert isinstance(read_site_journal(coordinator.config.state_dir / "site.jsonl")[-1], RequestDeclined)
    # And the run goes on.
    messages.decode(
        coordinator.send(messages.TRAIN, messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))),
        messages.TrainReply,
    )


def shifted(frozen: Backbone, by: float) -> Heads:
    return {task: {name: array + by for name, array in p.items()} for task, p in heads(frozen).items()}


def test_a_replayed_round_gets_the_same_bytes_and_another_request_of_it_is_declined(
    coordinator: Coordinator, frozen: Backbone
) -> None:
    """Else one approval would pay for as many rounds as the whole budget covers."""
    coordinator.honest_run(frozen)
    site = Site(coordinator.config, os_entropy)
    ask = messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))
    first = messages.to_bytes(coordinator.send(messages.TRAIN, ask))
    before = site.ledger().spent()
    assert all(messages.to_bytes(coordinator.send(messages.TRAIN, ask)) == first for _ in range(3))
    for round_, declined in ((1, DeclineReason.OVERTAKEN), (2, DeclineReason.BAD_REQUEST)):
        for number in range(1, 20):
            other = messages.encode(messages.TrainRequest("honest", round_, shifted(frozen, number)))
            assert coordinator.refused(messages.TRAIN, other) is declined
    assert site.ledger().spent() == before


def test_an_evaluation_is_answered_to_one_request_too(tmp_path: Path, frozen: Backbone) -> None:
    config = site_config(
        tmp_path, "north", evaluation={"share": 0.5, "evaluations": 9}, split={"test_fraction": 0.3, "salt": ""}
    )
    coordinator = Coordinator(config)
    run = run_config(evaluation={"every": 1})
    coordinator.send(messages.JOIN, messages.encode(offered("honest", run, frozen)))
    blob = frozen.blob()
    coordinator.send(messages.PART, messages.encode(messages.PartRequest("honest", frozen.digest, 0, 1, blob.weights)))
    coordinator.send(messages.PREPARE, messages.encode(messages.PrepareRequest("honest", {blob.digest: blob.spec})))
    ask = messages.encode(messages.EvaluateRequest("honest", 1, heads(frozen)))
    messages.decode(coordinator.send(messages.EVALUATE, ask), messages.EvaluateReply)
    other = messages.encode(messages.EvaluateRequest("honest", 1, shifted(frozen, 1)))
    assert coordinator.refused(messages.EVALUATE, other) is DeclineReason.BAD_REQUEST
    assert len(Site(config, os_entropy).ledger().charges()) == 1


def test_a_round_that_was_cut_off_is_charged_a_few_times_and_no_more(
    coordinator: Coordinator, frozen: Backbone
) -> None:
    """A charge without a stored reply, as a crash leaves it."""
    coordinator.honest_run(frozen)
    site = Site(coordinator.config, os_entropy)
    for _ in range(MAX_CHARGES):
        site.ledger().reserve(Mechanism("gaussian", 50.0, 1.0, 2, 1.0), run="honest", round=2, request="0" * 64)
    ask = messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))
    assert coordinator.refused(messages.TRAIN, ask) is DeclineReason.BAD_REQUEST
    assert len(site.ledger().charges()) == 1 + MAX_CHARGES


def test_a_request_that_must_fail_is_not_charged(coordinator: Coordinator, frozen: Backbone) -> None:
    """The cached features are gone: no try of the round can succeed."""
    coordinator.honest_run(frozen)
    site = Site(coordinator.config, os_entropy)
    before = site.ledger().spent()
    shutil.rmtree(site.features_folder())
    ask = messages.encode(messages.TrainRequest("honest", 2, heads(frozen)))
    for _ in range(3):
        assert coordinator.refused(messages.TRAIN, ask) is DeclineReason.NOT_PREPARED
    assert site.ledger().spent() == before


def test_what_a_coordinator_writes_neither_fills_the_journal_nor_steers_a_terminal(
    coordinator: Coordinator, frozen: Backbone
) -> None:
    coordinator.refused(messages.JOIN, rewritten(frozen, **{"x" * 500_000: True}))
    coordinator.refused(messages.JOIN, rewritten(frozen, tasks={"\x1b]0;pwned\x07": {"kind": "classification"}}))
    path = coordinator.config.state_dir / "site.jsonl"
    assert path.stat().st_size < 10_000
    assert not any("\x1b" in event.detail for event in read_site_journal(path))


def test_what_a_killed_transfer_left_half_written_is_no_part(coordinator: Coordinator, frozen: Backbone) -> None:
    folder = coordinator.config.state_dir / "backbones" / f"{frozen.digest}.parts"
    folder.mkdir(parents=True)
    (folder / ".0-of-1.abcd1234").write_bytes(b"half")
    coordinator.honest_run(frozen)


@pytest.mark.parametrize(
    "part",
    [
        forged(messages.PartRequest, "honest", "0" * 64, 0, 10**9, b"1" * messages.PART_BYTES),
        forged(messages.PartRequest, "honest", "0" * 64, -1, 2, b"1"),
        forged(messages.PartRequest, "honest", "0" * 64, 2, 2, b"1"),
        forged(messages.PartRequest, "honest", "0" * 64, 0, 2, b"1"),
        forged(messages.PartRequest, "honest", "0" * 64, 0, 1, b""),
        forged(messages.PartRequest, "honest", "0" * 64, 0, 1, b"1" * (messages.PART_BYTES + 1)),
    ],
    ids=["a billion parts", "before the first", "after the last", "short", "empty", "oversized"],
)
def test_a_part_of_a_backbone_that_is_not_one_is_declined(
    coordinator: Coordinator, frozen: Backbone, part: messages.PartRequest
) -> None:
    coordinator.honest_run(frozen)
    assert coordinator.refused(messages.PART, messages.encode(part)) is DeclineReason.BAD_REQUEST


def test_a_message_of_an_unknown_kind_does_not_reach_a_record(coordinator: Coordinator, frozen: Backbone) -> None:
    grid = InProcessGrid(make_app(lambda context: coordinator.config), 1)
    ask = Message(messages.encode(messages.Ready()), dst_node_id=FIRST_NODE_ID, message_type="query.records")
    [reply] = grid.send_and_receive([ask])
    assert reply.has_error()
    assert "north" not in reply.error.reason
    coordinator.honest_run(frozen)
