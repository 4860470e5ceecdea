"""The coordinator keeps the newest witness of each site over runs, and shows a site its own alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message

from client.app import make_app
from common import messages
from common.events import FileJournal
from common.types import BadInput, LedgerWitness
from server.rounds.loop import run_federation
from server.rounds.witnesses import Witnesses
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import backbone, run_config, site_config

SOLVER = {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}


def witness(chain: str, length: int) -> LedgerWitness:
    return LedgerWitness(chain * 64, length, f"{length:064x}", "f" * 64)


def test_of_one_chain_the_longest_is_kept_and_another_chain_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "witnesses.json"
    kept = Witnesses(path)
    for received, expected in [
        (witness("a", 5), witness("a", 5)),
        (witness("a", 3), witness("a", 5)),
        (None, witness("a", 5)),
        (witness("a", 7), witness("a", 7)),
        (witness("b", 2), witness("b", 2)),
    ]:
        kept.keep({"north": received})
        assert kept.find("north") == Witnesses(path).find("north") == expected
    assert kept.find("east") is None


def test_two_runs_at_once_lose_nothing(tmp_path: Path) -> None:
    one, other = Witnesses(tmp_path / "w.json"), Witnesses(tmp_path / "w.json")
    one.keep({"north": witness("a", 5)})
    other.keep({"east": witness("b", 1)})
    one.keep({"east": witness("b", 2)})
    assert Witnesses(tmp_path / "w.json").find("north") == witness("a", 5)
    assert Witnesses(tmp_path / "w.json").find("east") == witness("b", 2)


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    kept = Witnesses(None)
    kept.keep({"north": witness("a", 5)})
    assert kept.find("north") is None


@pytest.mark.parametrize("text", ["", "[]", '{"north": 3}', '{"north": {"chain": "a"}}'])
def test_a_damaged_file_stops_the_run_and_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(BadInput, match=r"w\.json: expected the witnesses"):
        Witnesses(tmp_path / "w.json")


def test_each_site_is_shown_its_own_witness_in_every_offer_and_round(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    honest = make_app(lambda context: sites[int(context.node_config["partition-id"])])
    shown: list[tuple[str, str, LedgerWitness | None]] = []
    asked = {messages.JOIN: messages.JoinRequest, messages.TRAIN: messages.TrainRequest}

    def app(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind in asked:
            request = messages.decode(message.content, asked[kind])
            shown.append((kind, sites[int(context.node_config["partition-id"])].name, request.witness))  # type: ignore[attr-defined]
        return honest(message, context)

    for number in (1, 2):
        run_federation(
            InProcessGrid(app, 2),
            run_config(solver=SOLVER),
            {"backbone": backbone()},
            run_id=f"run-{number}",
            folder=tmp_path,
            journal=FileJournal(tmp_path / "journal.jsonl"),
            executor="in_process",
            node_ids={FIRST_NODE_ID: "east", FIRST_NODE_ID + 1: "north"},
            witnesses=tmp_path / "witnesses.json",
        )
    for name in ("east", "north"):
        lengths = [(kind, each and each.length) for kind, site, each in shown if site == name]
        # Created, then in each run: earmarked, twice reserved and committed, released. A reply tells of its charge's
        # reservation; what follows it is told by the next join's or round's reply.
        expected = [None, 2, 2 + 1, 2 + 3, 2 + 4 + 2, 2 + 4 + 2 + 1]
        assert lengths == [
            (kind, length)
            for kind, length in zip([messages.JOIN, messages.TRAIN, messages.TRAIN] * 2, expected, strict=True)
        ]
    chains = {name: {each.chain for _, site, each in shown if site == name and each} for name in ("east", "north")}
    assert [len(each) for each in chains.values()] == [1, 1] and chains["east"] != chains["north"]
