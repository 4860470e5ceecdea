"""Executors carry the same sequence: with noise and sampling injected, Ray makes the same heads to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

import simulations
from common.privacy.noise import SeededEntropy

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "simulations" / "demo.yaml"


@pytest.mark.slow
def test_ray_and_in_process_make_the_same_heads_to_the_bit(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from simulations.__main__ import app

    weights = f"run.backbone.weights={tmp_path / 'backbone.safetensors'}"
    common = [weights, "run.rounds=2", "baselines=[]", "expect={}", "run.solver.sampling_rate=0.5"]
    assert (
        CliRunner().invoke(app, ["pretrain", str(DEMO), "--set", weights, "--set", "pretrain.epochs=1"]).exit_code == 0
    )
    heads = {}
    for kind in ("in_process", "flower"):
        overrides = [*common, f"executor.kind={kind}", f"cache_dir={tmp_path / kind / 'cache'}"]
        summary = simulations.run(DEMO, overrides=overrides, out=tmp_path / kind / "run", entropy=SeededEntropy(5))
        assert summary["status"] == "completed" and summary["executor"] == kind
        heads[kind] = {
            path.name: {name: array.tobytes() for name, array in load_file(path).items()}
            for path in (tmp_path / kind / "run" / "heads").iterdir()
        }
    assert heads["in_process"] == heads["flower"]
