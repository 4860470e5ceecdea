"""`headwater site install-service` through the real command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from common.process.console import read_verbs
from common.yaml import write_yaml
from tests.tiny import site_config


def install(folder: Path, **changes: object) -> dict[str, str]:
    """Returns the settings of the unit that is written for a site."""
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "site.yaml", site_config(folder, "north", **changes))
    out = folder / "unit.service"
    result = CliRunner().invoke(app, ["install-service", str(folder / "site.yaml"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "systemd-analyze:" not in result.output
    return dict(line.partition("=")[::2] for line in out.read_text().splitlines() if "=" in line)


def test_the_unit_starts_this_site_and_writes_to_its_folders_only(tmp_path: Path) -> None:
    settings = install(tmp_path, ledger_dir=tmp_path / "ledgers", cache_dir=tmp_path / "cache")
    _, flag, module, verb, file = shlex.split(settings["ExecStart"])
    assert (flag, module, file) == ("-m", "client", str(tmp_path / "site.yaml"))
    assert verb in read_verbs("client.commands")
    folders = settings["ReadWritePaths"].split()
    assert folders == [str(tmp_path / name) for name in ("north-state", "cache", "ledgers")]
    assert all(Path(folder).is_dir() for folder in folders)
    assert "Environment" not in settings


def test_the_unit_finds_the_ledgers_that_the_staffs_commands_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a shell's own variable says: the same budget twice would be the alternative."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    settings = install(tmp_path / "north", ledger_dir=None)
    assert settings["Environment"] == f"XDG_DATA_HOME={tmp_path}/data"
    assert str(tmp_path / "data" / "headwater" / "ledgers") in settings["ReadWritePaths"].split()
