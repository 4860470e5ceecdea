"""`headwater site identity`, `check` and `approve`: what a site's staff see of secure sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from client.__main__ import app
from common.offers import Offer
from common.secure_sum.identity import format_public_key, read_identity, write_identity
from common.yaml import write_yaml
from tests.tiny import backbone, offered, run_config, site_config


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def make_site(folder: Path, **changes: Any) -> Path:
    """Returns the file of a site with an identity key and a roster of three."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("east", "north", "west")
    roster = {name: format_public_key(write_identity(folder / f"{name}.identity")) for name in names}
    section = {"identity": str(folder / "north.identity"), "roster": roster, "min_sites": 3, "colluding": 1}
    path = folder / "site.yaml"
    write_yaml(path, site_config(folder, "north", **{"secure_sum": section, **changes}))
    return path


def make_offer(folder: Path) -> Path:
    """Returns the file of an offer of secure sums."""
    run = run_config(
        trust="secure_sum", colluding=1, cohort={"min_sites": 3}, solver={"kind": "head_sum", "clip_norm": 1.0}
    )
    request = offered("run-1", run, backbone())
    path = folder / "tiny.json"
    path.write_bytes(Offer(request.run, request.backbones).to_bytes())
    return path


def test_a_key_is_made_once_and_its_public_part_printed(tmp_path: Path) -> None:
    first, second = call("identity", tmp_path / "identity"), call("identity", tmp_path / "identity")
    assert first.exit_code == second.exit_code == 0
    assert first.output == second.output
    assert format_public_key(read_identity(tmp_path / "identity")) in first.output
    (tmp_path / "identity").chmod(0o644)
    refused = call("identity", tmp_path / "identity")
    assert refused.exit_code == 2 and "chmod 600" in refused.output


def test_check_says_whether_the_roster_has_this_sites_key(tmp_path: Path) -> None:
    path = make_site(tmp_path)
    (line,) = [line for line in call("check", path, "--offline").output.splitlines() if "secure sum" in line]
    assert "at least 3 of 3 sites, 1 may collude" in line
    (tmp_path / "north.identity").unlink()
    write_identity(tmp_path / "north.identity")
    assert "expected the public key of secure_sum.identity" in " ".join(call("check", path, "--offline").output.split())


def test_approve_says_what_the_coordinator_sees(tmp_path: Path) -> None:
    done = call("approve", make_site(tmp_path), make_offer(tmp_path))
    assert done.exit_code == 0, done.output
    assert "only the sum of at least 3 sites, of which 1 may collude" in done.output


def test_a_run_that_would_be_declined_is_no_surprise(tmp_path: Path) -> None:
    write_yaml(tmp_path / "run.yaml", run_config(trust="secure_sum", colluding=1, cohort={"min_sites": 3}))
    planned = call("plan", make_site(tmp_path), tmp_path / "run.yaml")
    assert "solver dp_sgd cannot be summed securely" in " ".join(planned.output.split())
    bare = make_site(tmp_path / "bare", secure_sum=None)
    assert "has no `secure_sum`" in " ".join(call("plan", bare, tmp_path / "run.yaml").output.split())
