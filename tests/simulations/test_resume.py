"""A run whose process died continues from its last whole round: the same heads, and no charge twice or forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger.ledger import Ledger
from client.protocol.site import Site
from common.privacy.noise import SeededEntropy, os_entropy
from common.types import BadInput
from server.rounds.checkpoint import load_checkpoint
from simulations.experiment import resume, run
from simulations.partition import read_sites

ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    """Stands for the process's death."""


def interrupt_after(rounds: int):  # type: ignore[no-untyped-def]
    def observe(phase: str, done: int, total: int) -> None:
        if phase == "rounds" and done == rounds:
            raise Interrupted

    return observe


def ledgers(folder: Path) -> list[Ledger]:
    return [Site(site, os_entropy).ledger() for site in read_sites(folder / "sites")]


def test_a_resumed_run_makes_the_heads_of_an_uninterrupted_one(simulation_file: Path, tmp_path: Path) -> None:
    whole = run(simulation_file, out=tmp_path / "whole" / "run", entropy=SeededEntropy(1))
    with pytest.raises(Interrupted):
        run(simulation_file, out=tmp_path / "cut" / "run", entropy=SeededEntropy(1), observe=interrupt_after(2))
    spent = [ledger.spent().spent_epsilon for ledger in ledgers(tmp_path / "cut" / "run")]
    summary = resume(tmp_path / "cut" / "run", entropy=SeededEntropy(1))
    assert summary.status == "completed"
    assert summary.rounds == whole.rounds == 3
    heads = {
        name: load_checkpoint(tmp_path / name / "run" / "checkpoint.safetensors").heads for name in ("whole", "cut")
    }
    for name, array in heads["whole"]["colour"].items():
        assert array.tobytes() == heads["cut"]["colour"][name].tobytes()
    after = [ledger.spent().spent_epsilon for ledger in ledgers(tmp_path / "cut" / "run")]
    assert all(later > earlier > 0 for earlier, later in zip(spent, after, strict=True))
    assert after == [ledger.spent().spent_epsilon for ledger in ledgers(tmp_path / "whole" / "run")]


def test_a_round_done_again_evaluates_again_for_nothing(simulation_file: Path, tmp_path: Path) -> None:
    """The process dies after the sites were asked and before the checkpoint: stored replies answer a second time."""
    overrides = ["run.evaluation={every: 1}", "evaluation={share: 0.2, evaluations: 3}"]
    whole = run(simulation_file, out=tmp_path / "whole" / "run", overrides=overrides, entropy=SeededEntropy(1))
    out = tmp_path / "cut" / "run"
    checkpoint = out / "checkpoint.safetensors"
    kept: list[bytes] = []

    def observe(phase: str, done: int, total: int) -> None:
        if phase == "rounds" and done == 1:
            kept.append(checkpoint.read_bytes())
        if phase == "rounds" and done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(simulation_file, out=out, overrides=overrides, entropy=SeededEntropy(1), observe=observe)
    checkpoint.write_bytes(kept[0])  # As if round 2 had never reached it.
    summary = resume(out, entropy=SeededEntropy(1))
    assert summary.tasks["colour"].evaluation == whole.tasks["colour"].evaluation
    for ledger, other in zip(ledgers(out), ledgers(tmp_path / "whole" / "run"), strict=True):
        assert [charge.purpose for charge in ledger.charges()] == ["training", "evaluation"] * 3
        assert ledger.spent() == other.spent()


def test_a_run_that_ended_is_not_resumed(simulation_file: Path, tmp_path: Path) -> None:
    run(simulation_file, out=tmp_path / "run")
    with pytest.raises(BadInput, match="has ended"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("phase", ["rounds", "baseline local"])
def test_a_run_that_died_after_its_last_round_is_completed(simulation_file: Path, tmp_path: Path, phase: str) -> None:
    def observe(name: str, done: int, total: int) -> None:
        if name == phase and (done == total or name != "rounds"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(simulation_file, out=tmp_path / "run", overrides=["baselines=[local]"], observe=observe)
    summary = resume(tmp_path / "run")
    assert summary.status == "completed"
    assert summary.tasks["colour"].updates == 3
    assert summary.tasks["colour"].metrics and summary.tasks["colour"].baselines["local"]


def test_a_run_is_resumed_from_whatever_folder_it_was_put_in(simulation_file: Path, tmp_path: Path) -> None:
    """The baseline opens the sources again: their paths were relative to the simulation's file, not to the run."""

    def observe(name: str, done: int, total: int) -> None:
        if name == "baseline non_private":
            raise Interrupted

    sgd = "non_private_solver={kind: sgd, sampling_rate: 1.0, steps: 5, learning_rate: 1.0}"
    out = tmp_path / "far" / "away" / "from" / "it"
    with pytest.raises(Interrupted):
        run(simulation_file, out=out, overrides=["baselines=[non_private]", sgd], observe=observe)
    assert resume(out).tasks["colour"].baselines["non_private"]["accuracy"] > 0.7


def test_another_runs_checkpoint_is_not_resumed(simulation_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with pytest.raises(Interrupted):
            run(simulation_file, out=tmp_path / name, observe=interrupt_after(2))
    (tmp_path / "one" / "checkpoint.safetensors").replace(tmp_path / "two" / "checkpoint.safetensors")
    with pytest.raises(BadInput, match="expected a checkpoint of this run"):
        resume(tmp_path / "two")


DIES = """
import os, signal, sys
from client.data.encoding import partial
from simulations.experiment import run

partial.BLOCK_S = 0.0

def observe(phase, done, total):
    if phase == "encoding":
        print(done, total, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

run(sys.argv[1], out=__import__("pathlib").Path(sys.argv[2]), observe=observe)
"""


def test_a_simulation_that_is_killed_while_it_encodes_goes_on_there(simulation_file: Path, tmp_path: Path) -> None:
    died = subprocess.run(
        [sys.executable, "-c", DIES, simulation_file, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True
    )
    assert died.returncode == -9, died.stderr
    begun, total = map(int, died.stdout.split())
    assert 0 < begun < total == 180
    told: list[tuple[int, int]] = []
    summary = resume(
        tmp_path / "run", observe=lambda phase, *steps: told.append(steps) if phase == "encoding" else None
    )
    assert summary.status == "completed"
    assert told[0] == (begun, total), "it goes on where it was"
    run(simulation_file, out=tmp_path / "whole", overrides=["cache_dir=other"])
    (cut,), (whole,) = (list((tmp_path / name).glob("features/*/features.npy")) for name in ("cache", "other"))
    assert cut.read_bytes() == whole.read_bytes() and cut.parent.name == whole.parent.name
