"""Canaries in patient ids, paths, labels, cells and exceptions: none reaches a message, a shared file or Flower.

Whole federations are run, in which one layer of the site after the other meets something it cannot use. Everything that
crosses to the coordinator is recorded as bytes, and everything the coordinator wrote is read.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import SITE_VARIABLE, make_app
from client.config import SiteConfig
from common import messages
from common.events import (
    FileJournal,
    HeadsEvaluated,
    RunEvent,
    SitePreparedAgain,
    SiteRejected,
    read_run_journal,
    select_events,
)
from common.flower import import_simulation_engine, set_metadata
from common.model.backbones import open_backbones
from common.privacy.noise import Entropy, os_entropy
from common.run import RunConfig
from common.types import BadInput, DeclineReason, RunFailed, RunInterrupted
from server.reports.results import write_results
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import offered, run_config, site_config

CANARY = "canary"
ENGINE = import_simulation_engine()
SHARE = {"share": 0.3, "evaluations": 5}
COLOURS = {"colour": {"kind": "classification", "labels": ["red", "green", "blue"]}}
INPUTS = [{"name": name, "range": [0, 40], "missing": "refuse"} for name in ("a", "b")]


def run_of(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "backbone": {"kind": "identity", "columns": INPUTS},
        "privacy": {"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0},
        "tasks": COLOURS,
        "evaluation": {"every": 1},
    }
    return run_config(**{**values, **changes})


def a_site(folder: Path, **changes: Any) -> SiteConfig:
    """Thirty patients with two rows each; canaries in paths, patient ids, an unused column and the registry."""
    home = folder / f"{CANARY}-hospital"
    home.mkdir(parents=True, exist_ok=True)
    rows = [["a", "b", "colour", "who", "note"]]
    rows += [
        [str(i), str(j), ["red", "green", "blue"][i % 3], f"{CANARY}-patient-{i}", f"{CANARY}-note"]
        for i in range(30)
        for j in (0, 1)
    ]
    path = home / f"{CANARY}-rows.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    values: dict[str, Any] = {
        "unit": "patient",
        "registry": f"{CANARY}-registry",
        "sources": {
            "records": {"kind": "table", "path": str(path), "columns": ["a", "b"], "patient": "who"},
        },
        "tasks": {"colour": {"source": "records", "label": "colour", "missing": "refuse", "public_size": 30}},
        "split": {"test_fraction": 0.3, "salt": f"{CANARY}-salt"},
        "evaluation": SHARE,
        "ledger_dir": str(home / "state" / "ledgers"),
        "state_dir": str(home / "state"),
    }
    return site_config(home, "north", **{**values, **changes})


def rows_of(site: SiteConfig) -> Path:
    return next(site.state_dir.parent.glob("*.csv"))


def edited(site: SiteConfig, old: str, new: str) -> None:
    path = rows_of(site)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@dataclass
class Tap:
    """A site's app, what happens before a kind of message, and everything that the app answered."""

    app: Callable[[Message, Context], Message]
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    crossed: list[bytes] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind in self.before:
            self.before.pop(kind)()
        reply = self.app(message, context)
        self.kinds.append(kind)
        self.crossed.append(reply.error.reason.encode() if reply.has_error() else messages.to_bytes(reply.content))
        return reply


def federate(
    folder: Path,
    site: SiteConfig,
    *,
    before: dict[str, Callable[[], None]] | None = None,
    entropy: Entropy = os_entropy,
    run: RunConfig | None = None,
) -> tuple[Tap, list[RunEvent]]:
    """A whole run with one site; its messages and the coordinator's journal."""
    tap = Tap(make_app(lambda context: site, entropy), dict(before or {}))
    run = run or run_of()
    frozen = open_backbones(run)
    own = folder / "coordinator"
    own.mkdir(parents=True)
    journal = FileJournal(own / "journal.jsonl")
    try:
        outcome = run_federation(
            InProcessGrid(tap, 1), run, frozen, run_id="run-1", folder=own, journal=journal, executor="in_process"
        )
        heads = outcome.heads
    except RunFailed as error:
        assert CANARY not in str(error).lower()
        heads = {}
    write_results(own, run, frozen, heads)
    return tap, read_run_journal(own / "journal.jsonl")


def assert_nothing_leaked(folder: Path, tap: Tap) -> None:
    assert tap.crossed
    for kind, data in zip(tap.kinds, tap.crossed, strict=True):
        assert CANARY.encode() not in data.lower(), kind
    for path in (folder / "coordinator").rglob("*"):
        assert CANARY not in path.name.lower()
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes().lower(), path


def refused_at(events: list[RunEvent]) -> set[tuple[str, str]]:
    """(stage, reason) as the coordinator has them."""
    found = {(event.stage, event.reason) for event in select_events(events, SiteRejected)}
    for event in select_events(events, HeadsEvaluated):
        found |= {("evaluate", reason) for reason in event.rejected.values()}
    return found


