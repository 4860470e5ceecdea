"""A round on cached features must not pay for libraries it does not use: seconds of imports in every new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.protocol.join import join
from client.protocol.site import Site
from common import messages
from common.model.parameters import parameters
from common.plugins import kinds
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import Heads
from common.yaml import write_yaml
from tests.tiny import DIM, backbone, give_backbone, offered, run_config, site_config

ROOT = Path(__file__).resolve().parents[3]
HEAVY = (
    "opacus",
    "ray",
    "torchvision",
    "transformers",
    "pandas",
    "pyarrow",
    "sklearn",
    "torchmetrics",
    "PIL",
    "scipy.stats",
    "scipy.signal",
)
IN_A_NEW_PROCESS = """
import json, sys
from pathlib import Path
import client.app
from client.protocol.train import train
from client.protocol.site import Site
from common import messages
from client.config import SiteConfig
from common.yaml import load
from common.privacy.noise import os_entropy
from common.tasks import open_task
site = Site(load(SiteConfig, Path(sys.argv[1])), os_entropy)
reply = train(site, messages.decode(messages.from_bytes(Path(sys.argv[2]).read_bytes()), messages.TrainRequest))
print(json.dumps({"modules": sorted(sys.modules), "records": sorted(reply)}))
"""
SGD = {"kind": "sgd", "sampling_rate": 1.0, "steps": 2, "learning_rate": 1.0}
CLOSED_FORM = {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0}
PRIVATE = {"unit": "example", "delta": 1e-5, "noise_multiplier": 2.0}


def fresh_round(tmp_path: Path, solver: dict[str, object], privacy: object) -> dict[str, list[str]]:
    """What a first train request loads in a process of its own, the run being joined and prepared by another."""
    allow = {"tasks": "any", "backbones": "any", "solvers": "any", "non_private": True}
    config = site_config(tmp_path, "site-1", allow=allow)
    write_yaml(tmp_path / "site.yaml", config)
    run, frozen = run_config(solver=solver, privacy=privacy), backbone()
    site = Site(config, os_entropy)
    join(site, offered("run-1", run, frozen))
    give_backbone(site, "run-1", frozen)
    request = messages.TrainRequest("run-1", 1, zero_heads())
    (tmp_path / "request").write_bytes(messages.to_bytes(messages.encode(request)))
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "site.yaml"), str(tmp_path / "request")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def zero_heads() -> Heads:
    return {name: parameters(open_task(spec, name).head(DIM)) for name, spec in run_config().tasks.items()}


@pytest.mark.parametrize(("solver", "privacy"), [(SGD, "non_private"), (CLOSED_FORM, PRIVATE)], ids=["sgd", "dp_gd"])
def test_a_round_of_linear_heads_on_cached_features_loads_no_library_it_does_not_use(
    tmp_path: Path, solver: dict[str, object], privacy: object
) -> None:
    if solver["kind"] not in kinds("client.solvers"):
        pytest.skip(f"this installation has no solver {solver['kind']}")
    found = fresh_round(tmp_path, solver, privacy)
    assert found["records"] == ["heads", "public"]
    assert [name for name in HEAVY if name in found["modules"]] == []


def test_a_waiting_site_holds_no_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["client", "start", "none.yaml"]
try:
    runpy.run_module("client", run_name="__main__")
except SystemExit:
    pass
import client.connection.node
print([name for name in ("torch", "scipy", "pandas") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
    assert "none.yaml" in done.stderr  # It was the real verb.
