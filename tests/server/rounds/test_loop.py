"""The round loop against real sites, one of which misbehaves: the round stands and the offender is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import make_app
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.protocol.site import Site
from common import messages
from common.events import (
    BackboneSent,
    FileJournal,
    RoundEnded,
    RunEvent,
    SiteJoined,
    SiteRejected,
    read_run_journal,
    select_events,
)
from common.flower import set_metadata
from common.model.momentum import Momentum
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.privacy.noise import Entropy, SeededEntropy
from common.tasks import open_task
from common.types import Delta, RunFailed, RunInterrupted, heads_digest
from server.reports.summary import summarize
from server.rounds.aggregators import Weighted
from server.rounds.aggregators.mean import Mean
from server.rounds.checkpoint import Checkpoint, load_checkpoint
from server.rounds.loop import Outcome, run_federation
from server.superlink.watch import describe_event
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, forged, run_config, site_config

Distort = Callable[[RecordDict], RecordDict]


def federate(
    folder: Path,
    sites: list[SiteConfig],
    *,
    faulty_site: str | None = None,
    distort: Distort | None = None,
    kind: str = messages.TRAIN,
    run_id: str = "run-1",
    entropy: Entropy | None = None,
    resume: Checkpoint | None = None,
    anyway: bool = True,
    **changes: Any,
) -> tuple[Outcome, list[RunEvent]]:
    """Run two rounds; one site's replies of a kind go through `distort`. Outcome and journal."""
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], entropy or SeededEntropy(0))

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        name = sites[int(context.node_config["partition-id"])].name
        if distort and name == faulty_site and message.metadata.message_type == kind:
            return Message(distort(reply.content), reply_to=message)
        return reply

    folder.mkdir(parents=True, exist_ok=True)
    outcome = run_federation(
        InProcessGrid(app, len(sites)),
        run_config(**changes),
        {"backbone": backbone()},
        run_id=run_id,
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
        resume=resume,
        anyway=anyway,
    )
    return outcome, read_run_journal(folder / "journal.jsonl")


