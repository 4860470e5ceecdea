"""The audit on the command line, and as a gate before a run's heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from common.events import SolverAudited, read_run_journal, select_events
from common.privacy.noise import SeededEntropy
from common.types import BadInput, RunFailed
from common.yaml import load
from server.reports.tables import render_summary
from simulations.__main__ import app
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.experiment import run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two sites with 30 vectors each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    vectors = rng.normal(size=(60, 3)).astype(np.float32) + labels[:, None]
    np.savez(tmp_path / "data.npz", x=vectors, y=np.array(["no", "yes"])[labels])
    values: dict[str, Any] = {
        "run": {
            "name": "gated",
            "seed": 1,
            "rounds": 2,
            "backbone": {"kind": "identity", "dim": 3},
            "tasks": {"answer": {"kind": "classification", "labels": ["no", "yes"]}},
            "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 4.0},
            "aggregation": {"kind": "mean"},
            "audit": "required",
        },
        "sources": {
            "rows": {"kind": "npz", "path": "data.npz", "parts": {"train": {"inputs": "x", "labels": {"y": "y"}}}}
        },
        "tasks": {"answer": {"source": "rows", "label": "y", "missing": "refuse", "public_size": 20}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.2},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    path = tmp_path / "sim.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_passed_audit_is_journalled_and_the_heads_are_exported(config: Path, tmp_path: Path) -> None:
    summary = run(config, out=tmp_path / "out", entropy=SeededEntropy(1))
    assert summary.status == "completed"
    assert (tmp_path / "out/model/heads/answer.safetensors").exists()
    audits = select_events(read_run_journal(tmp_path / "out/journal.jsonl"), SolverAudited)
    assert [event.verdict.passed for event in audits] == [True]
    audit = summary.audit
    assert audit.required and audit.passed and audit.reasons == ()
    assert audit.epsilon_claimed == pytest.approx(4.0, rel=1e-3)
    assert audit.noise_std_ratio == pytest.approx(1.0, abs=0.1)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_summary(summary))
    assert "audit: passed; epsilon 4.00 claimed, at least" in shown.get()


def test_a_failed_audit_trains_nothing_and_exports_no_head(config: Path, tmp_path: Path) -> None:
    """One key for every purpose: released noise is the same in eight rounds, which cannot pass by chance."""
    with pytest.raises(RunFailed, match="audit failed, so no head is exported: released noise"):
        run(config, out=tmp_path / "out", overrides=["run.rounds=8"], entropy=lambda purpose: bytes(32))
    assert not list((tmp_path / "out").rglob("heads/*.safetensors"))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["status"] == "failed" and summary["audit"]["passed"] is False
    assert "released noise" in summary["audit"]["reasons"][0]
    assert not list((tmp_path / "out").rglob("ledgers"))


def test_without_the_requirement_no_audit_runs(config: Path, tmp_path: Path) -> None:
    summary = run(config, out=tmp_path / "out", overrides=["run.audit=on_request"], entropy=lambda purpose: bytes(32))
    assert summary.status == "completed"
    assert '"audit"' not in (tmp_path / "out/journal.jsonl").read_text()
    assert summary.audit.required is False and summary.audit.passed is None


def test_a_run_without_privacy_cannot_require_an_audit(config: Path) -> None:
    solver = "{kind: sgd, sampling_rate: 1.0, steps: 2, learning_rate: 1.0}"
    overrides = ["run.privacy=non_private", f"run.solver={solver}"]
    with pytest.raises(BadInput, match="run.audit: expected a private run"):
        check_simulation(load(SimulationConfig, config, overrides))


def test_the_command_prints_only_json_with_its_stable_keys(config: Path) -> None:
    result = CliRunner().invoke(app, ["audit", str(config), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"] and found["reasons"] == []
    assert {"epsilon_claimed", "epsilon_lower_95", "epsilon_lower_99_9", "noise_std_ratio", "passed"} <= set(found)
    assert found["epsilon_claimed"] == pytest.approx(4.0, rel=1e-3)


def test_the_command_shows_a_table_and_refuses_bad_input_in_one_sentence(config: Path) -> None:
    shown = CliRunner().invoke(app, ["audit", str(config), "--set", "run.privacy.target_epsilon=2.0"])
    assert shown.exit_code == 0 and "audit: passed" in shown.stdout and "2.00" in shown.stdout
    refused = CliRunner().invoke(app, ["audit", str(config), "--set", "run.audit=sometimes"])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "run.audit" in refused.stderr
