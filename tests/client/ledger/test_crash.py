"""A site's process dies, for real, at each step of a round: the ledger keeps the charge, and no noise is drawn twice.

Kills come through what a site is given: its entropy, which is asked between reserve and train; the lock of its ledger,
which the test holds while the reply is being stored; the system's limit on file sizes. Nothing is patched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.ledger import chain
from client.protocol.join import join
from client.protocol.site import Site
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.privacy.accounting import compute_epsilon
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import Heads
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

ROOT = Path(__file__).resolve().parents[3]
SLOW = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1000, "clip_norm": 1.0, "learning_rate": 0.1}
FAINT = {"unit": "example", "delta": 1e-5, "noise_multiplier": 2000.0}

# Imports once, then forks a process for each line "folder place" it reads and prints its id; for "reap" it prints how
# the last one ended. Each does one round. It says where it is by a file and waits there for the file `go`.
ROUNDS = """
import os, resource, signal, sys, time
from pathlib import Path
import client.solvers.dp_sgd
from client.protocol import answer
from client.protocol.train import train
from client.protocol.site import Site
from common import messages
from common.privacy.noise import os_entropy
from tests.tiny import site_config

def one_round(folder, place):
    request = messages.decode(messages.from_bytes((folder / "request").read_bytes()), messages.TrainRequest)

    def wait_at(name):
        (folder / name).touch()
        while not (folder / "go").exists():
            time.sleep(0.005)

    def entropy(purpose):
        if place == "training":
            (folder / "reserved").touch()
        elif place != "sending":
            wait_at("reserved")
        return os_entropy(purpose)

    site = Site(site_config(folder, "north"), entropy)
    if place == "reserving":
        ledger = folder / "north-state" / "ledgers" / "north-registry" / "ledger.jsonl"
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        check_room = answer._check_room

        def fill_the_disk(*arguments):
            check_room(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.stat().st_size + 30, resource.RLIM_INFINITY))

        # Between the look for room and the charge, another program takes it.
        answer._check_room = fill_the_disk
    train(site, request)
    wait_at("trained")

for line in sys.stdin:
    if line == "reap\\n":
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        one_round(Path(line.rsplit(" ", 1)[0]), line.split()[-1])
        os._exit(0)
    print(child, flush=True)
"""


@dataclass(frozen=True)
class Sites:
    """The process that forks others."""

    process: subprocess.Popen[str]

    def ask(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder: Path, place: str) -> int:
        """A site's process that works on one round."""
        return self.ask(f"{folder} {place}")

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        assert self.ask("reap") == -signal.SIGKILL


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    process = subprocess.Popen(
        [sys.executable, "-c", ROUNDS],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A forked process has none of its parent's threads: torch must not count on them.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield Sites(process)
    process.communicate(timeout=60)


def wait_until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached()


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def heads(frozen: Backbone) -> Heads:
    modules = create_heads(
        {name: open_task(spec, name) for name, spec in TASKS.items()}, dict.fromkeys(TASKS, frozen.feature_dim), 0
    )
    return {name: parameters(module) for name, module in modules.items()}


def ready(folder: Path, frozen: Backbone, **changes: object) -> Site:
    """A site that joined and prepared, and its request for round 1 in a file."""
    site = Site(site_config(folder, "north"), os_entropy)
    join(site, offered("run-1", run_config(**changes), frozen))
    give_backbone(site, "run-1", frozen)
    request = messages.encode(messages.TrainRequest("run-1", 1, heads(frozen)))
    (folder / "request").write_bytes(messages.to_bytes(request))
    return site


def again(folder: Path, site: Site) -> bytes:
    """The answer to the same request, from a site whose process did not die."""
    request = messages.decode(messages.from_bytes((folder / "request").read_bytes()), messages.TrainRequest)
    return messages.to_bytes(train(site, request))


def replies(folder: Path) -> list[Path]:
    return list((folder / "north-state" / "runs" / "run-1" / "replies").glob("[0-9a-f]*"))


def assert_one_open_charge(site: Site) -> None:
    """What may have left counts in full, committed or not."""
    charges = site.ledger().charges()
    assert [charge.committed for charge in charges] == [False]
    assert site.ledger().spent().reserved_epsilon == compute_epsilon([charges[0].mechanism], 1e-5) > 0


def test_killed_between_reserve_and_training(tmp_path: Path, frozen: Backbone, sites: Sites) -> None:
    site = ready(tmp_path, frozen)
    child = sites.start(tmp_path, "reserved")
    wait_until((tmp_path / "reserved").exists)
    sites.kill(child)
    assert_one_open_charge(site)
    assert replies(tmp_path) == []
    again(tmp_path, site)
    assert [charge.committed for charge in site.ledger().charges()] == [False, True]


def test_killed_in_training(tmp_path: Path, frozen: Backbone, sites: Sites) -> None:
    site = ready(tmp_path, frozen, solver=SLOW, privacy=FAINT, rounds=1)
    child = sites.start(tmp_path, "training")
    wait_until((tmp_path / "reserved").exists)
    time.sleep(0.5)  # A thousand steps take several seconds.
    sites.kill(child)
    assert_one_open_charge(site)
    assert replies(tmp_path) == []


def test_killed_after_the_reply_was_stored_and_before_it_was_committed(
    tmp_path: Path, frozen: Backbone, sites: Sites
) -> None:
    site = ready(tmp_path, frozen)
    child = sites.start(tmp_path, "reserved")
    wait_until((tmp_path / "reserved").exists)
    with chain.exclusive(tmp_path / "north-state" / "ledgers" / "north-registry"):
        (tmp_path / "go").touch()
        wait_until(lambda: replies(tmp_path))
        sites.kill(child)  # It waits for the ledger's lock, to commit.
    (stored,) = replies(tmp_path)
    assert_one_open_charge(site)
    before = site.ledger().spent().reserved_epsilon
    assert again(tmp_path, site) == stored.read_bytes()
    assert site.ledger().spent().reserved_epsilon == before
    assert len(site.ledger().charges()) == 1


def test_killed_between_commit_and_sending(tmp_path: Path, frozen: Backbone, sites: Sites) -> None:
    site = ready(tmp_path, frozen)
    child = sites.start(tmp_path, "sending")
    wait_until((tmp_path / "trained").exists)
    sites.kill(child)
    (stored,) = replies(tmp_path)
    assert again(tmp_path, site) == stored.read_bytes() == again(tmp_path, site)
    assert [charge.committed for charge in site.ledger().charges()] == [True]


def test_killed_in_the_middle_of_writing_the_charge(tmp_path: Path, frozen: Backbone, sites: Sites) -> None:
    """A line torn on disk by the kernel: no record was touched yet, so nothing is owed; the tear is noted."""
    site = ready(tmp_path, frozen)
    sites.start(tmp_path, "reserving")
    assert sites.ask("reap") == -signal.SIGXFSZ
    assert replies(tmp_path) == []
    assert [line.event.event for line in site.ledger().lines()] == ["created", "earmarked", "sealed"]
    again(tmp_path, site)
    assert [charge.committed for charge in site.ledger().charges()] == [True]
