"""`headwater coordinator install-service` through the real command."""

from __future__ import annotations

import shlex
from pathlib import Path

from typer.testing import CliRunner

from common.process.console import read_verbs
from server.__main__ import app
from tests.server.deployment.federations import new_federation


def test_the_unit_serves_this_federation_and_writes_to_its_folder_only(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    out = tmp_path / "unit.service"
    result = CliRunner().invoke(app, ["install-service", str(federation.folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "systemd-analyze:" not in result.output
    unit = f"headwater-coordinator-{federation.config.name}.service"
    assert f"next: systemctl enable --now {unit}" in result.output
    settings = dict(line.partition("=")[::2] for line in out.read_text().splitlines() if "=" in line)
    assert settings["ReadWritePaths"] == str(federation.folder)
    _, flag, module, verb, folder = shlex.split(settings["ExecStart"])
    assert (flag, module, folder) == ("-m", "server", str(federation.folder))
    assert verb in read_verbs("server.commands")
    assert (Path(settings["WorkingDirectory"]) / "server" / "__main__.py").exists()
