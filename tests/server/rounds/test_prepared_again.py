"""What a site prepared is lost or damaged during a run: nothing is charged for it, it prepares again and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

from client.app import make_app
from client.config import SiteConfig
from client.protocol.site import Site
from common import messages
from common.events import (
    FileJournal,
    HeadsEvaluated,
    RoundEnded,
    RunEvent,
    SitePreparedAgain,
    SiteRejected,
    read_run_journal,
    select_events,
)
from common.privacy.noise import SeededEntropy, os_entropy
from common.types import heads_digest
from server.rounds.loop import Outcome, run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import backbone, run_config, site_config

Damage = Callable[[Path], None]
ROUNDS = 2


def flip(path: Path) -> None:
    """One bit of the last value: shape, size and everything else that can be seen cheaply stay."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Damage] = {"torn": tear, "gone": Path.unlink, "flipped": flip}
FILES = {
    "features": "features/*/features.npy",
    "notes": "features/*/about.json",
    "arrays": "runs/*/data/arrays.safetensors",
    "mark": "runs/*/prepared.json",
}


def sites_of(folder: Path) -> list[SiteConfig]:
    held_out = {"evaluation": {"share": 0.2, "evaluations": ROUNDS}, "split": {"test_fraction": 0.2, "salt": ""}}
    return [site_config(folder, name, **held_out) for name in ("east", "north")]


def federate(
    folder: Path, sites: list[SiteConfig], before: Callable[[str, int], None]
) -> tuple[Outcome, list[RunEvent]]:
    """Runs all rounds; `before` is called with a request's kind and round before north gets it."""
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0))

    def app(message: Message, context: Context) -> Message:
        if sites[int(context.node_config["partition-id"])].name == "north":
            before(message.metadata.message_type, int(message.metadata.group_id))
        return honest(message, context)

    folder.mkdir(parents=True)
    outcome = run_federation(
        InProcessGrid(app, len(sites)),
        run_config(rounds=ROUNDS, evaluation={"every": 1}),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    return outcome, read_run_journal(folder / "journal.jsonl")


def count_charges(site: SiteConfig) -> int:
    return len(Site(site, os_entropy).ledger().charges())


@pytest.fixture(scope="module")
def sound_heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sound")
    outcome, _ = federate(folder / "run-1", sites_of(folder), lambda asked, round_: None)
    return heads_digest(outcome.heads)


CASES = [
    *((messages.TRAIN, file, damage) for file in FILES for damage in DAMAGE if (file, damage) != ("mark", "flipped")),
    (messages.EVALUATE, "features", "torn"),
    (messages.EVALUATE, "arrays", "flipped"),
    (messages.FINISH, "mark", "gone"),
]


@pytest.mark.parametrize(("kind", "file", "damage"), CASES, ids=map("-".join, CASES))
def test_what_was_prepared_is_damaged_between_rounds_and_the_run_is_the_same(
    tmp_path: Path, sound_heads: str, kind: str, file: str, damage: str
) -> None:
    sites, left = sites_of(tmp_path), [DAMAGE[damage]]

    def before(asked: str, round_: int) -> None:
        if asked == kind and round_ in (0, 2) and left:
            (path,) = sites[1].state_dir.glob(FILES[file])
            left.pop()(path)

    outcome, events = federate(tmp_path / "run-1", sites, before)
    assert left == []
    assert select_events(events, SiteRejected) == []
    both = ["east", "north"]
    assert [sorted(event.sites) for event in select_events(events, RoundEnded)] == [both] * ROUNDS
    assert [sorted(event.noise_multipliers) for event in select_events(events, HeadsEvaluated)] == [both] * ROUNDS
    (again,) = select_events(events, SitePreparedAgain)
    assert (again.site, again.ready, again.round) == ("north", True, None if kind == messages.FINISH else 2)
    assert count_charges(sites[1]) == count_charges(sites[0]) == 2 * ROUNDS
    assert heads_digest(outcome.heads) == sound_heads


def test_a_site_that_loses_its_features_again_and_again_is_left_out_after_a_few_times(tmp_path: Path) -> None:
    """No round is charged without its features, however often they go; and the others are not held up for ever."""
    sites = sites_of(tmp_path)
    prepared = []

    def before(asked: str, round_: int) -> None:
        if asked == messages.PREPARE:
            prepared.append(round_)
        elif round_ and sites[1].state_dir.joinpath("features").exists():
            shutil.rmtree(sites[1].state_dir / "features")

    _, events = federate(tmp_path / "run-1", sites, before)
    assert [event.ready for event in select_events(events, SitePreparedAgain)] == [True] * 3
    assert len(prepared) == 4
    assert [list(event.sites) for event in select_events(events, RoundEnded)] == [["east"]] * ROUNDS
    assert count_charges(sites[1]) == 0


def test_a_site_that_cannot_prepare_again_misses_the_round_and_no_other_site_does(tmp_path: Path) -> None:
    sites = sites_of(tmp_path)

    def before(asked: str, round_: int) -> None:
        if asked == messages.TRAIN and round_ == 2:
            shutil.rmtree(sites[1].state_dir / "features")
            tear(tmp_path / "north.npz")

    _, events = federate(tmp_path / "run-1", sites, before)
    assert [event.ready for event in select_events(events, SitePreparedAgain)] == [False, False]
    assert [len(event.sites) for event in select_events(events, RoundEnded)] == [2, 1]
    assert count_charges(sites[1]) == 2
