"""What a person sees of a run and of a federation: views of the journal, the admitted sites and the node ids."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from common.events import FileJournal
from common.types import BadInput, RunFailed
from common.yaml import write_yaml
from server.__main__ import _finish
from server.deployment import admitted_sites
from server.reports.status_table import status_table
from server.superlink import operate
from server.superlink.control import RunState
from server.superlink.node_ids import NodeIds
from server.superlink.queue import find_interrupted_run
from server.superlink.watch import in_words
from tests import tiny
from tests.server.deployment.federations import new_federation, write_key_pair


def write_node_ids(path: Path, names: dict[str, str]) -> None:
    path.write_text(json.dumps(names))
    time.sleep(0.02)  # A file system's clock is coarse.


def test_a_round_names_its_sites_and_the_tasks_that_stayed_as_they_were() -> None:
    fact = {
        "event": "round",
        "sites": {"north": {}, "south": {}},
        "tasks": {"digit": 2, "loop": 1},
        "updated": ["digit"],
        "round": 3,
        "seconds": 1.25,
    }
    assert in_words(fact, 10) == (
        "round 3 of 10: north, south; replies: digit 2, loop 1; not enough for loop, kept as it was; 1.2 s"
    )


def test_a_site_that_is_set_aside_is_shown_with_its_reason() -> None:
    fact = {"event": "set_aside", "site": "north", "reason": "declined: budget", "at": "train", "round": 2}
    assert in_words(fact, 10) == "north set aside at train: declined: budget"
    assert in_words({"event": "replies", "nodes": [1]}, 10) is None


def test_the_node_ids_follow_their_file_and_forget_no_name(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    write_node_ids(path, {"18446744073709551615": "north"})
    node_ids = NodeIds(path)
    assert dict(node_ids) == {18446744073709551615: "north"}
    write_node_ids(path, {"7": "south"})
    assert dict(node_ids) == {7: "south"}
    assert 18446744073709551615 not in node_ids and len(node_ids) == 1
    assert node_ids[18446744073709551615] == "north"


def test_status_counts_replies_and_continues_over_a_resumed_run(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    folder = federation.runs / "tiny-1"
    folder.mkdir()
    write_yaml(folder / "config.yaml", tiny.run_config())
    journal = FileJournal(folder / "journal.jsonl")
    journal.write("run_started", run_id="tiny-1", rounds=4)
    journal.write("joined", site="north")
    journal.write("round", round=1, sites={"north": {}})
    journal.write("run_failed", reason="killed")
    journal.write("run_started", run_id="tiny-1", rounds=4)
    journal.write("round", round=2, sites={})
    found = operate.status(federation)
    assert found["run"] == {
        "id": "tiny-1",
        "state": "not ended",
        "under_way": False,
        "round": 2,
        "rounds": 4,
        "replies": {"north": 1},
    }
    console = Console(width=100)
    with console.capture() as capture:
        console.print(status_table(found))
    shown = capture.get()
    assert "round 2 of 4, not ended" in shown and "not running" in shown and "north" in shown


def test_the_newest_run_is_the_one_to_resume_and_an_older_one_only_by_its_name(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    for name, event in (("a", "round"), ("b", "round")):
        (federation.runs / name).mkdir()
        write_yaml(federation.runs / name / "config.yaml", tiny.run_config())
        FileJournal(federation.runs / name / "journal.jsonl").write(event)
        time.sleep(0.02)
    assert find_interrupted_run(federation, None).name == "b"
    FileJournal(federation.runs / "b" / "journal.jsonl").write("run_ended")
    with pytest.raises(BadInput, match="got b, which is complete"):
        find_interrupted_run(federation, None)
    assert find_interrupted_run(federation, "a").name == "a"


def test_a_run_whose_process_died_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "fed" / "runs" / "hearts-1"
    path.mkdir(parents=True)
    FileJournal(path / "journal.jsonl").write("round", round=1)
    with pytest.raises(RunFailed, match=f"no heartbeat; `python -m server resume {tmp_path}/fed hearts-1` continues"):
        _finish(path, RunState(1, str(path), True, "failed", "no heartbeat"))
