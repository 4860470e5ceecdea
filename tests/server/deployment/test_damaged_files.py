"""A damaged, missing or misplaced file of a federation ends each command in at most one sentence, never a traceback."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.types import BadInput
from common.yaml import write_yaml
from server.__main__ import app
from server.deployment import admitted_sites
from server.deployment.federation import Federation
from server.deployment.preparation import prepare_run, write_prepared
from server.superlink.superlink import check_database
from tests.server.deployment.federations import new_federation, write_key_pair
from tests.tiny import run_config

RUN = "runs/tiny-20260101-000000-aaaa"
TARGETS = (
    *("sites.json", "federation.yaml", "run.yaml", "tls/ca.crt", "tls/ca.key", "tls/server.crt", "tls/server.key"),
    *("state/control.key", "state/commands.jsonl", "state/link.lock", f"{RUN}/config.yaml", f"{RUN}/journal.jsonl"),
)
HALF_A_LINE = b'{"time": 1.0, "event": "round", "rou'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a site, a key to admit and an interrupted run."""
    base = tmp_path_factory.mktemp("whole")
    federation = new_federation(base / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(base, "north"))
    write_key_pair(base / "fed", "south")
    folder = base / "fed" / RUN
    folder.mkdir()
    write_prepared(folder, prepare_run(federation, run_config()))
    write_yaml(folder / "config.yaml", run_config())
    return base / "fed"


@pytest.mark.parametrize("target", TARGETS)
def test_no_command_shows_a_traceback(whole: Path, tmp_path: Path, target: str) -> None:
    fed = tmp_path / "fed"
    commands = (["status"], ["admit", "south", "--key", "south.pub"], ["remove", "north"], ["kit", "--all"])
    for damage in (None, b"", b"\xff\x00{garbage", HALF_A_LINE, b"[1]", "folder"):
        for verb, *rest in (*commands, ["renew"], ["stop"], ["log"]):
            shutil.copytree(whole, fed)
            (fed / target).unlink(missing_ok=True)
            if isinstance(damage, bytes):
                (fed / target).write_bytes(damage)
            elif damage:
                (fed / target).mkdir()
            rest = [str(fed / word) if word.endswith(".pub") else word for word in rest]
            rest += ["--out", str(tmp_path)] if verb == "kit" else []
            done = CliRunner().invoke(app, [verb, str(fed), *rest])
            assert done.exception is None or isinstance(done.exception, SystemExit), (damage, verb, done.exception)
            errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
            assert len(errors) <= 1 and "Traceback" not in done.output, (damage, verb, done.output)
            assert errors or done.exit_code == 0 or verb == "status", (damage, verb, done.output)
            shutil.rmtree(fed)


def test_a_damaged_database_of_the_superlink_is_said_with_what_to_do(tmp_path: Path) -> None:
    federation: Federation = new_federation(tmp_path / "fed")
    path = federation.state / "superlink.db"
    check_database(federation)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (a TEXT)")
        database.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 100)
    database.close()
    check_database(federation)
    content = path.read_bytes()
    for damage in (b"garbage" * 500, content[: len(content) // 2]):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="remove it"):
            check_database(federation)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match="remove it"):
        check_database(federation)