def test_a_run_that_goes_well_tells_nothing(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    tap, events = federate(tmp_path, site)
    assert {messages.JOIN, messages.PART, messages.PREPARE, messages.TRAIN, messages.EVALUATE, messages.FINISH} == set(
        tap.kinds
    )
    assert refused_at(events) == set()
    assert_nothing_leaked(tmp_path, tap)
    # The canaries are where they could have leaked from.
    assert CANARY in (site.state_dir / "ledgers").joinpath(f"{CANARY}-registry", "ledger.jsonl").read_text()


# --- each layer raises -----------------------------------------------------------------------------------------------


def broken_source(site: SiteConfig) -> None:
    rows_of(site).unlink()


def binary_source(site: SiteConfig) -> None:
    rows_of(site).write_bytes(b"\xff\xfe\x00" + CANARY.encode() * 50)


def ragged_row(site: SiteConfig) -> None:
    with rows_of(site).open("a") as file:
        file.write(f"\n{CANARY},{CANARY},{CANARY},{CANARY},{CANARY},{CANARY},{CANARY}")


def foreign_cell(site: SiteConfig) -> None:
    edited(site, "\n3,1,", f"\n{CANARY}-cell,1,")


def foreign_label(site: SiteConfig) -> None:
    edited(site, "red", f"{CANARY}-label")


def lost_patient(site: SiteConfig) -> None:
    edited(site, f"{CANARY}-patient-3", "")


@pytest.mark.parametrize(
    "damage", [broken_source, binary_source, ragged_row, foreign_cell, foreign_label, lost_patient]
)
@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_a_source_backbone_or_label_that_fails_tells_one_word(
    tmp_path: Path, damage: Callable[[SiteConfig], None], on_bad_record: str
) -> None:
    site = a_site(tmp_path, on_bad_record=on_bad_record)
    damage(site)
    tap, events = federate(tmp_path, site)
    if "source" in damage.__name__:
        assert refused_at(events) == {("prepare", "declined: bad_request")}
        # The site's own staff reads more.
        assert "declined" in (site.state_dir / "site.jsonl").read_text()
    else:
        assert refused_at(events) == set()
    assert_nothing_leaked(tmp_path, tap)


def garble_backbone(site: SiteConfig) -> None:
    for path in (site.state_dir / "backbones").rglob("*-of-*"):
        path.write_text(CANARY)


def test_a_backbone_that_fails_tells_one_word(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    tap, events = federate(tmp_path, site, before={messages.PREPARE: lambda: garble_backbone(site)})
    assert refused_at(events) <= {("prepare", "declined: bad_request"), ("prepare", "declined: backbone_not_allowed")}
    assert refused_at(events)
    assert_nothing_leaked(tmp_path, tap)


def test_a_backbone_of_the_sites_own_that_cannot_be_opened_is_not_named(tmp_path: Path) -> None:
    own = [{"kind": "small_cnn", "weights": str(tmp_path / f"{CANARY}.safetensors"), "input_size": 20}]
    tap, events = federate(tmp_path, a_site(tmp_path, own_backbones=own))
    assert refused_at(events) == set()  # The coordinator's is taken instead.
    assert_nothing_leaked(tmp_path, tap)


def test_approvals_that_cannot_be_read_tell_one_word(tmp_path: Path) -> None:
    site = a_site(tmp_path, approval="required")
    site.state_dir.mkdir(parents=True)
    (site.state_dir / "approvals.jsonl").write_text(f'{{"event": "approved", "{CANARY}": 1}}\n')
    tap, events = federate(tmp_path, site)
    assert refused_at(events) == {("join", "declined: not_approved")}
    assert_nothing_leaked(tmp_path, tap)


def remove_features(site: SiteConfig) -> None:
    shutil.rmtree(site.state_dir / "features")


def garble_features(site: SiteConfig) -> None:
    for path in (site.state_dir / "features").rglob("*.npy"):
        path.write_bytes(CANARY.encode() * 100)


def damage_ledger(site: SiteConfig) -> None:
    path = site.state_dir / "ledgers" / site.registry / "ledger.jsonl"
    path.write_text(path.read_text().replace("created", f"{CANARY}-event"))


def block_replies(site: SiteConfig) -> None:
    folder = site.state_dir / "runs" / "run-1" / "replies"
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text(CANARY)


def garble_offer(site: SiteConfig) -> None:
    (site.state_dir / "runs" / "run-1" / "offer.json").write_text(f'{{"{CANARY}": 1}}')


def garble_prepared(site: SiteConfig) -> None:
    (site.state_dir / "runs" / "run-1" / "prepared.json").write_text(CANARY)


@pytest.mark.parametrize("stage", [messages.TRAIN, messages.EVALUATE])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_ledger, "budget"),
        (block_replies, "internal"),
        (garble_offer, "internal"),
    ],
)
def test_a_solver_ledger_evaluation_or_reply_that_fails_tells_one_word(
    tmp_path: Path, stage: str, damage: Callable[[SiteConfig], None], reason: str
) -> None:
    site = a_site(tmp_path)
    tap, events = federate(tmp_path, site, before={stage: lambda: damage(site)})
    assert (stage, f"declined: {reason}") in refused_at(events)
    assert_nothing_leaked(tmp_path, tap)