def test_a_run_that_cannot_be_better_than_guessing_ends_before_anything_is_charged(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    hopeless = {"privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 500.0}}
    with pytest.raises(RunFailed, match=r"no better than guessing \(colour, size\).*nothing was charged.*--anyway"):
        federate(tmp_path / "run", sites, anyway=False, **hopeless)
    assert Site(sites[0], SeededEntropy(0)).ledger().history().charges == {}
    federate(tmp_path / "again", sites, run_id="run-2", **hopeless)
    federate(tmp_path / "useful", sites, run_id="run-3", anyway=False)


def edited(change: Callable[[dict[str, dict[str, np.ndarray]]], None]) -> Distort:
    """A distortion of the heads in a train reply."""

    def distort(records: RecordDict) -> RecordDict:
        reply = messages.decode(records, messages.TrainReply)
        heads = {task: dict(params) for task, params in reply.delta.heads.items()}
        change(heads)
        return messages.encode(messages.TrainReply(Delta(heads), reply.plan))

    return distort


def with_metrics(records: RecordDict) -> RecordDict:
    records["metrics"] = ConfigRecord({"loss": 0.1})
    return records


def raising(records: RecordDict) -> RecordDict:
    raise RuntimeError("CANARY-in-an-exception")


def set_nan(heads: dict[str, dict[str, np.ndarray]]) -> None:
    name = next(iter(heads["colour"]))
    heads["colour"][name] = heads["colour"][name] * np.float32("nan")


def set_shape(heads: dict[str, dict[str, np.ndarray]]) -> None:
    heads["colour"] = {name: np.zeros((1,), np.float32) for name in heads["colour"]}


def set_huge(heads: dict[str, dict[str, np.ndarray]]) -> None:
    heads["colour"] = {name: np.full_like(array, 1e30) for name, array in heads["colour"].items()}


def drop_task(heads: dict[str, dict[str, np.ndarray]]) -> None:
    del heads["size"]


def add_key(heads: dict[str, dict[str, np.ndarray]]) -> None:
    heads["size"]["extra"] = np.zeros(1, np.float32)


def add_task(heads: dict[str, dict[str, np.ndarray]]) -> None:
    heads["other"] = heads["size"]


MISDEEDS: dict[str, tuple[Distort, str]] = {
    "nan": (edited(set_nan), "finite"),
    "wrong shape": (edited(set_shape), "shape"),
    "huge norm": (edited(set_huge), "norm"),
    "missing task": (edited(drop_task), "tasks"),
    "extra key": (edited(add_key), "parameters"),
    "extra task": (edited(add_task), "tasks"),
    "extra record": (with_metrics, "unexpected record"),
    "empty reply": (lambda records: RecordDict(), "malformed"),
    "another payload": (lambda records: messages.encode(messages.Ready()), "another kind"),
    "numpy's own format": (
        lambda records: RecordDict({**records, "heads": ArrayRecord({"w": np_array()})}),
        "malformed",
    ),
    "raised error": (raising, "error"),
}


def np_array() -> Any:
    from flwr.app import Array

    return Array(np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("name", MISDEEDS)
def test_one_bad_reply_leaves_the_round_standing(tmp_path: Path, name: str) -> None:
    distort, said = MISDEEDS[name]
    three = [site_config(tmp_path / "a", site) for site in ("east", "north", "west")]
    outcome, events = federate(tmp_path / "run-a", three, faulty_site="north", distort=distort)
    rejected = select_events(events, SiteRejected)
    assert [event.site for event in rejected] == ["north", "north"]
    assert all(said in event.reason for event in rejected), rejected
    assert [sorted(event.sites) for event in select_events(events, RoundEnded)] == [["east", "west"]] * 2
    # Exactly what the two others alone would have made.
    two = [site_config(tmp_path / "a", site, state_dir=str(tmp_path / site)) for site in ("east", "west")]
    alone, _ = federate(tmp_path / "run-b", two)
    assert heads_digest(outcome.heads) == heads_digest(alone.heads)
    assert "CANARY" not in (tmp_path / "run-a" / "journal.jsonl").read_text()


@pytest.mark.parametrize("size", [0, 10**12])
def test_an_absurd_public_size_keeps_a_site_out(tmp_path: Path, size: int) -> None:
    def absurd(records: RecordDict) -> RecordDict:
        reply = messages.decode(records, messages.JoinReply)
        return messages.encode(
            forged(
                messages.JoinReply,
                reply.site,
                {"colour": size},
                reply.unit,
                reply.delta,
                reply.budget_epsilon,
                reply.backbones,
            )
        )

    sites = [site_config(tmp_path, site) for site in ("east", "north")]
    _, events = federate(tmp_path / "run", sites, faulty_site="north", distort=absurd, kind=messages.JOIN)
    assert [event.site for event in select_events(events, SiteJoined)] == ["east"]


def test_two_sites_of_one_name_count_once(tmp_path: Path) -> None:
    first = site_config(tmp_path / "a", "north")
    second = site_config(tmp_path / "b", "north")
    _, events = federate(tmp_path / "run", [first, second])
    assert [event.site for event in select_events(events, SiteJoined)] == ["north"]
    assert any("same name" in event.reason for event in select_events(events, SiteRejected))


def test_every_site_trains_and_aggregates_only_its_own_tasks(tmp_path: Path) -> None:
    only_size = {"size": {"source": "records", "label": "size", "missing": "refuse", "public_size": 40}}
    sites = [site_config(tmp_path, "east"), site_config(tmp_path, "north", tasks=only_size)]
    _, events = federate(tmp_path / "run", sites)
    assert [event.num_updates for event in select_events(events, RoundEnded)] == [{"colour": 1, "size": 2}] * 2


def test_a_site_whose_budget_does_not_cover_the_run_declines_and_the_run_goes_on(tmp_path: Path) -> None:
    poor = site_config(tmp_path, "north", budget={"epsilon": 0.1, "delta": 1e-5})
    _, events = federate(tmp_path / "run", [site_config(tmp_path, "east"), poor])
    assert [(event.site, event.reason) for event in select_events(events, SiteRejected)] == [
        ("north", "declined: budget")
    ]
    assert events[-1].updates == {"colour": 2, "size": 2}


def test_a_task_that_too_few_of_the_sites_have_stays_as_it_was(tmp_path: Path) -> None:
    only_size = {"size": {"source": "records", "label": "size", "missing": "refuse", "public_size": 40}}
    sites = [site_config(tmp_path, "east"), site_config(tmp_path, "north", tasks=only_size)]
    sites.append(site_config(tmp_path, "west"))
    # In each round two of three are asked: with north among them, one site has the colours.
    cohort = {"min_sites": 2, "fraction": 0.5, "min_replies_per_task": 2, "timeout_s": 5, "join_timeout_s": 1}
    _, events = federate(tmp_path / "run", sites, rounds=6, cohort=cohort)
    for event in select_events(events, RoundEnded):
        assert event.updated == (("size",) if "north" in event.sites else ("colour", "size"))
    assert len({event.updated for event in select_events(events, RoundEnded)}) == 2
    summary = summarize(events)
    assert (summary.status, summary.tasks["size"].missed) == ("partial", 0)
    assert summary.tasks["colour"].missed == 6 - summary.tasks["colour"].updates > 0


def test_a_round_in_which_a_task_cannot_get_its_quorum_ends_the_run_at_once_with_the_reason(tmp_path: Path) -> None:
    only_size = {"size": {"source": "records", "label": "size", "missing": "refuse", "public_size": 40}}
    sites = [site_config(tmp_path, name) for name in ("east", "west")]
    sites.append(site_config(tmp_path, "north", tasks=only_size))
    cohort = {"min_sites": 2, "min_replies_per_task": 2, "timeout_s": 5, "join_timeout_s": 1}
    said = r"round 1: expected at least 2 update\(s\) of colour, got 1: west: colour.*expected finite values"
    started = time.monotonic()
    with pytest.raises(RunInterrupted, match=said):
        federate(tmp_path / "run", sites, faulty_site="west", distort=edited(set_nan), cohort=cohort)
    assert time.monotonic() - started < 5
    assert not select_events(read_run_journal(tmp_path / "run" / "journal.jsonl"), RoundEnded)


def test_a_task_with_fewer_updates_than_its_aggregator_needs_stays_as_it_was(tmp_path: Path) -> None:
    only_size = {"size": {"source": "records", "label": "size", "missing": "refuse", "public_size": 40}}
    sites = [site_config(tmp_path, name) for name in ("east", "south", "west")]
    sites.append(site_config(tmp_path, "north", tasks=only_size))
    trimmed = {"kind": "trimmed_mean", "trim": 1}
    # In each round three of four are asked: with north among them, two sites have the colours.
    cohort = {"min_sites": 3, "fraction": 0.5, "timeout_s": 5, "join_timeout_s": 1}
    _, events = federate(tmp_path / "run", sites, aggregation=trimmed, cohort=cohort, rounds=2)
    ended = select_events(events, RoundEnded)
    without = [event for event in ended if "north" in event.sites]
    assert len(without) == 1
    assert all(event.updated == (("size",) if event in without else ("colour", "size")) for event in ended)
    said = describe_event(without[0], 2)
    assert said is not None and "updates: colour 2, size 3; not enough for colour, left unchanged" in said


def test_fewer_sites_than_the_aggregator_needs_end_the_run_before_anything_is_spent(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    with pytest.raises(RunFailed, match=r"at least 5 site\(s\) with task colour to join \(aggregation krum needs"):
        federate(tmp_path / "run", sites, aggregation={"kind": "krum", "byzantine": 1})
    assert not any((found := Ledger.find(locate_ledgers(site), site.registry)) and found.charges() for site in sites)


def test_a_run_without_its_minimum_of_sites_fails_with_a_sentence(tmp_path: Path) -> None:
    cohort = {"min_sites": 3, "timeout_s": 5, "join_timeout_s": 0.1}
    with pytest.raises(RunFailed, match=r"expected at least 3 site\(s\) to join, got 1"):
        federate(tmp_path / "run", [site_config(tmp_path, "east")], cohort=cohort)


def test_a_fraction_of_the_sites_is_asked_each_round_and_the_choice_is_reproducible(tmp_path: Path) -> None:
    def asked(folder: Path) -> list[list[str]]:
        sites = [site_config(folder, name) for name in ("a", "b", "c", "d")]
        cohort = {"fraction": 0.5, "min_sites": 1, "timeout_s": 5, "join_timeout_s": 1}
        _, events = federate(folder / "run", sites, cohort=cohort, rounds=6)
        return [sorted(event.sites) for event in select_events(events, RoundEnded)]

    first = asked(tmp_path / "1")
    assert all(len(sites) == 2 for sites in first)
    assert len({tuple(sites) for sites in first}) > 1
    assert asked(tmp_path / "2") == first


def test_final_heads_come_home_and_the_checkpoint_holds_the_last_round(tmp_path: Path) -> None:
    site = site_config(tmp_path, "east")
    outcome, _ = federate(tmp_path / "run", [site])
    home = messages.from_bytes((site.state_dir / "runs" / "run-1" / "final_heads.bin").read_bytes())
    assert messages.decode(home, messages.FinishRequest).digest == heads_digest(outcome.heads)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert checkpoint.rounds_done == 2
    assert heads_digest(checkpoint.heads) == heads_digest(outcome.heads)


def test_the_journal_and_the_stored_replies_replay_to_the_same_heads(tmp_path: Path) -> None:
    sites = {name: site_config(tmp_path, name) for name in ("east", "north")}
    sizes = {"colour": 10, "size": 30}
    values = {
        task: {"source": "records", "label": task, "missing": "refuse", "public_size": size}
        for task, size in sizes.items()
    }
    sites["north"] = site_config(tmp_path, "north", tasks=values)
    outcome, events = federate(tmp_path / "run", list(sites.values()), rounds=3)
    tasks = {name: open_task(spec, name) for name, spec in run_config().tasks.items()}
    heads = {
        name: parameters(module)
        for name, module in create_modules(run_config(), tasks, {"backbone": backbone()}).items()
    }
    for event in select_events(events, RoundEnded):
        replies = {name: _stored_delta(site, event.round) for name, site in sites.items()}
        heads = {
            task: Mean(kind="mean").update(
                params,
                {},
                [Weighted(event.sites[name].weights[task], replies[name].heads[task]) for name in event.sites],
            )[0]
            for task, params in heads.items()
        }
        assert event.heads == heads_digest(heads)
    assert heads_digest(outcome.heads) == heads_digest(heads)
    assert select_events(events, RoundEnded)[0].sites["north"].weights == sizes


def test_each_round_follows_the_schedule_and_decays_to_what_was_sent_first(tmp_path: Path) -> None:
    sites = {name: site_config(tmp_path, name) for name in ("east", "north")}
    aggregation = {"kind": "mean", "schedule": {"shape": "linear", "end": 0.5}, "decay_to_start": 0.2}
    outcome, events = federate(tmp_path / "run", list(sites.values()), rounds=3, aggregation=aggregation)
    tasks = {name: open_task(spec, name) for name, spec in run_config().tasks.items()}
    modules = create_modules(run_config(), tasks, {"backbone": backbone()})
    start = {name: parameters(module) for name, module in modules.items()}
    heads = start
    for event, factor in zip(select_events(events, RoundEnded), (1.0, 0.75, 0.5), strict=True):
        replies = [_stored_delta(site, event.round) for site in sites.values()]
        for task, params in heads.items():
            means = {name: np.mean([reply.heads[task][name] for reply in replies], axis=0) for name in params}
            far = {name: values + factor * means[name] - start[task][name] for name, values in params.items()}
            heads = {**heads, task: {name: start[task][name] + 0.8 * each for name, each in far.items()}}
    for task, params in heads.items():
        for name, values in params.items():
            np.testing.assert_allclose(outcome.heads[task][name], values, rtol=1e-4, atol=1e-6)
    # What a resumed run decays to.
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    for task, params in start.items():
        assert all(np.array_equal(checkpoint.states[task]["start"][name], each) for name, each in params.items())


def test_balanced_sites_release_what_they_would_anyway_and_count_the_same(tmp_path: Path) -> None:
    """The setting reads declared sizes and names: no release, no charge and no noise of a site follows from it."""
    found = {}
    for balance in (None, "sites"):
        folder = tmp_path / str(balance)
        # North declares half its units: its mean update is of twice as much noise.
        sites = {name: site_config(folder, name) for name in ("east", "north")}
        halved = {name: task.model_copy(update={"public_size": 20}) for name, task in sites["north"].tasks.items()}
        sites["north"] = sites["north"].model_copy(update={"tasks": halved})
        rule = {"kind": "heavy_ball", "rounds": 1, "noise": 100.0}
        aggregation = rule if balance is None else {**rule, "balance": balance}
        outcome, _ = federate(folder / "run", list(sites.values()), rounds=1, aggregation=aggregation)
        ledgers = [Ledger.find(locate_ledgers(site), site.registry) for site in sites.values()]
        prices = [charge.mechanism for ledger in ledgers for charge in ledger.charges()]  # type: ignore[union-attr]
        found[balance] = {name: _stored_delta(site, 1) for name, site in sites.items()}, outcome.heads, prices
    assert found[None][2] == found["sites"][2]
    for name, delta in found[None][0].items():
        assert heads_digest(delta.heads) == heads_digest(found["sites"][0][name].heads)
    tasks = {name: open_task(spec, name) for name, spec in run_config().tasks.items()}
    modules = create_modules(run_config(), tasks, {"backbone": backbone()})
    for task, start in {name: parameters(module) for name, module in modules.items()}.items():
        east, north = (found["sites"][0][name].heads[task] for name in ("east", "north"))
        for name, values in start.items():
            # Of 60 units east declares 40: its own count for 3/4, those of north for 3/2.
            step, _ = Momentum(rounds=1, noise=100.0).choose_step(60.0, 0.75**2 + 1.5**2)
            expected = values + step * (east[name] + north[name]) / 2
            np.testing.assert_allclose(found["sites"][1][task][name], expected, rtol=1e-5, atol=1e-6)


def _stored_delta(site: SiteConfig, round_: int) -> Delta:
    """Returns the update that a site stored for a round, found by the charge of its ledger."""
    charges = Ledger.find(locate_ledgers(site), site.registry).charges()  # type: ignore[union-attr]
    (request,) = [charge.request for charge in charges if charge.round == round_ and charge.committed]
    data = (site.state_dir / "runs" / "run-1" / "replies" / request).read_bytes()
    return messages.decode(messages.from_bytes(data), messages.TrainReply).delta


def test_later_rounds_carry_heads_only_and_the_backbone_travels_once(tmp_path: Path) -> None:
    site = site_config(tmp_path, "east")
    _, events = federate(tmp_path / "run-1", [site])
    assert len(select_events(events, BackboneSent)) == 1
    _, events = federate(tmp_path / "run-2", [site], run_id="run-2")
    assert not select_events(events, BackboneSent)


class FloodedGrid(InProcessGrid):
    """Every reply comes many times over, among replies that nobody asked for."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = InProcessGrid.pull_messages(self, message_ids)
        strangers = [Message(reply.content, reply_to=_renamed(reply)) for reply in replies]
        return [*strangers, *[reply for reply in replies for _ in range(50)]]


def _renamed(reply: Message) -> Message:
    copy = Message(reply.content, dst_node_id=999, message_type=messages.TRAIN)
    set_metadata(copy, message_id="nobody-asked", src_node_id=1)
    return copy


def test_a_flood_of_replies_changes_nothing_and_is_logged(tmp_path: Path) -> None:
    sites = [site_config(tmp_path / "a", name) for name in ("east", "north")]
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0))
    (tmp_path / "run-b").mkdir()
    journal = FileJournal(tmp_path / "run-b" / "journal.jsonl")
    flooded = run_federation(
        FloodedGrid(app, 2),
        run_config(),
        {"backbone": backbone()},
        run_id="run-1",
        folder=tmp_path / "run-b",
        journal=journal,
        executor="in_process",
    )
    again = [site_config(tmp_path / "a", name, state_dir=str(tmp_path / name)) for name in ("east", "north")]
    calm, _ = federate(tmp_path / "run-a", again)
    assert heads_digest(flooded.heads) == heads_digest(calm.heads)
    rejected = select_events(read_run_journal(journal.path), SiteRejected)
    logged = [event for event in rejected if event.reason == "a reply nobody asked for"]
    assert logged
    assert len(read_run_journal(journal.path)) < 200
