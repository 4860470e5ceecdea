"""Texts are learned from three sites over TLS on loopback, by the commands that people type: dictations and letters."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
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
from simulations.public.pretrain import pretrain
from tests.federation import ROOT, environment, started, write_site
from tests.server.deployment.federations import new_federation
from tests.simulations.test_translation import make_config, write_pairs
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


def run_at_three_sites(folder: Path, run: dict[str, Any], sites: Mapping[str, dict[str, Any]]) -> tuple[Path, Path]:
    """Runs a run to its end at three sites; returns its folder and the first site's file.

    Args:
        folder: where all is written.
        run: settings of the run but for its name, seed and cohort.
        sites: site -> its sources and tasks.
    """
    federation = new_federation(folder / "fed")
    files: dict[str, Path] = {}
    for name, changes in sites.items():
        files[name] = write_site(
            folder / name,
            name,
            str(federation.config.address),
            federation.tls / "ca.crt",
            approval="automatic",
            **changes,
        )
        call("coordinator", "admit", federation.folder, name, "--key", folder / name / "keys" / f"{name}.pub")
    cohort = {"min_sites": 3, "timeout_s": 60, "join_timeout_s": 120}
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "texts", "seed": 3, "cohort": cohort, **run}))
    try:
        with ExitStack() as running:
            for name, file in files.items():
                running.enter_context(started(file, folder / f"{name}.log"))
            command = [sys.executable, "-m", "server", "start", str(federation.folder), str(folder / "run.yaml")]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        process = find_daemon_pid(federation)
        if process is not None:
            os.kill(process, signal.SIGKILL)
    (journal,) = federation.runs.glob("*/journal.jsonl")
    rounds = select_events(read_run_journal(journal), RoundEnded)
    assert [sorted(each.sites) for each in rounds] == [sorted(sites)] * run["rounds"]
    return journal.parent, next(iter(files.values()))


def test_translations_are_learned_in_the_words_of_three_houses(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    config = make_config(tmp_path)
    pretrain(config, lambda *_: None)
    texts, terms = tmp_path / "test.en", {"Knoten": "Schwellung"}
    sites = {}
    for number, name in enumerate(NAMES):
        for language in ("en", "de"):
            lines = (tmp_path / f"train.{language}").read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / f"{name}.{language}").write_text("".join(lines[20 * number : 20 * number + 20]))
        pairs = {key: {"train": f"{tmp_path}/{name}.{own}"} for key, own in (("source", "en"), ("target", "de"))}
        sites[name] = {
            "sources": {"letters": {"kind": "pairs", "terms": terms, **pairs}},
            "tasks": {"german": {"source": "letters", "label": "target", "missing": "refuse", "public_size": 20}},
        }
    run = {
        "rounds": 20,
        "backbone": config.run.backbone_specs["backbone"].model_dump(mode="json"),
        "tasks": {"german": {"kind": "seq2seq", "max_tokens": 20}},
        "solver": {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 0.3, "learning_rate": 1.0},
        "aggregation": {"kind": "heavy_ball", "rounds": 20, "step": 10.0, "most_momentum": 0.8, "noise": 0.0},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 90.0},
    }
    folder, _ = run_at_three_sites(tmp_path, run, sites)
    asked = [
        line for line in texts.read_text(encoding="utf-8").splitlines() if "tumour" in line and "edema" not in line
    ]
    (tmp_path / "new.tsv").write_text("text\n" + "".join(f"{line}\n" for line in asked), encoding="utf-8")
    call("predict", folder, "--data", tmp_path / "new.tsv", "--out", tmp_path / "new.csv")
    with (tmp_path / "new.csv").open(newline="", encoding="utf-8") as file:
        written = [row["german"] for row in csv.DictReader(file)]
    assert len(written) == len(asked) > 3
    # The public pairs have Knoten alone for it.
    assert sum("Schwellung" in text for text in written) > sum("Knoten" in text for text in written)


def test_transcripts_are_learned_from_three_hospitals_and_the_model_transcribes_at_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_network(tmp_path / "network")
    sites = {}
    for name in NAMES:
        write_dictations(tmp_path / f"{name}-speech", 30, rng)
        speech = {"kind": "audio", "path": str(tmp_path / f"{name}-speech"), "pattern": r"(?P<take>\d+)"}
        sites[name] = {
            "sources": {"speech": {**speech, "transcript": "text", "test": {"take": ["00", "01", "02", "03"]}}},
            "tasks": {"said": {"source": "speech", "label": "text", "missing": "refuse", "public_size": 26}},
        }
    run = {
        "rounds": 12,
        "backbone": {**BACKBONE, "folder": "network"},
        "tasks": {"said": TASK},
        "solver": {"kind": "auto"},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 90.0},
    }
    folder, east = run_at_three_sites(tmp_path, run, sites)
    # The coordinator's model on recordings of its own.
    texts = write_dictations(tmp_path / "new", 12, rng)
    call("predict", folder, "--data", tmp_path / "new", "--out", tmp_path / "new.csv")
    with (tmp_path / "new.csv").open(newline="", encoding="utf-8") as file:
        said = {row["file"]: row["said"] for row in csv.DictReader(file)}
    meant = [text.lower().replace(",", "").replace(".", "").split() for text in texts]
    edits = [count_edits(said[f"{number:02}.wav"].split(), words) for number, words in enumerate(meant)]
    assert sum(edits) < 0.4 * sum(map(len, meant))
    # Examples of a site's own records are on its own page alone.
    call("report", "--site", east, "--out", tmp_path / "own.html")
    page = (tmp_path / "own.html").read_text(encoding="utf-8")
    assert "This page must not leave the site" in page and "examples of 4 held-out records" in page
    rows = re.findall(r"<th[^>]*>(0\d\.wav)</th>\s*<td[^>]*>worst</td>\s*<td[^>]*>([a-z ]+)</td>", page)
    held_out = {name: (tmp_path / "east-speech" / f"{name[:2]}.txt").read_text() for name, _ in rows}
    assert len(rows) == 4
    assert all(words == held_out[name].lower().replace(",", "").rstrip(".") for name, words in rows)
    call("report", folder, "--out", tmp_path / "run.html")
    sent = (tmp_path / "run.html").read_text(encoding="utf-8") + (folder / "journal.jsonl").read_text()
    assert not any(words in sent for _, words in rows)
