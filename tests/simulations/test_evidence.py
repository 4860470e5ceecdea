"""A simulation's evidence: every site's ledger, and attacks on the units of all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.exports.parts.evidence import write_evidence
from common.privacy.noise import SeededEntropy
from common.types import BadInput
from server.reports.evidence import NO_RECORDS, SUMMARY, collect_run_evidence
from simulations.evidence import collect_simulation_evidence, is_simulation
from simulations.experiment import run


def ignore(phase: str, done: int, total: int) -> None:
    del phase, done, total


@pytest.fixture
def ended(simulation_file: Path, tmp_path: Path) -> Path:
    """The folder of a run that ended."""
    overrides = ["partition.split=hash", "partition.test_fraction=0.3"]
    run(simulation_file, out=tmp_path / "out", overrides=overrides, entropy=SeededEntropy(1))
    return tmp_path / "out"


def test_a_simulator_states_all_ledgers_and_a_coordinator_its_summary(ended: Path, tmp_path: Path) -> None:
    assert is_simulation(ended) and is_simulation(ended / "model")
    found = collect_simulation_evidence(ended, attack=True, observe=ignore, entropy=SeededEntropy(2))
    summary = json.loads((ended / "summary.json").read_text())
    assert [each.site for each in found.statements] == ["site-1", "site-2", "site-3"]
    for each in found.statements:
        assert each.epsilon == summary["sites"][each.site]["epsilon"]
        assert (each.budget, each.before, each.filter) == (10.0, 0.0, "gdp")
    assert found.attacks is not None
    for outcome in found.attacks:
        assert outcome.num_members + outcome.num_others == 180, "the units of all sites"
        assert outcome.auc_bound is not None and outcome.auc_bound < 1.0 and not outcome.contradicts
    write_evidence(found, tmp_path / "evidence")
    assert (tmp_path / "evidence" / "config.yaml").read_bytes() == (ended / "config.yaml").read_bytes()
    text = (tmp_path / "evidence" / "evidence.md").read_text()
    assert "**3 sites: site-1 (population site-1-registry), site-2" in text
    assert "**metrics computed without noise**" in text

    own = collect_run_evidence(ended / "model")
    assert own.attacks is None and own.attack_note == NO_RECORDS
    for each, ledgers in zip(own.statements, found.statements, strict=True):
        assert (each.source, each.releases, each.epsilon) == (SUMMARY, ledgers.releases, ledgers.epsilon)
        assert (each.before, each.now) == (None, None)


def test_a_run_without_its_ledgers_or_its_end_is_refused(ended: Path) -> None:
    moved = ended.rename(ended.with_name("moved"))
    with pytest.raises(BadInput, match="expected the ledgers of the sites that took part, found none"):
        collect_simulation_evidence(moved, attack=False, observe=ignore)
    summary = json.loads((moved / "summary.json").read_text())
    (moved / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    with pytest.raises(BadInput, match="expected a run that ended, got one that is interrupted"):
        collect_run_evidence(moved)
    (moved / "summary.json").unlink()
    with pytest.raises(BadInput, match="found a model without it; at a site name its file with --site"):
        collect_run_evidence(moved)
    shutil.rmtree(moved / "model")
    with pytest.raises(BadInput, match="it failed, or has not ended yet"):
        collect_run_evidence(moved)
