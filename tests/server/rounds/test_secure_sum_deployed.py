"""Real sites over TLS sum securely, one of them killed in the middle of an attempt and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from client.ledger.ledger import Ledger
from common.events import RoundEnded, read_run_journal, select_events
from common.secure_sum.identity import format_public_key, write_identity
from common.yaml import write_yaml
from server.superlink.daemon import find_daemon_pid
from tests.federation import ROOT, environment, started, write_site
from tests.server.deployment.federations import new_federation
from tests.tiny import run_config

pytestmark = pytest.mark.slow

NAMES = ("east", "north", "west")


def call_server(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *map(str, words)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_deployed_sites_sum_securely_also_when_one_is_killed_between_two_steps(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    roster = {name: format_public_key(write_identity(tmp_path / f"{name}.identity")) for name in NAMES}
    files: dict[str, Path] = {}
    for name in NAMES:
        section = {"identity": str(tmp_path / f"{name}.identity"), "roster": roster, "min_sites": 3, "colluding": 0}
        changes: dict[str, Any] = {"approval": "automatic", "secure_sum": section}
        address, ca = str(federation.config.address), federation.tls / "ca.crt"
        files[name] = write_site(tmp_path / name, name, address, ca, **changes)
        done = call_server("admit", federation.folder, name, "--key", tmp_path / name / "keys" / f"{name}.pub")
        assert done.returncode == 0, done.stderr
    run = run_config(
        trust="secure_sum",
        colluding=0,
        rounds=2,
        solver={"kind": "head_sum", "clip_norm": 1.0},
        cohort={"min_sites": 3, "timeout_s": 60, "join_timeout_s": 120, "patience_s": 60},
    )
    write_yaml(tmp_path / "run.yaml", run)
    command = [sys.executable, "-m", "server", "start", str(federation.folder), str(tmp_path / "run.yaml")]
    try:
        with ExitStack() as sites:
            children = {name: sites.enter_context(started(files[name], tmp_path / f"{name}.log")) for name in NAMES}
            with (tmp_path / "run.log").open("wb") as log:
                running = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
            west = tmp_path / "west.log"
            until = time.monotonic() + 200
            # It has its keys, and the others' shares may be on their way.
            while "asked: sum_keys" not in west.read_text(errors="replace") and time.monotonic() < until:
                time.sleep(0.05)
            os.killpg(children["west"].pid, signal.SIGKILL)
            children["west"].wait(30)
            sites.enter_context(started(files["west"], tmp_path / "west-again.log"))
            assert running.wait(240) == 0, (tmp_path / "run.log").read_text()
    finally:
        call_server("stop", federation.folder)
        process = find_daemon_pid(federation)
        if process is not None:
            os.kill(process, signal.SIGKILL)
    (journal,) = federation.runs.glob("*/journal.jsonl")
    rounds = select_events(read_run_journal(journal), RoundEnded)
    assert [(each.round, sorted(each.sites)) for each in rounds] == [(number, list(NAMES)) for number in (1, 2)]
    for name in NAMES:
        ledger = Ledger.find(tmp_path / name / "state" / "ledgers", f"{name}-registry")
        assert ledger is not None
        charges = ledger.charges()
        assert {charge.mechanism.min_sites for charge in charges} == {3}
        assert {charge.round for charge in charges if charge.committed} == {1, 2}
        assert len(charges) <= 3  # One more where the kill came between a charge and its stored reply.
