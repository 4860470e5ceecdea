"""Disks that are full."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.parts import (
    expect_end,
    expect_end_or_resume,
    find_sentence,
    row,
)
from tests.deployment import Deployment
from tests.small_disk import filled


@row
def disk_full_coordinator(made: Deployment) -> str:
    """the disk of the coordinator's folder is full for a while"""
    made.stop()
    with _small_disk(made.fed):
        made.start_coordinator()
        run = made.start_run(rounds=5)
        made.wait_for_round(2, run=run)
        with filled(made.fed):
            code = run.wait(240)
            said = run.last_line
        assert code == 1, f"expected exit code 1, got {code}: {said}"
        if made.find_daemon() is None:
            made.start_coordinator()
        again = made.resume()
        assert again.wait(400) == 0, again.last_line
        made.stop()
    made.start_coordinator()
    return f"{said!r}; resumed and completed"


@row
def disk_full_ledger(made: Deployment) -> str:
    """the disk of a site's ledger is full for a while"""
    return _fill_site(made, made.sites["beta"].folder / "ledgers")


@row
def disk_full_state(made: Deployment) -> str:
    """the disk of a site's state is full for a while"""
    return _fill_site(made, made.sites["beta"].state)


@row
def disk_full_cache(made: Deployment) -> str:
    """the disk of a site's cached features is full when it prepares a new backbone"""
    site = made.sites["beta"]
    made.stop_site("beta")
    (site.folder / "cache").mkdir(exist_ok=True)
    with _small_disk(site.folder / "cache"):
        made.start_sites()
        with filled(site.folder / "cache"):
            run = made.start_run("--set", f"backbone={_other_backbone()}", rounds=4)
            said = expect_end_or_resume(made, run)
        assert site.is_running(), site.last_line
        said += f"; site said {find_sentence(site.read_log(), 'space', 'disk')!r}"
        run = made.start_run("--set", f"backbone={_other_backbone()}", rounds=2)
        said += f"; afterwards {expect_end(run)}"
        assert "beta" in made.rounds()[-1].sites
        made.stop_site("beta")
    return said


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A folder on a disk of its own of 32 MB, with what is in it."""
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder)
        shutil.move(kept, folder)


def _fill_site(made: Deployment, folder: Path) -> str:
    site = made.sites["beta"]
    made.stop_site("beta")
    with _small_disk(folder):
        made.start_sites()
        run = made.start_run(rounds=5)
        made.wait_for_round(2, run=run)
        before = len(site.read_log())
        with filled(folder):
            time.sleep(12)
        said = expect_end_or_resume(made, run)
        if not site.is_running():
            said += f"; site ended: {site.last_line!r}"
            made.start_sites()
        said += f"; site said {find_sentence(site.read_log()[before:], 'space', 'disk')!r}"
        again = made.start_run(rounds=2)
        said += f"; afterwards {expect_end(again)}"
        assert "beta" in made.rounds()[-1].sites, site.read_log()[-500:]
        made.stop_site("beta")
    return said


def _other_backbone() -> str:
    columns = [{"name": "age", "range": [0, 101], "missing": 50}, {"name": "sex", "levels": ["0", "1"], "missing": "0"}]
    return json.dumps({"kind": "identity", "columns": columns})
