"""The coordinator's real commands: a real SuperLink, a real site process over TLS on loopback, kills, another network.

Each process is started here and ended here, by its id. The slow ones take a minute or two on two busy cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest

from common.events import RequestRejected, RoundEnded, read_daemon_journal, read_run_journal, select_events
from common.yaml import write_yaml
from server.deployment import admitted_sites, certificates
from server.deployment.federation import Federation
from server.superlink.daemon import find_daemon_pid
from server.superlink.queue import list_runs
from tests import tiny
from tests.federation import client, started, write_site
from tests.server.deployment.federations import new_federation, write_key_pair
from tests.server.deployment.test_federation import ROOT
from tests.two_modalities import hospitals


def server(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = new_federation(tmp_path / "fed")
    yield made
    process = find_daemon_pid(made)
    if process is not None:
        os.kill(process, signal.SIGKILL)


def admit(federation: Federation, tmp_path: Path, site: str) -> None:
    admitted_sites.admit_site(federation, site, write_key_pair(tmp_path, site))


def run_file(tmp_path: Path, **changes: Any) -> Path:
    cohort = {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 90}
    path = tmp_path / "run.yaml"
    write_yaml(path, tiny.run_config(**{"cohort": cohort, **changes}))
    return path


@contextmanager
def connected_site(
    federation: Federation, tmp_path: Path, site: str, **changes: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A site made and admitted by the real commands that joins by `headwater site start`.

    It has tiny data, where `changes`, which replace keys of its file, bring no others.
    """
    changes = {"approval": "automatic", **changes}
    site_file = write_site(tmp_path / site, site, str(federation.config.address), federation.tls / "ca.crt", **changes)
    done = server("admit", federation.folder, site, "--key", tmp_path / site / "keys" / f"{site}.pub")
    assert done.returncode == 0, done.stderr
    with started(site_file, tmp_path / f"{site}.log") as process:
        yield process


def wait_until(condition: Any, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.2)
    return False


def alive(process: int) -> bool:
    """Whether it runs; one that only waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class Memory(Thread):
    """The daemon and all it starts, looked at until it is stopped: their peaks, and who has torch's library mapped."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(daemon=True)
        self.peak_mib: dict[str, int] = {}
        self.with_torch: set[str] = set()
        self._federation, self._ended = federation, Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            waiting = [process] if (process := find_daemon_pid(self._federation)) is not None else []
            while waiting:
                process = waiting.pop()
                with suppress(OSError):
                    waiting += children(process)
                    command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
                    if "common.process.apart" in command:
                        continue  # Opacus computes in a process that ends at once.
                    name = next((word for word in ("serverapp", "superexec") if word in command), "daemon")
                    lines = Path(f"/proc/{process}/status").read_text().splitlines()
                    status = dict(line.split(":", 1) for line in lines)
                    if "VmHWM" in status:
                        peak = int(status["VmHWM"].split()[0]) >> 10
                        self.peak_mib[name] = max(peak, self.peak_mib.get(name, 0))
                    if "libtorch" in Path(f"/proc/{process}/maps").read_text():
                        self.with_torch.add(name)

    def stop(self) -> None:
        self._ended.set()
        self.join()


# --- refusals before anything starts ---------------------------------------------------------------------------------


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0], done.stderr
    for word in words:
        assert word in errors[0]


def test_a_run_without_admitted_sites_is_refused(federation: Federation, tmp_path: Path) -> None:
    refused(
        server("start", federation.folder, run_file(tmp_path)), "no site is admitted", "headwater coordinator admit"
    )
    assert find_daemon_pid(federation) is None
    assert list(federation.runs.iterdir()) == []


def test_a_run_that_needs_more_sites_than_there_are_is_refused(federation: Federation, tmp_path: Path) -> None:
    admit(federation, tmp_path, "north")
    done = server("start", federation.folder, run_file(tmp_path), "--set", "cohort.min_sites=3")
    refused(done, "at most the 1 admitted site(s)", "got 3")


def test_an_unknown_key_of_the_run_file_is_refused(federation: Federation, tmp_path: Path) -> None:
    admit(federation, tmp_path, "north")
    done = server("start", federation.folder, run_file(tmp_path), "--set", "roundes=3")
    refused(done, "roundes: unknown key (nearest: 'rounds')")


def test_an_expired_certificate_stops_the_start(federation: Federation, tmp_path: Path) -> None:
    admit(federation, tmp_path, "north")
    certificates.write_server(federation.tls, federation.config.hosts(), days=-1)
    refused(server("start", federation.folder, run_file(tmp_path)), "expired on", "headwater coordinator renew")


