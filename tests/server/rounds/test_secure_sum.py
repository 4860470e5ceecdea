"""Rounds of secure sums against real sites: exact, with sites that leave at every step, and with sites that lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from client.app import make_app
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.protocol.answer import open_request
from client.protocol.site import Site, joined_run, make_plan
from client.secure_sum.steps import make_sum_keys
from client.solvers import SummingSolver, open_solver
from common import messages
from common.events import FileJournal, RoundEnded, RunEvent, SiteRejected, read_run_journal, select_events
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.privacy.noise import Entropy, SeededEntropy, open_stream
from common.run import RunConfig
from common.secure_sum.identity import format_public_key, write_identity
from common.secure_sum.vectors import choose_lattice, flatten_whole
from common.tasks import open_task
from common.types import BadInput, Heads, RunFailed, RunInterrupted, select_trained
from server.rounds.aggregators import check_trust
from server.rounds.loop import Outcome, run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, run_config, site_config

NAMES = ("east", "mid", "north", "south", "west")
Answer = Callable[[Message, Context], Message]
STEPS = (messages.SUM_KEYS, messages.SUM_SHARES, messages.MASKED, messages.SURVIVORS, messages.UNMASK)


def make_run(*, min_sites: int = 3, colluding: int = 0, **changes: Any) -> RunConfig:
    """Returns a run of secure sums."""
    values: dict[str, Any] = {
        "trust": "secure_sum",
        "colluding": colluding,
        "cohort": {"min_sites": min_sites, "timeout_s": 0.5, "join_timeout_s": 1, "grace_s": 0, "patience_s": 0.2},
        "solver": {"kind": "head_sum", "clip_norm": 1.0},
        **changes,
    }
    return run_config(**values)


def make_sites(folder: Path, *, min_sites: int = 3, colluding: int = 0, **changes: Any) -> list[SiteConfig]:
    """Returns five sites with new identity keys, all in one roster."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.identity" for name in NAMES}
    roster = {name: format_public_key(write_identity(path)) for name, path in paths.items()}
    return [
        site_config(
            folder,
            name,
            secure_sum={"identity": str(path), "roster": roster, "min_sites": min_sites, "colluding": colluding},
            **changes,
        )
        for name, path in paths.items()
    ]


