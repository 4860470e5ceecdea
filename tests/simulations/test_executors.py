"""Executors carry the same sequence: with noise and sampling injected, Ray makes the same heads to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from common.privacy.noise import SeededEntropy
from simulations.experiment import run

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "simulations" / "demo.yaml"


@pytest.mark.slow
def test_ray_and_in_process_make_the_same_heads_to_the_bit(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from simulations.__main__ import app

    weights = f"run.backbone.weights={tmp_path / 'backbone.safetensors'}"
    sampled = "run.solver={kind: dp_gd, sampling_rate: 0.5, steps: 4, clip_norm: 1.0, learning_rate: 8.0}"
    by_hand = [sampled, "run.aggregation={kind: mean}"]
    common = [weights, "run.rounds=2", "baselines=[]", "expect={}", *by_hand]
    assert (
        CliRunner().invoke(app, ["pretrain", str(DEMO), "--set", weights, "--set", "pretrain.epochs=1"]).exit_code == 0
    )
    heads = {}
    for kind in ("in_process", "flower"):
        overrides = [*common, f"executor.kind={kind}", f"cache_dir={tmp_path / kind / 'cache'}"]
        summary = run(DEMO, overrides=overrides, out=tmp_path / kind / "run", entropy=SeededEntropy(5))
        assert summary.status == "completed" and summary.executor == kind
        heads[kind] = {
            path.name: {name: array.tobytes() for name, array in load_file(path).items()}
            for path in (tmp_path / kind / "run" / "model" / "heads").iterdir()
        }
    assert heads["in_process"] == heads["flower"]


@pytest.mark.slow
def test_two_ray_nodes_share_the_sites_and_make_the_same_heads_to_the_bit(tmp_path: Path) -> None:
    weights = f"run.backbone.weights={tmp_path / 'backbone.safetensors'}"
    simulations_("pretrain", weights, "pretrain.epochs=1").wait(timeout=120)
    common = [weights, "run.rounds=2", "baselines=[]", "expect={}", "noise_seed=5"]
    with two_ray_nodes() as (address, raylets):
        where = ["executor.kind=flower", f"executor.ray_address={address}", f"cache_dir={tmp_path / 'ray-cache'}"]
        running = simulations_("run", *common, *where, out=tmp_path / "ray")
        hosts: set[int] = set()
        deadline = time.monotonic() + 150
        while running.poll() is None:
            assert time.monotonic() < deadline
            hosts |= parents_of("ray::ClientAppActor")
            time.sleep(0.2)
        assert running.returncode == 0
    assert raylets <= hosts, "each node had an actor"
    here = simulations_("run", *common, f"cache_dir={tmp_path / 'cache'}", out=tmp_path / "here")
    assert here.wait(timeout=120) == 0
    heads = {
        place: {
            path.name: {name: array.tobytes() for name, array in load_file(path).items()}
            for path in (tmp_path / place / "model" / "heads").iterdir()
        }
        for place in ("ray", "here")
    }
    assert heads["ray"] == heads["here"] and len(heads["here"]) == 2


def simulations_(verb: str, *overrides: str, out: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simulations", verb, str(DEMO)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen([*command, *(["--out", str(out)] if out else [])], cwd=ROOT)


@contextmanager
def two_ray_nodes() -> Iterator[tuple[str, set[int]]]:
    """Two nodes of one processor each on loopback: the cluster's address, and the nodes' processes."""
    # Not in pytest's folder: Ray's sockets need short paths.
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray = str(Path(sys.executable).parent / "ray")
    shared = ["--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000"]
    address = f"127.0.0.1:{free_port()}"
    head = ["--head", f"--port={address.rsplit(':')[-1]}", "--include-dashboard=false", f"--temp-dir={place}"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for count, arguments in enumerate((head, [f"--address={address}"]), start=1):
            nodes.append(subprocess.Popen([ray, "start", *shared, *arguments], env=environment, start_new_session=True))
            deadline = time.monotonic() + 60
            while len(raylets_of(nodes)) < count:
                assert time.monotonic() < deadline and nodes[-1].poll() is None
                time.sleep(0.2)
            time.sleep(3)  # It listens a moment after it is there.
        yield address, raylets_of(nodes)
    finally:
        for node in reversed(nodes):
            node.terminate()
            try:
                node.wait(timeout=30)
            finally:
                for child in sessions(node.pid):
                    os.kill(child, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


def processes() -> Iterator[tuple[int, int, int, str]]:
    """(id, parent's id, session's id, command line) of every process there is."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent, session = (int((path / "stat").read_text().rsplit(")", 1)[1].split()[place]) for place in (1, 3))
            yield int(path.name), parent, session, (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended meanwhile.


def raylets_of(nodes: list[subprocess.Popen[bytes]]) -> set[int]:
    own = {node.pid for node in nodes}
    return {number for number, parent, _, command in processes() if parent in own and "raylet/raylet" in command}


def parents_of(title: str) -> set[int]:
    return {parent for _, parent, _, command in processes() if command.startswith(title)}


def sessions(leader: int) -> set[int]:
    """What is left of a session that this test started."""
    return {number for number, _, session, _ in processes() if session == leader}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
