"""The text of a systemd unit, read by systemd's own tool where it is installed, and the file that it is written to."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.process.service import Service, install_service, make_unit
from common.types import BadInput

ODD = "a b %d $HOME"
"""Characters with a meaning in a unit."""


def new_service(folder: Path, **changes: Any) -> Service:
    values: dict[str, Any] = {
        "side": "site",
        "name": "north",
        "command": (make_program(folder / "run"), "start", str(folder / "site.yaml")),
        "owner": os.getuid(),
        "writable": (folder / "state",),
        "restart_s": 60,
        "stop_s": 90,
    }
    return Service(**values | changes)


def make_program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def verify(text: str, folder: Path, user: bool) -> str:
    """Returns what systemd says against a unit."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    path = folder / "tried.service"
    path.write_text(text)
    command: Sequence[str] = ["systemd-analyze", *(["--user"] if user else []), "--man=no", "verify", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stderr


@pytest.mark.parametrize("user", [False, True], ids=["system", "user"])
def test_systemd_accepts_the_unit_also_with_odd_paths(tmp_path: Path, user: bool) -> None:
    folder = tmp_path / ODD
    service = new_service(folder, environment={"XDG_DATA_HOME": str(folder)}, port=443)
    assert "tried.service" not in verify(make_unit(service, user=user), tmp_path, user)


def test_systemd_does_not_accept_a_program_that_is_missing(tmp_path: Path) -> None:
    """Otherwise the test above would see nothing."""
    service = new_service(tmp_path, command=(str(tmp_path / "none"),))
    assert "tried.service" in verify(make_unit(service, user=False), tmp_path, False)


def test_a_unit_of_the_system_is_confined_to_its_folders(tmp_path: Path) -> None:
    lines = make_unit(new_service(tmp_path), user=False).splitlines()
    for line in (
        "NoNewPrivileges=true",
        "ProtectSystem=strict",
        f"ReadWritePaths={tmp_path}/state",
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "Restart=on-failure",
        "RestartPreventExitStatus=2",
        "TimeoutStopSec=90",
        "WantedBy=multi-user.target",
    ):
        assert line in lines
    assert any(line.startswith("User=") for line in lines)
    # Each of them would hide a GPU.
    assert not [line for line in lines if line.startswith(("PrivateDevices", "ProtectClock", "DevicePolicy"))]


def test_only_a_port_below_1024_brings_a_right(tmp_path: Path) -> None:
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE\n" in make_unit(new_service(tmp_path, port=443), user=False)
    assert "CAP_" not in make_unit(new_service(tmp_path, port=1024), user=False)


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b", "a\nb"])
def test_a_path_that_a_unit_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="quotes, backslashes and line breaks"):
        make_unit(new_service(tmp_path, command=("/bin/true", name)), user=False)


def test_the_file_is_written_anew_and_says_what_to_run(tmp_path: Path) -> None:
    out = tmp_path / "units" / "site.service"
    for restart_s in (60, 61):
        lines = install_service(new_service(tmp_path, restart_s=restart_s), user=True, out=out)
        assert f"RestartSec={restart_s}" in out.read_text()
    assert lines[0].endswith("nothing was enabled or started")
    assert "next: systemctl --user daemon-reload" in lines
    assert "next: systemctl --user enable --now headwater-site-north.service" in lines
    assert out.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700, "systemd starts no unit whose folder is missing"


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "site.service"
    out.write_text("[Unit]\n")
    with pytest.raises(BadInput, match="move it away"):
        install_service(new_service(tmp_path), user=True, out=out)
    assert out.read_text() == "[Unit]\n"


def test_a_users_unit_is_not_for_another_users_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--user: expected a folder of this user"):
        install_service(new_service(tmp_path, owner=os.getuid() + 1), user=True, out=tmp_path / "site.service")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who gives folders away")
def test_folders_that_root_makes_belong_to_the_services_user(tmp_path: Path) -> None:
    service = new_service(tmp_path, owner=1234, writable=(tmp_path / "one" / "two",))
    install_service(service, user=False, out=tmp_path / "site.service")
    assert [(tmp_path / name).stat().st_uid for name in ("one", "one/two")] == [1234, 1234]
    assert "User=1234\n" in (tmp_path / "site.service").read_text()


def test_a_place_that_cannot_be_written_is_said_with_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"as root, or with `--user` for a unit of your own, or with `--out FILE`"):
        install_service(new_service(tmp_path), user=True, out=tmp_path / "file" / "site.service")