@pytest.mark.parametrize("stage", [messages.TRAIN, messages.EVALUATE])
@pytest.mark.parametrize("damage", [remove_features, garble_features, garble_prepared])
def test_a_site_whose_prepared_data_are_damaged_tells_one_word(
    tmp_path: Path, stage: str, damage: Callable[[SiteConfig], None]
) -> None:
    site = a_site(tmp_path)
    tap, events = federate(tmp_path, site, before={stage: lambda: damage(site)})
    assert [event.ready for event in select_events(events, SitePreparedAgain)] == [True]
    assert_nothing_leaked(tmp_path, tap)


class Panic(BaseException):
    """As native code raises it: no Exception."""


def raises(error: BaseException, at: str) -> Entropy:
    """A source of keys that raises where the purpose holds `at`."""

    def entropy(purpose: str) -> bytes:
        if at in purpose:
            raise error
        return os_entropy(purpose)

    return entropy


ERRORS = [
    ValueError(f"{CANARY}-value"),
    KeyError(f"{CANARY}-key"),
    OSError(5, "no", f"/{CANARY}/path"),
    RunFailed(f"{CANARY}-diverged"),
    BadInput(f"{CANARY}-input"),
    RecursionError(f"{CANARY}-depth"),
    MemoryError(f"{CANARY}-memory"),
    Panic(f"{CANARY}-panic"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("stage", "at"), [(messages.TRAIN, "tiny/north/1"), (messages.EVALUATE, "evaluation")])
def test_whatever_is_raised_in_the_middle_of_a_step_tells_one_word(
    tmp_path: Path, error: BaseException, stage: str, at: str
) -> None:
    tap, events = federate(tmp_path, a_site(tmp_path), entropy=raises(error, at))
    word = "bad_request" if isinstance(error, BadInput) else "internal"
    assert (stage, f"declined: {word}") in refused_at(events)
    assert_nothing_leaked(tmp_path, tap)


def test_an_audit_that_raises_tells_one_word(tmp_path: Path) -> None:
    entropy = raises(RunFailed(f"{CANARY}-audit"), "audit")
    tap, events = federate(tmp_path, a_site(tmp_path), entropy=entropy, run=run_of(audit="required"))
    assert refused_at(events) == {("join", "declined: audit")}
    assert_nothing_leaked(tmp_path, tap)


# --- Flower's own error path -----------------------------------------------------------------------------------------


class InThisProcess(ENGINE.backend):
    """Flower's engine around a ClientApp without Ray: `worker` is its real code, errors and all."""

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Nothing to prepare."""

    @property
    def num_workers(self) -> int:
        return 1

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        """Nothing to end."""

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        return self._app(message, context), context


@dataclass
class Contexts:
    """What the engine keeps of a node."""

    context: Context

    def retrieve_context(self, run_id: int) -> Context:
        return self.context

    def update_context(self, run_id: int, context: Context) -> None:
        self.context = context


@pytest.fixture
def identity() -> Iterator[None]:
    InProcessGrid(ClientApp(), 1)  # Flower refuses to build a Message outside of a run.
    yield


def through_flower(app: ClientApp, content: RecordDict, kind: str, timeout_s: float = 30) -> Message:
    """The engine's reply to one message."""
    asked: Queue[Message] = Queue()
    answered: Queue[Message] = Queue()
    message = Message(content, dst_node_id=7, message_type=kind)
    set_metadata(message, message_id="m")
    asked.put(message)
    context = Context(run_id=1, node_id=7, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
    stop = threading.Event()
    store: Any = {7: Contexts(context)}
    arguments = (asked, answered, store, InThisProcess(app), stop, ENGINE.metrics())
    threading.Thread(target=ENGINE.work, args=arguments, daemon=True).start()
    try:
        return answered.get(timeout=timeout_s)
    finally:
        stop.set()


def said(reply: Message) -> str:
    return reply.error.reason if reply.has_error() else messages.to_bytes(reply.content).decode(errors="replace")


def offer() -> RecordDict:
    run = run_of()
    frozen = open_backbones(run)["backbone"]
    return messages.encode(offered("run-1", run, frozen))


@pytest.mark.usefixtures("identity")
def test_flower_would_send_an_exceptions_text_and_here_it_has_none_to_send() -> None:
    def fails(context: Context) -> SiteConfig:
        raise ValueError(f"{CANARY} in {context.node_id}")

    bare = ClientApp()

    @bare.query("join")
    def on_join(message: Message, context: Context) -> Message:
        raise ValueError(f"{CANARY} in {message.metadata.message_type}")

    assert CANARY in said(through_flower(bare, offer(), messages.JOIN))  # The danger is real.
    reply = through_flower(make_app(fails), offer(), messages.JOIN)
    assert messages.decode(reply.content, messages.Declined) == messages.Declined(DeclineReason.INTERNAL, "")


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("error", [*ERRORS, GeneratorExit(CANARY)], ids=lambda error: type(error).__name__)
def test_whatever_opening_a_site_raises_flower_quotes_nothing(error: BaseException) -> None:
    def fails(context: Context) -> SiteConfig:
        raise error

    reply = through_flower(make_app(fails), offer(), messages.JOIN)
    assert messages.decode(reply.content, messages.Declined).refusal is DeclineReason.INTERNAL
    assert CANARY not in said(reply)


@pytest.mark.usefixtures("identity")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_ends_in_the_middle_answers_nothing_at_all() -> None:
    def ends(context: Context) -> SiteConfig:
        raise SystemExit(f"{CANARY}-exit")

    with pytest.raises(Empty):
        through_flower(make_app(ends), offer(), messages.JOIN, timeout_s=2)


@pytest.mark.usefixtures("identity")
def test_a_site_file_that_cannot_be_read_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("gone", None), ("broken", f"name: [{CANARY}"), ("wrong", f"name: {CANARY}\n{CANARY}: 3")):
        path = tmp_path / f"{CANARY}-{name}.yaml"
        if text is not None:
            path.write_text(text)
        monkeypatch.setenv(SITE_VARIABLE, str(path))
        reply = through_flower(make_app(), offer(), messages.JOIN)
        assert messages.decode(reply.content, messages.Declined) == messages.Declined(DeclineReason.INTERNAL, "")


UNREADABLE = {
    "nothing": RecordDict(),
    "no JSON": RecordDict({"public": ConfigRecord({"json": "{"})}),
    "another payload": messages.encode(messages.Ready()),
    "an extra record": RecordDict(
        {**messages.encode(messages.FinishRequest("run-1", {}, "d" * 64)), "x": ConfigRecord({"y": 1})}
    ),
    "a path for a run": messages.encode(messages.PrepareRequest("../../etc", {})),
}


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize(
    "kind", [messages.JOIN, messages.PART, messages.PREPARE, messages.TRAIN, messages.EVALUATE, messages.FINISH]
)
def test_a_message_that_cannot_be_decoded_is_declined_without_a_quote(tmp_path: Path, name: str, kind: str) -> None:
    site = a_site(tmp_path)
    reply = through_flower(make_app(lambda context: site), UNREADABLE[name], kind)
    # An offer is read for its version before anything else: none is another one.
    expected = (
        (DeclineReason.BAD_REQUEST, DeclineReason.VERSION) if kind == messages.JOIN else (DeclineReason.BAD_REQUEST,)
    )
    assert messages.decode(reply.content, messages.Declined).refusal in expected
    assert CANARY not in said(reply).lower()


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("kind", ["query.unknown", "query", "train.other", "evaluate.other"])
def test_a_kind_of_message_that_is_not_known_is_refused_before_anything_is_opened(tmp_path: Path, kind: str) -> None:
    """Flower's own sentence: it quotes the coordinator's message type and nothing of the site."""

    def never(context: Context) -> SiteConfig:
        raise AssertionError(f"{CANARY}: the site was opened")

    reply = through_flower(make_app(never), offer(), kind)
    assert reply.has_error() and CANARY not in said(reply).lower()
    assert str(tmp_path) not in said(reply)


@pytest.mark.usefixtures("identity")
def test_the_coordinator_keeps_only_the_number_of_an_error_of_flower(tmp_path: Path) -> None:
    """Should an exception's text ever cross, it goes no further: not into the journal, not into the summary."""

    def raising(message: Message, context: Context) -> Message:
        if message.metadata.message_type == messages.TRAIN:
            raise ValueError(f"{CANARY}-text")
        return make_app(lambda context: site)(message, context)

    site = a_site(tmp_path)
    own = tmp_path / "coordinator"
    own.mkdir()
    run = run_of()
    frozen = open_backbones(run)
    journal = FileJournal(own / "journal.jsonl")
    with pytest.raises(RunInterrupted, match="error"):
        run_federation(
            InProcessGrid(raising, 1), run, frozen, run_id="run-1", folder=own, journal=journal, executor="x"
        )
    summary = write_results(own, run, frozen, {})
    assert "error" in summary.sites["north"].reason
    assert CANARY not in summary.to_json() + (own / "journal.jsonl").read_text()