def federate(
    folder: Path, sites: list[SiteConfig], run: RunConfig, *, wrap: Callable[[Answer], Answer] = lambda honest: honest
) -> tuple[Outcome, list[RunEvent]]:
    """Runs a federation; `wrap` stands between the coordinator and the sites."""
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0))
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run_federation(
        InProcessGrid(wrap(honest), len(sites)),
        run,
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    return outcome, read_run_journal(folder / "journal.jsonl")


def name_of(context: Context) -> str:
    return NAMES[int(context.node_config["partition-id"])]


def leave_before(
    step: str, leaving: tuple[str, ...], rounds: tuple[str, ...] = ("1", "2")
) -> Callable[[Answer], Answer]:
    """Returns sites of which some answer no more from a step on, in some rounds."""

    def wrap(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            kind = message.metadata.message_type
            gone = kind in STEPS and STEPS.index(kind) >= STEPS.index(step) and message.metadata.group_id in rounds
            if gone and name_of(context) in leaving:
                raise ConnectionError("gone")
            return honest(message, context)

        return answer

    return wrap


def compute_sum(
    sites: list[SiteConfig],
    heads: Heads,
    *,
    round_: int,
    counted: set[str],
    attempt: int = 1,
    entropy: Entropy | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the update that the counted sites' plain vectors give, added in Python's own integers."""
    vectors, spacing, size = [], 0.0, 0
    for config in sites:
        if config.name not in counted:
            continue
        site = Site(config, entropy or SeededEntropy(0))
        joined = joined_run(site, "run-1")
        request = messages.TrainRequest("run-1", round_, heads)
        opened, plan = open_request(site, joined, request, "train"), make_plan(config, joined)
        assert config.secure_sum is not None
        lattice = choose_lattice(plan, config.secure_sum.rules)
        solver = open_solver(joined.run.solver, "solver")
        assert isinstance(solver, SummingSolver)
        stream = open_stream(site.entropy, joined.run.name, config.name, f"{round_}/{attempt}/secure sum")
        whole = solver.release_whole(
            opened.modules, opened.tasks, opened.units, plan=plan, lattice=lattice, stream=stream
        )
        vectors.append(flatten_whole(whole))
        spacing, size = lattice.spacing, size + 40
    total = [sum(int(vector[i]) for vector in vectors) for i in range(len(vectors[0]))]
    update: dict[str, dict[str, np.ndarray]] = {}
    for group in sorted(heads):
        update[group] = {}
        for name, old in sorted(select_trained(heads[group]).items()):
            part, total = total[: old.size], total[old.size :]
            exact = np.array([-value * spacing for value in part]).reshape(old.shape)
            update[group][name] = (exact.astype(np.float32) / size).astype(np.float32)
    return update


def first_heads(run: RunConfig) -> Heads:
    """Returns the heads before the first round."""
    tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
    modules = create_modules(run, tasks, {"backbone": backbone()})
    return {name: parameters(module) for name, module in modules.items()}


def is_moved(outcome: Outcome, before: Heads, update: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    """Returns true if every head is the one before plus the update, to the bit."""
    return all(
        np.array_equal(outcome.heads[group][name], (before[group][name] + change.astype(np.float64)).astype(np.float32))
        for group, changes in update.items()
        for name, change in changes.items()
    )


def count_charges(site: SiteConfig) -> int:
    ledger = Ledger.find(locate_ledgers(site), site.registry)
    return 0 if ledger is None else len(ledger.charges())


def test_a_round_moves_the_heads_by_the_exact_sum_of_all_sites(tmp_path: Path) -> None:
    run, sites = make_run(rounds=1), make_sites(tmp_path)
    outcome, events = federate(tmp_path / "run", sites, run)
    before = first_heads(run)
    update = compute_sum(sites, before, round_=1, counted=set(NAMES))
    assert is_moved(outcome, before, update)
    (ended,) = select_events(events, RoundEnded)
    assert sorted(ended.sites) == sorted(NAMES)
    assert ended.num_updates == {"colour": 5, "size": 5}
    assert not select_events(events, SiteRejected)


@pytest.mark.parametrize("step", STEPS)
def test_sites_may_leave_before_any_step(tmp_path: Path, step: str) -> None:
    """Those whose masked vector had come are in the sum, the others are not; nobody pays twice."""
    run, sites = make_run(rounds=1), make_sites(tmp_path)
    outcome, events = federate(tmp_path / "run", sites, run, wrap=leave_before(step, ("mid", "west")))
    counted = set(NAMES) if step in (messages.SURVIVORS, messages.UNMASK) else {"east", "north", "south"}
    before = first_heads(run)
    update = compute_sum(sites, before, round_=1, counted=counted)
    assert is_moved(outcome, before, update)
    (ended,) = select_events(events, RoundEnded)
    assert set(ended.sites) == counted
    assert [count_charges(site) for site in sites] == [int(site.name in counted) for site in sites]


def test_a_site_that_left_is_back_in_the_next_round(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    leave = leave_before(messages.MASKED, ("mid",), rounds=("1",))
    _, events = federate(tmp_path / "run", sites, make_run(), wrap=leave)
    assert [len(ended.sites) for ended in select_events(events, RoundEnded)] == [4, 5]


@pytest.mark.parametrize(("step", "paid"), [(messages.SUM_SHARES, 1), (messages.MASKED, 2), (messages.UNMASK, 2)])
def test_an_attempt_that_too_few_sites_are_left_for_is_made_anew(tmp_path: Path, step: str, paid: int) -> None:
    """With new keys, masks and noise. Who sent a masked vector pays again, because somebody may have unmasked it."""
    sites, failed = make_sites(tmp_path, min_sites=4), set()

    def wrap(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            name = name_of(context)
            if message.metadata.message_type == step and name in ("mid", "west") and name not in failed:
                failed.add(name)
                raise ConnectionError("gone for a while")
            return honest(message, context)

        return answer

    run = make_run(rounds=1, min_sites=4)
    run = run.model_copy(update={"cohort": run.cohort.model_copy(update={"patience_s": 0.0})})
    outcome, _ = federate(tmp_path / "run", sites, run, wrap=wrap)
    attempt = 1 if step == messages.UNMASK else 2
    # Before the last step five sites were enough for the threshold of three without the two.
    before = first_heads(run)
    update = compute_sum(sites, before, round_=1, counted=set(NAMES), attempt=attempt)
    assert is_moved(outcome, before, update)
    charges = {site.name: count_charges(site) for site in sites}
    if step == messages.UNMASK:
        assert set(charges.values()) == {1}
    else:
        assert charges == {name: 1 if name in ("mid", "west") else paid for name in NAMES}


def test_a_round_that_never_has_enough_sites_ends_the_run_and_can_be_resumed(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    with pytest.raises(RunInterrupted, match=r"round 1: expected updates of at least 3 site\(s\), got 2"):
        federate(tmp_path / "run", sites, make_run(), wrap=leave_before(messages.SUM_KEYS, ("east", "mid", "west")))
    assert [count_charges(site) for site in sites] == [0] * 5


def test_a_coordinator_that_died_asks_again_and_nobody_pays_twice(tmp_path: Path) -> None:
    """The same attempt with the same sites gets the same bytes: keys, shares, masked vectors, signatures."""
    sites, run = make_sites(tmp_path), make_run(rounds=1)
    with pytest.raises(KeyboardInterrupt):

        def kill(honest: Answer) -> Answer:
            def answer(message: Message, context: Context) -> Message:
                if message.metadata.message_type == messages.UNMASK:
                    raise KeyboardInterrupt
                return honest(message, context)

            return answer

        federate(tmp_path / "run", sites, run, wrap=kill)
    outcome, _ = federate(tmp_path / "run", sites, run)
    assert [count_charges(site) for site in sites] == [1] * 5
    before = first_heads(run)
    update = compute_sum(sites, before, round_=1, counted=set(NAMES))
    assert is_moved(outcome, before, update)


def test_a_coordinator_that_begins_anew_goes_on_after_attempts_it_does_not_know(tmp_path: Path) -> None:
    sites, run = make_sites(tmp_path), make_run(rounds=1)

    def skip_ahead(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            position = int(context.node_config["partition-id"])
            if message.metadata.message_type == messages.SUM_KEYS and position not in seen:
                seen.add(position)
                make_sum_keys(Site(sites[position], SeededEntropy(0)), messages.SumKeysRequest("run-1", 1, 12))
            return honest(message, context)

        seen: set[int] = set()
        return answer

    outcome, events = federate(tmp_path / "run", sites, run, wrap=skip_ahead)
    before = first_heads(run)
    # The twelfth has begun at every site and goes on with the keys that are there.
    assert is_moved(outcome, before, compute_sum(sites, before, round_=1, counted=set(NAMES), attempt=12))
    assert not select_events(events, SiteRejected)
    assert [count_charges(site) for site in sites] == [1] * 5


def test_a_site_with_another_roster_takes_no_part(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    assert sites[2].secure_sum is not None
    roster = {**sites[2].secure_sum.roster, "west": format_public_key(write_identity(tmp_path / "other.identity"))}
    sites[2] = sites[2].model_copy(update={"secure_sum": sites[2].secure_sum.model_copy(update={"roster": roster})})
    _, events = federate(tmp_path / "run", sites, make_run(rounds=1))
    (rejected,) = select_events(events, SiteRejected)
    assert rejected.site == "north" and "another roster" in rejected.reason
    assert [sorted(ended.sites) for ended in select_events(events, RoundEnded)] == [["east", "mid", "south", "west"]]


@pytest.mark.parametrize(
    "changes",
    [{"secure_sum": None}, {"min_sites": 4}, {"colluding": 1}],
    ids=["no section", "another K_min", "another t"],
)
def test_a_site_whose_file_says_something_else_does_not_join(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    sites = make_sites(tmp_path)
    section = sites[0].secure_sum
    assert section is not None
    sites[0] = sites[0].model_copy(
        update=dict(changes) if "secure_sum" in changes else {"secure_sum": section.model_copy(update=dict(changes))}
    )
    _, events = federate(tmp_path / "run", sites, make_run(rounds=1))
    assert ("east", "declined: trust", "join") in {
        (event.site, event.reason, event.stage) for event in select_events(events, SiteRejected)
    }


def test_a_site_without_all_tasks_does_not_join(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    only_size = {name: task for name, task in sites[0].tasks.items() if name == "size"}
    sites[0] = sites[0].model_copy(update={"tasks": only_size})
    _, events = federate(tmp_path / "run", sites, make_run(rounds=1))
    assert [event.reason for event in select_events(events, SiteRejected)] == ["declined: trust"]


def test_a_vector_that_no_plan_makes_possible_ends_the_run(tmp_path: Path) -> None:
    """A site that lies about its vector cannot be named, but the heads stay as they were."""

    def wrap(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            if message.metadata.message_type == messages.MASKED and name_of(context) == "mid":
                masked = messages.decode(reply.content, messages.MaskedReply)
                words = np.frombuffer(masked.masked, "<u8") + np.uint64(2**62)
                return Message(messages.encode(replace(masked, masked=words.tobytes())), reply_to=message)
            return reply

        return answer

    with pytest.raises(RunFailed, match="a secure sum does not tell"):
        federate(tmp_path / "run", make_sites(tmp_path), make_run(max_delta_norm=1e3), wrap=wrap)


def test_shares_that_are_none_end_the_run_however_long_an_update_may_be(tmp_path: Path) -> None:
    """Of wrong shares comes a sum that is uniform; divided by the units of large sites it would pass for an update."""

    def wrap(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            if message.metadata.message_type == messages.UNMASK and name_of(context) == "mid":
                revealed = messages.decode(reply.content, messages.UnmaskReply)
                wrong = {name: "00" * 33 for name in revealed.shares}
                return Message(messages.encode(replace(revealed, shares=wrong)), reply_to=message)
            return reply

        return answer

    with pytest.raises(RunFailed, match="expected a change of norm at most"):
        federate(tmp_path / "run", make_sites(tmp_path), make_run(max_delta_norm=1e30), wrap=wrap)


def test_a_site_that_spoils_an_attempt_does_not_make_all_others_pay_again(tmp_path: Path) -> None:
    def wrap(honest: Answer) -> Answer:
        def answer(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            if message.metadata.message_type == messages.MASKED and name_of(context) == "mid":
                masked = messages.decode(reply.content, messages.MaskedReply)
                return Message(messages.encode(replace(masked, masked=masked.masked[8:])), reply_to=message)
            return reply

        return answer

    sites = make_sites(tmp_path, min_sites=5)
    with pytest.raises(RunInterrupted, match="expected a masked vector of"):
        federate(tmp_path / "run", sites, make_run(min_sites=5), wrap=wrap)
    assert [count_charges(site) for site in sites] == [1] * 5


def test_a_robust_aggregation_is_refused_with_one_sentence() -> None:
    for settings in ({"kind": "median"}, {"kind": "krum", "byzantine": 1}, {"kind": "trimmed_mean", "trim": 1}):
        with pytest.raises(BadInput, match="needs only the sum of updates"):
            check_trust(make_run(aggregation=settings), "aggregation")
    for settings in ({"kind": "mean"}, {"kind": "fedadam", "learning_rate": 0.1}):
        check_trust(make_run(aggregation=settings), "aggregation")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colluding": None}, "colluding"),
        ({"colluding": 2}, "at least two sites beside the colluding ones"),
        ({"trust": None}, "expected none without"),
        ({"delta_precision": "float16"}, "delta_precision"),
        ({"privacy": "non_private"}, "privacy"),
        ({"cohort": {"min_sites": 3, "fraction": 0.5}}, "cohort.fraction"),
    ],
)
def test_a_run_file_that_contradicts_itself_is_refused(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make_run(**{"colluding": 0, **changes})


def test_an_offer_of_a_run_without_secure_sums_has_no_new_key() -> None:
    assert not {"trust", "colluding"} & set(run_config().model_dump())