@pytest.mark.parametrize(
    "setting", ["bind", *(pytest.param(name, marks=pytest.mark.slow) for name in ("control_port", "health_port"))]
)
def test_a_port_in_use_stops_the_start_and_is_named(federation: Federation, tmp_path: Path, setting: str) -> None:
    import socket

    admit(federation, tmp_path, "north")
    value = getattr(federation.config, setting)
    port = int(str(value).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        refused(server("start", federation.folder, run_file(tmp_path)), setting, str(port), "in use")
    assert find_daemon_pid(federation) is None


def test_status_and_stop_of_a_coordinator_that_does_not_run(federation: Federation, tmp_path: Path) -> None:
    admit(federation, tmp_path, "north")
    done = server("status", federation.folder, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["link"] == {"running": False, "pid": None, "healthy": None}
    assert found["sites"] == {"north": {"connected": None, "since": None}}
    assert found["run"] is None
    stopped = server("stop", federation.folder)
    assert (stopped.returncode, "not running" in stopped.stdout) == (0, True)


def test_there_is_nothing_to_resume_in_a_new_federation(federation: Federation) -> None:
    refused(server("resume", federation.folder), "interrupted")


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_end_with_heads_and_a_removed_site_is_rejected_at_once(federation: Federation, tmp_path: Path) -> None:
    # With sampling, whose price Opacus computes.
    solver = {"kind": "dp_sgd", "sampling_rate": 0.5, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0}
    run = run_file(tmp_path, evaluation={"every": 1}, solver=solver)
    evaluation = {"share": 0.5, "evaluations": 4}
    memory = Memory(federation)
    # The site is there first and has to wait for its coordinator.
    with connected_site(federation, tmp_path, "north", evaluation=evaluation) as site:
        first = server("start", federation.folder, run, timeout=400)
        memory.stop()
        assert set(memory.peak_mib) == {"daemon", "superexec", "serverapp"}
        # Torch alone takes some 400 MiB, whatever a run does.
        assert memory.with_torch == set() and max(memory.peak_mib.values()) < 300, memory.peak_mib
        assert first.returncode == 0, first.stderr
        assert "round 2 of 2: north; updates: colour 1, size 1" in first.stderr
        assert "final heads sent to 1 of 1 sites" in first.stderr
        assert "round 2: evaluated on held-out units, noised" in first.stderr
        assert "north" in first.stdout and "add_remove" in first.stdout
        process = find_daemon_pid(federation)
        assert process is not None

        found = json.loads(server("status", federation.folder, "--json").stdout)
        assert found["link"] == {"running": True, "pid": process, "healthy": True}
        assert found["sites"]["north"]["connected"] is True
        assert (found["run"]["state"], found["run"]["replies"]) == ("completed", {"north": 2})
        health = f"http://127.0.0.1:{federation.config.health_port}"
        metrics = httpx.get(f"{health}/metrics", trust_env=False, timeout=30).text
        for line in (
            'site_connected{site="north"} 1.0',
            'replies_accepted_total{site="north"} 2.0',
            "rounds_total 2.0",
        ):
            assert f"headwater_{line}\n" in metrics
        assert "1 of 1 sites are connected" in httpx.get(f"{health}/", trust_env=False, timeout=30).text
        (folder,) = federation.runs.iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["executor"], summary["status"], summary["rounds"]) == ("deployment", "completed", 2)
        assert all(task["metrics"] == {} and task["baselines"] == {} for task in summary["tasks"].values())
        assert {path.name for path in (folder / "model" / "heads").iterdir()} == {
            "colour.safetensors",
            "size.safetensors",
        }

        second = server("start", federation.folder, run, "--set", "rounds=1", timeout=400)
        assert (second.returncode, find_daemon_pid(federation)) == (0, process), second.stderr
        assert "running already" in second.stderr

        admit_south = write_key_pair(tmp_path, "south")
        assert server("admit", federation.folder, "south", "--key", admit_south).returncode == 0
        missing = server(
            "start", federation.folder, run, "--set", "cohort.min_sites=2", "--set", "cohort.join_timeout_s=15"
        )
        assert missing.returncode == 1
        assert missing.stderr.splitlines()[-1].startswith("error: run tiny-")
        assert "south: not connected" in missing.stderr.splitlines()[-1]

        assert server("remove", federation.folder, "north").returncode == 0
        # The site learns it with its next request, and ends with a sentence for its staff.
        assert site.wait(30) == 1
        assert "does not know this site's key (any more)" in (tmp_path / "north.log").read_text()
        events = read_daemon_journal(federation.state / "link.jsonl")
        refusals = [event.reason for event in select_events(events, RequestRejected)]
        assert refusals == ["a key that is not admitted"]
        after = json.loads(server("status", federation.folder, "--json").stdout)
        assert list(after["sites"]) == ["south"]

    executors = children(process)
    assert executors
    assert server("stop", federation.folder).returncode == 0
    assert find_daemon_pid(federation) is None
    logged = json.loads(server("log", federation.folder, "--json").stdout)
    commands = [event["command"] for event in logged if event["event"] == "command"]
    assert commands == ["admit", "serve", "start", "start", "admit", "start", "remove", "stop"]
    assert wait_until(lambda: not any(alive(each) for each in [process, *executors]), 20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_continues_after_its_coordinator_was_killed(federation: Federation, tmp_path: Path) -> None:
    run = run_file(tmp_path, rounds=40)
    with connected_site(federation, tmp_path, "north"):
        watching = subprocess.Popen(
            [sys.executable, "-m", "server", "start", str(federation.folder), str(run)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def rounds() -> list[int]:
            return [
                event.round
                for path in federation.runs.glob("*/journal.jsonl")
                for event in select_events(read_run_journal(path), RoundEnded)
            ]

        assert wait_until(lambda: len(rounds()) >= 2, 400)
        process = find_daemon_pid(federation)
        assert process is not None
        executors = children(process)
        (worker,) = [each for executor in executors for each in children(executor)]
        os.kill(worker, signal.SIGKILL)
        before = len(rounds())
        assert wait_until(lambda: len(rounds()) >= before + 2, 200)
        assert watching.poll() is None
        (worker,) = [each for executor in executors for each in children(executor)]

        os.kill(process, signal.SIGKILL)
        _, error = watching.communicate(timeout=120)
        assert watching.returncode == 1, error
        assert error.splitlines()[-1].startswith("error: ") and "headwater coordinator serve" in error.splitlines()[-1]
        assert "(continued)" in error
        assert wait_until(lambda: not any(alive(each) for each in [*executors, worker]), 60)

        # Nobody asks for the run again: the service that starts goes on with it.
        assert server("serve", federation.folder, "--background").returncode == 0
        found = json.loads(server("runs", federation.folder, "--json").stdout)
        assert [run["state"] for run in found] == ["running"]
        assert wait_until(lambda: [run.state for run in list_runs(federation)] == ["completed"], 400)
        # A round that was cut off is repeated from the stored replies: the same heads, and no second charge.
        assert sorted(set(rounds())) == list(range(1, 41))
        assert server("resume", federation.folder).returncode == 2
    assert server("stop", federation.folder).returncode == 0


INTRUDER = """
import json, socket, ssl, sys
import httpx
from common.flower import control_pb2, fleet_pb2, runtime_pb2

host, port, control, ca, key = sys.argv[1:6]
found = {}
context = ssl.create_default_context(cafile=ca)
client = httpx.Client(verify=context, trust_env=False, timeout=10)
media = {"content-type": "application/protobuf"}

def ask(name, path, request):
    reply = client.post(f"https://{host}:{port}{path}", content=request.SerializeToString(), headers=media)
    found[name] = reply.status_code

ask("register", "/v1/control/register-node", control_pb2.RegisterNodeRequest(public_key=open(key, "rb").read()))
ask("run", "/v1/control/start-run", control_pb2.StartRunRequest())
ask("nodes", "/v1/control/list-nodes", control_pb2.ListNodesRequest())
ask("task", "/v1/runtime/acquire-task", runtime_pb2.AcquireTaskRequest())
ask("fleet", "/v1/fleet/pull-messages", fleet_pb2.PullMessagesRequest())
found["health"] = client.get(f"https://{host}:{port}/health").status_code
try:
    socket.create_connection((host, int(control)), timeout=3).close()
    found["control_port"] = "open"
except OSError as error:
    found["control_port"] = type(error).__name__
try:
    httpx.get(f"http://{host}:{port}/health", trust_env=False, timeout=5)
    found["plain"] = "answered"
except httpx.HTTPError as error:
    found["plain"] = "refused"
print(json.dumps(found))
"""


@contextmanager
def other_network() -> Iterator[tuple[str, str]]:
    """A network namespace with one cable to this machine; its name, and this machine's address on the cable."""
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("needs iproute2's `ip`")
    name, here, there = f"hw{os.getpid()}", f"hwa{os.getpid()}", f"hwb{os.getpid()}"

    def run(*arguments: str) -> None:
        subprocess.run([ip, *arguments], check=True, capture_output=True, timeout=20)

    try:
        run("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.decode().strip()}")
    try:
        run("link", "add", here, "type", "veth", "peer", "name", there)
        run("link", "set", there, "netns", name)
        run("addr", "add", "10.231.77.1/30", "dev", here)
        run("link", "set", here, "up")
        run("-n", name, "addr", "add", "10.231.77.2/30", "dev", there)
        run("-n", name, "link", "set", there, "up")
        run("-n", name, "link", "set", "lo", "up")
        yield name, "10.231.77.1"
    finally:
        run("netns", "del", name)
        subprocess.run([ip, "link", "del", here], capture_output=True, timeout=20, check=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_from_another_network_only_the_fleets_door_answers(tmp_path: Path) -> None:
    with other_network() as (namespace, address):
        federation = new_federation(tmp_path / "fed", bind="0.0.0.0", also=[address])
        admit(federation, tmp_path, "north")
        write_key_pair(tmp_path, "intruder")
        link = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", str(federation.folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert wait_until(lambda: server("status", federation.folder).returncode == 0, 120)
            (tmp_path / "intruder.py").write_text(textwrap.dedent(INTRUDER))
            port = str(federation.config.bind.port)
            done = subprocess.run(
                [
                    *("ip", "netns", "exec", namespace, sys.executable, str(tmp_path / "intruder.py"), address, port),
                    *(str(federation.config.control_port), str(federation.tls / "ca.crt")),
                    str(tmp_path / "intruder.pub"),
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=120,
            )
            found = json.loads(done.stdout)
            state = json.loads(server("status", federation.folder, "--json").stdout)
        finally:
            link.send_signal(signal.SIGTERM)
            output, _ = link.communicate(timeout=60)
    assert found == {
        "register": 404,
        "run": 404,
        "nodes": 404,
        "task": 404,
        "fleet": 401,
        "health": 200,
        "control_port": "ConnectionRefusedError",
        "plain": "refused",
    }
    assert list(state["sites"]) == ["north"]
    assert state["run"] is None
    assert link.returncode == 0, output
    refusals = select_events(read_daemon_journal(federation.state / "link.jsonl"), RequestRejected)
    assert {event.peer for event in refusals} == {"10.231.77.2"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployed_run_of_two_backbones_sends_each_site_what_its_tasks_need(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    cohort = {"min_sites": 2, "timeout_s": 60, "join_timeout_s": 90}
    rates = {"learning_rate": 1.0, "trunk": {"learning_rate": 0.1}}
    own = hospitals(
        tmp_path / "data",
        cohort=cohort,
        trainable={"pictures": {"from": "4"}},
        solver={"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, **rates},
    )
    write_yaml(tmp_path / "run.yaml", own.run)
    parts = {}
    for name, tasks in (("north", ("shade", "finding")), ("west", ("finding",))):
        values = own.site(name, tasks, split={"test_fraction": 0.3}).model_dump(mode="json")
        parts[name] = {key: values[key] for key in ("unit", "sources", "tasks", "split", "budget", "registry")}
    with (
        connected_site(federation, tmp_path, "north", **parts["north"]),
        connected_site(federation, tmp_path, "west", **parts["west"]),
    ):
        done = server("start", federation.folder, tmp_path / "run.yaml", timeout=400)
        assert done.returncode == 0, done.stderr
    assert "round 2 of 2: north, west; updates: shade 1, finding 2" in done.stderr
    stored = {name: {path.name for path in (tmp_path / name / "state" / "backbones").glob("*")} for name in parts}
    assert stored == {"north": set(own.digests.values()), "west": {own.digests["texts"]}}
    (folder,) = federation.runs.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert {name: entry["digest"] for name, entry in summary["backbones"].items()} == own.digests
    assert {path.stem for path in (folder / "model" / "heads").iterdir()} == {"shade", "finding", "pictures.trunk"}
    for name, tasks in (("north", {"shade", "finding"}), ("west", {"finding"})):
        evaluated = client("evaluate", str(tmp_path / name / "site.yaml"), "--json")
        assert evaluated.returncode == 0, evaluated.stderr
        assert set(json.loads(evaluated.stdout)["tasks"]) == tasks
