"""`headwater site start` against Flower's real SuperLink: it joins, answers, refuses, survives and leaves.

Everything is real: the command, TLS, keys, processes and signals. Each wait is bounded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client.config import SiteConfig
from common.bundle import compute_bundle_digest, compute_code_digest
from common.events import RequestDeclined, SiteRejected, read_run_journal, read_site_journal, select_events
from common.process.health import is_serving
from common.yaml import load
from tests.answering import Answer, answering
from tests.federation import (
    DAY,
    ROOT,
    Authority,
    Link,
    app_of,
    client,
    free_port,
    link,
    started,
    wait_for,
    write_run,
    write_site,
)
from tests.tiny import TASKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # Flower's own build
]
SLOW = {
    "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1000, "clip_norm": 1.0, "learning_rate": 1e-4},
    "tasks": {name: {**task, "head": {"hidden": 20_000}} for name, task in TASKS.items()},
}
HUGE_NOISE = {"unit": "example", "delta": 1e-5, "noise_multiplier": 1e5}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with link(tmp_path_factory.mktemp("link")) as running:
        yield running


def admitted(folder: Path, name: str, where: Link, **changes: object) -> Path:
    """A site that the coordinator knows; its file."""
    site = write_site(folder / name, name, where, **changes)
    where.admit(folder / name / "keys" / f"{name}.pub")
    return site


def cohort(sites: int, timeout_s: float = 90, patience_s: float = 1) -> dict[str, object]:
    waiting = {"timeout_s": timeout_s, "join_timeout_s": 60, "patience_s": patience_s}
    return {"cohort": {"min_sites": sites, **waiting}}


def account(site: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(client("budget", str(site), "--json").stdout)
    return found


def leave(child: subprocess.Popen[bytes], timeout_s: float = 20.0) -> int:
    os.kill(child.pid, signal.SIGINT)
    return child.wait(timeout=timeout_s)


def test_two_sites_train_a_run_show_their_budgets_and_leave(tmp_path: Path, where: Link) -> None:
    port = free_port()
    coordinator = {"address": where.address, "ca": str(where.ca), "key": "./keys/a", "health_port": port}
    sites = [admitted(tmp_path, "a", where, coordinator=coordinator), admitted(tmp_path, "b", where)]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    assert client("check", str(sites[0])).returncode == 0
    with started(sites[0], logs[0]) as first, started(sites[1], logs[1]):
        for log in logs:
            wait_for(log, "joined")
        assert is_serving(port)
        run = where.submit(ROOT, write_run(tmp_path / "run.yaml", **cohort(2)), tmp_path / "runs")
        assert where.finished(run) == "finished:completed"
        seen = wait_for(logs[0], "finished")
        assert "asked: train, round 2" in seen
        page, metrics = (httpx.get(f"http://127.0.0.1:{port}/{name}", trust_env=False).text for name in ("", "metrics"))
        assert "round 2, training reply sent" in page
        assert "headwater_site_joined 1.0\n" in metrics
        assert 'headwater_site_replies_total{purpose="training"} 2.0\n' in metrics
        assert "headwater_site_runs_held 0.0\n" in metrics
        contact = float(metrics.split("\nheadwater_site_last_contact_timestamp_seconds ")[1].split()[0])
        assert time.time() - contact < 10  # Not the moment at which it joined.
        assert "round 2: sent " in seen
        assert account(sites[0])["left_epsilon"] < 100  # type: ignore[operator]
        assert f"budget: epsilon {account(sites[0])['left_epsilon']:g} of 100 left" in seen
        assert leave(first) == 0
        assert wait_for(logs[0], "left")
        assert is_serving(port) is None


def test_a_changed_bundle_is_declined_journalled_and_no_line_of_it_runs(tmp_path: Path, where: Link) -> None:
    site, app = admitted(tmp_path, "c", where), app_of(tmp_path / "app")
    canary = tmp_path / "ran"
    changed = app / "client" / "app.py"
    changed.write_text(f"open({str(canary)!r}, 'w').close()\n{changed.read_text()}")
    with started(site, tmp_path / "c.log"):
        wait_for(tmp_path / "c.log", "joined")
        run = where.submit(app, write_run(tmp_path / "run.yaml", **cohort(1)), tmp_path / "runs")
        assert where.finished(run) == "finished:failed"
        (kept,) = (tmp_path / "runs").glob("*/journal.jsonl")
        assert ("c", "declined: version") in [
            (event.site, event.reason) for event in select_events(read_run_journal(kept), SiteRejected)
        ]
    from common.flower import build_bundle_from_folder

    offered = compute_bundle_digest(build_bundle_from_folder(app))
    assert offered != compute_code_digest()
    (event,) = select_events(read_site_journal(tmp_path / "c/state/site.jsonl"), RequestDeclined)
    assert event.reason == "version"
    assert compute_code_digest() in event.detail
    assert offered in event.detail
    assert offered in client("log", str(site), "--json").stdout
    assert not canary.exists()
    text = "open("  # Nowhere in the site's folder either: it was never unpacked.
    assert not [path for path in (tmp_path / "c").rglob("*.py") if text in path.read_text()]
    assert not (tmp_path / "c/state/runs").exists()


def test_a_bundle_with_one_more_file_is_declined(tmp_path: Path, where: Link) -> None:
    site, app = admitted(tmp_path, "d", where), app_of(tmp_path / "app")
    settings = (app / "pyproject.toml").read_text().replace('"server/**/*.py"', '"server/**/*.py", "extra.py"')
    (app / "pyproject.toml").write_text(settings)
    (app / "extra.py").write_text("import os\n")
    with started(site, tmp_path / "d.log"):
        wait_for(tmp_path / "d.log", "joined")
        run = where.submit(app, write_run(tmp_path / "run.yaml", **cohort(1)), tmp_path / "runs")
        seen = wait_for(tmp_path / "d.log", "declined (version)", 90)
        assert "got 'extra.py'" in seen
        where.finished(run)


def test_a_crash_in_the_middle_of_a_round_is_answered_at_once_and_stays_charged(tmp_path: Path, where: Link) -> None:
    site, log = admitted(tmp_path, "e", where), tmp_path / "e.log"
    with started(site, log) as child:
        wait_for(log, "joined")
        run_file = write_run(tmp_path / "run.yaml", **SLOW, privacy=HUGE_NOISE, rounds=1, **cohort(1, patience_s=0))
        run = where.submit(ROOT, run_file, tmp_path / "runs")
        wait_for(log, "asked: train", 90)
        (worker,) = children(child.pid)
        wait_until_charged(site)
        os.kill(worker, signal.SIGKILL)
        before = time.monotonic()
        wait_for(log, "declined (internal): the process that answers ended with -9", 30)
        assert time.monotonic() - before < 10
        where.finished(run)
        assert child.poll() is None
    (spent,) = account(site)["runs"]  # type: ignore[misc]
    assert (spent["charges"], spent["open"]) == (1, 1)


def test_leaving_twice_abandons_the_round_and_keeps_its_charge(tmp_path: Path, where: Link) -> None:
    site, log = admitted(tmp_path, "f", where), tmp_path / "f.log"
    with started(site, log) as child:
        wait_for(log, "joined")
        run_file = write_run(tmp_path / "run.yaml", **SLOW, privacy=HUGE_NOISE, rounds=1, **cohort(1, patience_s=0))
        run = where.submit(ROOT, run_file, tmp_path / "runs")
        wait_for(log, "asked: train", 90)
        wait_until_charged(site)
        os.kill(child.pid, signal.SIGINT)
        wait_for(log, "Ctrl-C again leaves at once")
        assert child.poll() is None
        workers = children(child.pid)
        assert leave(child) == 0
        assert "abandoned by the site's staff" in wait_for(log, "left")
        assert not any(alive(pid) for pid in workers)
        where.finished(run)
    (spent,) = account(site)["runs"]  # type: ignore[misc]
    assert (spent["charges"], spent["open"]) == (1, 1)


def test_a_worker_ends_with_a_killed_parent_and_the_site_rejoins_as_the_same_node(tmp_path: Path, where: Link) -> None:
    site, log = admitted(tmp_path, "g", where), tmp_path / "g.log"
    with started(site, log) as child:
        wait_for(log, "joined")
        run_file = write_run(tmp_path / "run.yaml", **SLOW, privacy=HUGE_NOISE, rounds=1, **cohort(1, 20))
        where.submit(ROOT, run_file, tmp_path / "runs")
        wait_for(log, "asked: train", 90)
        workers = children(child.pid)
        assert workers
        os.kill(child.pid, signal.SIGKILL)
        child.wait(timeout=10)
        node = (tmp_path / "g/state/node_id").read_text()
        until = time.monotonic() + 10
        while any(alive(pid) for pid in workers) and time.monotonic() < until:
            time.sleep(0.2)
        assert not any(alive(pid) for pid in workers)
    before = time.monotonic()
    with started(site, tmp_path / "again.log"):
        assert f"(node {node})" in wait_for(tmp_path / "again.log", "joined", 30)
        assert time.monotonic() - before < 30  # Not after the minute in which the coordinator thinks it is still there.


def test_a_second_process_on_the_same_site_is_refused(tmp_path: Path, where: Link) -> None:
    site, log = admitted(tmp_path, "h", where), tmp_path / "h.log"
    with started(site, log):
        wait_for(log, "joined")
        second = client("start", str(site))
        assert (second.returncode, "already serves" in second.stderr) == (2, True)


def test_a_coordinator_that_restarts_is_joined_again(tmp_path: Path) -> None:
    authority, port, folder = Authority.new("restarting"), free_port(), tmp_path / "link"
    log = tmp_path / "i.log"
    with link(folder, authority=authority, port=port) as first:
        site = admitted(tmp_path, "i", first)
        running = started(site, log)
        child = running.__enter__()
        wait_for(log, "joined")
    try:
        assert "refuses connections: is the coordinator running" in wait_for(log, "next try in", 30)
        (folder / "superlink.log").unlink()
        with link(folder, authority=authority, port=port) as second:
            until = time.monotonic() + 60
            while log.read_text().count("joined 127") < 2 and time.monotonic() < until:
                time.sleep(0.2)
            assert log.read_text().count("joined 127") == 2
            run = second.submit(ROOT, write_run(tmp_path / "run.yaml", **cohort(1)), tmp_path / "runs")
            assert second.finished(run) == "finished:completed"
            assert child.poll() is None
    finally:
        running.__exit__(None, None, None)


# --- refused, with one sentence and no retry for ever ----------------------------------------------------------------


def test_a_site_that_is_not_admitted_ends_and_says_whom_to_send_what(tmp_path: Path, where: Link) -> None:
    site = write_site(tmp_path / "j", "j", where)
    done = client("start", str(site), timeout_s=60)
    assert done.returncode == 1
    assert "the coordinator does not know this site's key" in done.stderr
    assert "keys/j.pub" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert client("check", str(site)).returncode == 1


def test_a_removed_site_ends_and_says_so(tmp_path: Path, where: Link) -> None:
    site, log = write_site(tmp_path / "k", "k", where), tmp_path / "k.log"
    node = where.admit(tmp_path / "k/keys/k.pub")
    with started(site, log) as child:
        wait_for(log, "joined")
        where.flwr("supernode", "unregister", str(node), "test")
        assert child.wait(timeout=30) == 1
        assert "does not know this site's key (any more)" in log.read_text()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("intercepted", "issued by CN=Hospital TLS inspection, not by the federation's authority"),
        ("expired", "certificate expired on"),
        ("other name", "is for federation.example.org, not for 127.0.0.1"),
        ("no tls", "answers without TLS"),
        ("clock", "s behind the coordinator's"),
    ],
)
def test_check_and_start_end_with_the_same_sentence(tmp_path: Path, what: str, words: str) -> None:
    """Another authority or name ends `start` at once; what may pass ends it when its patience is over."""
    authority = Authority.new("test authority")
    certificate = {
        "intercepted": lambda: Authority.new("Hospital TLS inspection").issue(tmp_path),
        "expired": lambda: authority.issue(tmp_path, valid=(-9 * DAY, -DAY)),
        "other name": lambda: authority.issue(tmp_path, names=("federation.example.org",)),
        "no tls": lambda: None,
        "clock": lambda: authority.issue(tmp_path),
    }[what]()
    reply = Answer(status=401, date="Fri, 01 Jan 2100 00:00:00 GMT" if what == "clock" else None)
    with answering(certificate, lambda path: reply) as server:
        site = write_site(tmp_path / "site", "l", server.address, authority.write(tmp_path / "ca.crt"))
        checked, done = client("check", str(site)), client("start", str(site), "--patience", "0.02", timeout_s=60)
    assert (checked.returncode, done.returncode) == (1, 1)
    assert words in checked.stdout
    assert words in done.stderr
    assert done.stderr.startswith("error: gave up after 1.2 s") == (what not in ("intercepted", "other name"))
    assert len(done.stderr.strip().splitlines()) == 1


def test_patience_ends_with_the_reason(tmp_path: Path) -> None:
    ca = Authority.new("test authority").write(tmp_path / "ca.crt")
    site = write_site(tmp_path / "m", "m", f"127.0.0.1:{free_port()}", ca)
    done = client("start", str(site), "--patience", "0.02", timeout_s=60)
    assert done.returncode == 1
    assert "gave up after 1.2 s" in done.stderr
    assert "refuses connections" in done.stderr


def test_an_address_with_a_scheme_is_bad_input(tmp_path: Path) -> None:
    ca = Authority.new("test authority").write(tmp_path / "ca.crt")
    site = write_site(tmp_path / "n", "n", "http://federation.example.org:80", ca)
    for verb in ("check", "start"):
        done = client(verb, str(site))
        assert done.returncode == 2
        assert "coordinator.address: expected HOST:PORT" in done.stderr
        assert "it is always TLS" in done.stderr


def test_a_key_that_others_can_read_is_bad_input(tmp_path: Path) -> None:
    ca = Authority.new("test authority").write(tmp_path / "ca.crt")
    site = write_site(tmp_path / "o", "o", "127.0.0.1:1", ca)
    (tmp_path / "o/keys/o").chmod(0o644)
    done = client("start", str(site))
    assert (done.returncode, "chmod 600" in done.stderr) == (2, True)


def test_a_proxy_is_used_and_is_asked_for_the_coordinator_only(tmp_path: Path) -> None:
    ca = Authority.new("test authority").write(tmp_path / "ca.crt")
    site = write_site(tmp_path / "p", "p", "federation.example.org:9092", ca)
    with answering(None, lambda path: Answer(status=403)) as proxy:
        settings = {"HTTPS_PROXY": f"http://user:secret@{proxy.address}"}
        done = client("start", str(site), "--patience", "0.02", timeout_s=60, **settings)
        checked = client("check", str(site), **settings)
    assert (done.returncode, checked.returncode) == (1, 1)
    assert f"through the proxy {proxy.address}" in done.stderr
    assert "secret" not in done.stderr + done.stdout + checked.stdout
    assert set(proxy.asked) == {"CONNECT federation.example.org:9092"}


# --- processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(text) for text in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_charged(site: Path, timeout_s: float = 30.0) -> None:
    state = load(SiteConfig, site).state_dir
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if any(b"reserved" in path.read_bytes() for path in (state / "ledgers").rglob("*.jsonl")):
            return
        time.sleep(0.1)
    raise AssertionError("nothing was charged")


def test_two_coordinators_are_served_at_once_and_the_second_is_declined_when_the_budget_is_used_up(
    tmp_path: Path, where: Link
) -> None:
    """One site file, one budget: of two runs, at two real SuperLinks, the first uses it up."""
    with link(tmp_path / "other") as other:
        links = {"hearts": where, "lungs": other}
        named = {
            name: {"address": each.address, "ca": str(each.ca), "key": "./keys/two"} for name, each in links.items()
        }
        # Each run costs epsilon 4.4.
        budget = {"epsilon": 5.5, "delta": 1e-5}
        site = write_site(tmp_path / "two", "two", where, coordinator=None, coordinators=named, budget=budget)
        for each in links.values():
            each.admit(tmp_path / "two" / "keys" / "two.pub")
        checked = client("check", str(site))
        assert checked.returncode == 0, checked.stdout
        assert "hearts admitted" in checked.stdout and "lungs admitted" in checked.stdout
        log, run_file = tmp_path / "two.log", write_run(tmp_path / "run.yaml", **cohort(1))
        with started(site, log) as both:
            for name in links:
                wait_for(log, f"{name}: joined")
            refused = client("start", str(site), "--coordinator", "lungs")
            assert refused.returncode == 2 and "already serves" in refused.stderr
            first = where.submit(ROOT, run_file, tmp_path / "runs-hearts")
            assert where.finished(first) == "finished:completed"
            second = other.submit(ROOT, run_file, tmp_path / "runs-lungs")
            assert other.finished(second) == "finished:failed"
            assert "lungs: declined (budget)" in wait_for(log, "declined (budget)")
            assert leave(both) == 0
            assert wait_for(log, "hearts: left") and wait_for(log, "lungs: left")
    [run] = account(site)["runs"]  # type: ignore[misc]
    assert run["run"].startswith("hearts/") and run["rounds"] == 2  # type: ignore[index]
    state = load(SiteConfig, site).state_dir / "coordinators"
    assert list((state / "hearts" / "runs").glob("*/replies/*"))
    assert not list((state / "lungs" / "runs").glob("*/replies/*"))
