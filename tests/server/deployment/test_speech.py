"""Three hospitals that dictate: transcripts are learned over TLS on loopback, by the commands that people type."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from common.events import RoundEnded, read_run_journal, select_events
from common.tasks.parts.transcripts.symbols import count_edits
from headwater.__main__ import make_app
from server.superlink.daemon import find_daemon_pid
from tests.federation import ROOT, environment, started, write_site
from tests.server.deployment.federations import new_federation
from tests.spoken import BACKBONE, TASK, TONES, say, write_network, write_wav

pytestmark = pytest.mark.slow

NAMES = ("east", "north", "west")


def call(*words: object) -> None:
    """Runs a command of `headwater` in this process: starting Python for each would take most of the time."""
    done = CliRunner().invoke(make_app(), list(map(str, words)))
    assert done.exit_code == 0, done.output


def write_dictations(folder: Path, count: int, rng: np.random.Generator) -> list[str]:
    """Writes recordings with a text file beside each, and returns the texts; of the last nobody says anything."""
    folder.mkdir()
    texts = []
    for number in range(count):
        words = rng.choice(list(TONES), size=rng.integers(2, 4)).tolist()
        write_wav(folder / f"{number:02}.wav", say(words, rng.uniform(0.1, 0.4), rng))
        texts.append(f"{', '.join(words).capitalize()}.")
        (folder / f"{number:02}.txt").write_text(texts[-1], encoding="utf-8")
    return texts


def test_transcripts_are_learned_from_three_hospitals_and_the_model_transcribes_at_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_network(tmp_path / "network")
    federation = new_federation(tmp_path / "fed")
    files: dict[str, Path] = {}
    for name in NAMES:
        write_dictations(tmp_path / f"{name}-speech", 30, rng)
        speech = {"kind": "audio", "path": str(tmp_path / f"{name}-speech"), "pattern": r"(?P<take>\d+)"}
        changes: dict[str, Any] = {
            "approval": "automatic",
            "sources": {"speech": {**speech, "transcript": "text", "test": {"take": ["00", "01", "02", "03"]}}},
            "tasks": {"said": {"source": "speech", "label": "text", "missing": "refuse", "public_size": 26}},
        }
        files[name] = write_site(
            tmp_path / name, name, str(federation.config.address), federation.tls / "ca.crt", **changes
        )
        call("coordinator", "admit", federation.folder, name, "--key", tmp_path / name / "keys" / f"{name}.pub")
    run = {
        "name": "dictations",
        "seed": 3,
        "rounds": 12,
        "backbone": {**BACKBONE, "folder": "network"},
        "tasks": {"said": TASK},
        "solver": {"kind": "auto"},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 90.0},
        "cohort": {"min_sites": 3, "timeout_s": 60, "join_timeout_s": 120},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    try:
        with ExitStack() as sites:
            for name in NAMES:
                sites.enter_context(started(files[name], tmp_path / f"{name}.log"))
            command = [sys.executable, "-m", "server", "start", str(federation.folder), str(tmp_path / "run.yaml")]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        process = find_daemon_pid(federation)
        if process is not None:
            os.kill(process, signal.SIGKILL)
    (journal,) = federation.runs.glob("*/journal.jsonl")
    rounds = select_events(read_run_journal(journal), RoundEnded)
    assert [sorted(each.sites) for each in rounds] == [list(NAMES)] * 12
    # The coordinator's model on recordings of its own.
    texts = write_dictations(tmp_path / "new", 12, rng)
    call("predict", journal.parent, "--data", tmp_path / "new", "--out", tmp_path / "new.csv")
    with (tmp_path / "new.csv").open(newline="", encoding="utf-8") as file:
        said = {row["file"]: row["said"] for row in csv.DictReader(file)}
    meant = [text.lower().replace(",", "").replace(".", "").split() for text in texts]
    edits = [count_edits(said[f"{number:02}.wav"].split(), words) for number, words in enumerate(meant)]
    assert sum(edits) < 0.4 * sum(map(len, meant))
    # Examples of a site's own records are on its own page alone.
    call("report", "--site", files["east"], "--out", tmp_path / "own.html")
    page = (tmp_path / "own.html").read_text(encoding="utf-8")
    assert "This page must not leave the site" in page and "examples of 4 held-out records" in page
    rows = re.findall(r"<th[^>]*>(0\d\.wav)</th>\s*<td[^>]*>worst</td>\s*<td[^>]*>([a-z ]+)</td>", page)
    held_out = {name: (tmp_path / "east-speech" / f"{name[:2]}.txt").read_text() for name, _ in rows}
    assert len(rows) == 4
    assert all(words == held_out[name].lower().replace(",", "").rstrip(".") for name, words in rows)
    call("report", journal.parent, "--out", tmp_path / "run.html")
    sent = (tmp_path / "run.html").read_text(encoding="utf-8") + journal.read_text(encoding="utf-8")
    assert not any(words in sent for _, words in rows)
