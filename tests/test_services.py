"""The folders that the systemd units name are all that the services write to: a run on an otherwise read-only system.

systemd itself need not run: `unshare` gives each unit's command the view of the file system that the unit asks for.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation import ROOT, environment, process, wait_for, write_run, write_site
from tests.server.deployment.federations import new_federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # Flower's own build
]
CONFINE = """\
set -e
mount --make-rprivate /
for folder in $WRITABLE; do mount --bind "$folder" "$folder"; done
while read -r _ _ _ _ place _; do
    case " $WRITABLE " in *" $place "*) continue;; esac
    case "$place" in /proc*|/dev*|/sys*) continue;; esac
    mount -o remount,ro,bind "$place" 2>/dev/null || true
done < /proc/self/mountinfo
mount -t tmpfs none /mnt
export TMPDIR=/mnt
exec "$@"
"""
"""A script that runs a command with all files read-only but the folders in WRITABLE and a new TMPDIR."""


def confined(folders: str) -> list[str]:
    return ["env", f"WRITABLE={folders}", "unshare", "--mount", "bash", "-c", CONFINE, "bash"]


def can_confine(folder: Path) -> bool:
    """Returns whether this machine grants mounts, and whether what is read-only then cannot be written."""
    if shutil.which("unshare") is None:
        return False
    (folder / "open").mkdir()
    write = f"touch {folder}/open/file && ! touch {folder}/file"
    command = [*confined(str(folder / "open")), "sh", "-c", write]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def read_unit(path: Path) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in path.read_text().splitlines() if "=" in line)


def headwater(*arguments: object, timeout_s: float = 120.0, **more: str) -> str:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def serving(unit: Path, log: Path, text: str) -> Iterator[None]:
    """A unit's command, with the unit's environment and its view of the file system, until the log says a text."""
    settings = read_unit(unit)
    more = dict([settings["Environment"].split("=", 1)]) if "Environment" in settings else {}
    with process(
        shlex.split(settings["ExecStart"]), log, environment(**more), tuple(confined(settings["ReadWritePaths"]))
    ) as child:
        wait_for(log, text, 120.0, child=child)
        yield


@pytest.mark.timeout(600)
def test_a_run_ends_whose_services_can_write_to_their_units_folders_only(tmp_path: Path) -> None:
    if not can_confine(tmp_path):
        pytest.skip("this machine does not grant mounts of one's own")
    federation = new_federation(tmp_path / "fed")
    data = {"XDG_DATA_HOME": str(tmp_path / "data")}
    address, authority = str(federation.config.address), federation.tls / "ca.crt"
    site = write_site(tmp_path / "north", "north", address, authority, approval="automatic", ledger_dir=None)
    units = tmp_path / "coordinator.service", tmp_path / "site.service"
    headwater("server", "admit", federation.folder, "north", "--key", tmp_path / "north" / "keys" / "north.pub")
    headwater("server", "install-service", federation.folder, "--out", units[0])
    headwater("client", "install-service", site, "--out", units[1], **data)
    cohort = {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 90}
    run = write_run(tmp_path / "run.yaml", cohort=cohort, rounds=1)
    with (
        serving(units[0], tmp_path / "coordinator.log", "listening on"),
        serving(units[1], tmp_path / "site.log", "joined"),
    ):
        assert "final heads sent to 1 of 1 sites" in headwater(
            "server", "start", federation.folder, run, timeout_s=400.0
        )
        headwater("server", "stop", federation.folder)
    assert list((tmp_path / "data" / "headwater" / "ledgers").glob("*/ledger.jsonl"))
