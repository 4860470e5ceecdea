"""A coordinator and three sites as real processes over TLS on loopback, each site behind a bad proxy of its own.

All is made and run by the commands that a person types. Every process carries a mark in its environment, by which one
that stays behind is found; only processes with the mark are ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.events import RoundEnded, RunEvent, read_run_journal, select_events
from tests.bad_proxy import BadProxy
from tests.federation import ROOT, environment
from tests.server.deployment.federations import free_ports

SITES = {"alpha": ("outcome", "urgent"), "beta": ("outcome", "urgent"), "gamma": ("outcome",)}
"""Site -> its tasks: two tasks, of which one site lacks one."""

RUN = """
name: drill
seed: 1
rounds: 8
backbone:
  kind: identity
  columns:
    - {name: age, range: [0, 100], missing: 50}
    - {name: sex, levels: ["0", "1"], missing: "0"}
tasks:
  outcome: {kind: classification, labels: ["no", "yes"]}
  urgent: {kind: classification, labels: ["no", "yes"]}
solver: {kind: dp_gd, steps: 3, clip_norm: 1.0, learning_rate: 1.0}
privacy: {unit: example, delta: 1.0e-5, noise_multiplier: 10.0}
aggregation: {kind: mean}
cohort: {min_sites: 2, min_replies_per_task: 1, join_timeout_s: 60, timeout_s: 20, grace_s: 5, patience_s: 150}
"""
Variables = Mapping[str, str]
"""Variables of the environment."""
_MARK = "HEADWATER_DRILL"
_TABLE = "age,sex,outcome,urgent\n" + "".join(
    f"{30 + at % 50},{at % 2},{('no', 'yes')[at % 2]},{('no', 'yes')[at // 2 % 2]}\n" for at in range(100)
)


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """The condition's value once it is true; its last value where the time is over first."""
    until = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.1)
    return value


def is_alive(process: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class DrillSite:
    """One site: its folder, the proxy through which it reaches the coordinator, and its process."""

    name: str
    folder: Path
    proxy: BadProxy
    process: subprocess.Popen[bytes] | None = None
    num_joined: int = 0

    def joined(self) -> bool:
        """Whether it has joined since it was started."""
        return self.read_log().count("  joined ") > self.num_joined

    @property
    def file(self) -> Path:
        return self.folder / "site.yaml"

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def ledger(self) -> Path:
        """Folder of the site's one ledger."""
        return next(
            (path.parent for path in self.folder.glob("ledgers/*/ledger.jsonl")), self.folder / "ledgers" / "none"
        )

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def find_processes(self) -> list[int]:
        """The site's process and its worker."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [self.process.pid, *map(int, children.read_text().split())]

    def read_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def last_line(self) -> str:
        lines = self.read_log().strip().splitlines()
        return lines[-1] if lines else ""


@dataclass
class DrillRun:
    """A `start` or `resume` in another terminal, with what it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    def read_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    @property
    def last_line(self) -> str:
        lines = self.read_log().strip().splitlines()
        return lines[-1] if lines else ""


@dataclass
class Deployment:
    """A federation of three sites.

    Attributes:
        folder: all of it.
        ports: of the coordinator: public, control, health.
        sites: by name.
        mark: what stands in the environment of all its processes.
        root: the checkout whose code processes run.
    """

    folder: Path
    ports: Sequence[int]
    sites: dict[str, DrillSite]
    mark: str
    root: Path = ROOT
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    runs: list[DrillRun] = field(default_factory=list)

    @property
    def fed(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "fed"

    @property
    def run_file(self) -> Path:
        return self.fed / "run.yaml"

    # --- commands ----------------------------------------------------------------------------------------------------

    def variables(self, more: Variables | None = None) -> dict[str, str]:
        home = {"XDG_DATA_HOME": str(self.folder / "home"), "PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}
        return environment(**{_MARK: self.mark, **home, **(more or {})})

    def command(
        self, *words: object, seconds: float = 240.0, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """A `headwater` command, run to its end."""
        return subprocess.run(
            [*prefix, sys.executable, "-m", "headwater", *map(str, words)],
            env=self.variables(),
            cwd=self.root,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )

    def must(self, *words: object, seconds: float = 240.0) -> str:
        """What a command prints that has to succeed."""
        done = self.command(*words, seconds=seconds)
        assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def spawn(
        self, *words: object, log: Path, prefix: Sequence[str] = (), more: Variables | None = None
    ) -> subprocess.Popen[bytes]:
        """A `headwater` command in a session of its own; what it prints is added to the log."""
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as out:
            child = subprocess.Popen(
                [*prefix, sys.executable, "-m", "headwater", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.variables(more),
                cwd=self.root,
                start_new_session=True,
            )
        self.started.append(child)
        return child

    # --- the coordinator ---------------------------------------------------------------------------------------------

    def start_run(
        self, *words: object, prefix: Sequence[str] = (), more: Variables | None = None, **changes: object
    ) -> DrillRun:
        """`coordinator start` in another terminal; changes override keys of the run file, `__` for a dot."""
        sets = [text for key, value in changes.items() for text in ("--set", f"{key.replace('__', '.')}={value}")]
        return self._follow("start", self.fed, self.run_file, *words, *sets, prefix=prefix, more=more)

    def resume(self, *words: object, prefix: Sequence[str] = (), more: Variables | None = None) -> DrillRun:
        """`coordinator resume` in another terminal."""
        return self._follow("resume", self.fed, *words, prefix=prefix, more=more)

    def _follow(self, *words: object, prefix: Sequence[str], more: Variables | None) -> DrillRun:
        log = self.folder / "logs" / f"run-{len(self.runs) + 1}.log"
        run = DrillRun(self.spawn("coordinator", *words, log=log, prefix=prefix, more=more), log)
        self.runs.append(run)
        return run

    def find_daemon(self) -> int | None:
        """Process id of the coordinator's daemon."""
        with contextlib.suppress(OSError, ValueError):
            process = int((self.fed / "state" / "link.lock").read_text())
            if is_alive(process) and self._is_marked(process):
                return process
        return None

    def find_run_process(self) -> int | None:
        """Process id of the process that works on the run under way."""
        for process in self.list_processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if any(b"serverapp" in word for word in words) and not any(b"superexec" in word for word in words):
                    return process
        return None

    def start_coordinator(self, *, prefix: Sequence[str] = (), more: Variables | None = None) -> None:
        """The daemon, as a service starts it; returns when it listens."""
        log = self.folder / "logs" / "link.log"
        before = log.read_text().count("listening on") if log.exists() else 0
        child = self.spawn("coordinator", "serve", self.fed, log=log, prefix=prefix, more=more)
        assert wait_until(lambda: log.read_text().count("listening on") > before or child.poll() is not None, 120)
        assert child.poll() is None, log.read_text()[-500:]

    def stop(self) -> str:
        """`coordinator stop`, and what it prints."""
        return self.must("coordinator", "stop", self.fed)

    def list_run_folders(self) -> list[Path]:
        """Folders of all runs, oldest first."""
        found = [path.parent for path in (self.fed / "runs").glob("*/config.yaml")]
        return sorted(found, key=lambda path: (path / "config.yaml").stat().st_mtime)

    def events(self) -> list[RunEvent]:
        """Journal of the newest run."""
        folders = self.list_run_folders()
        return read_run_journal(folders[-1] / "journal.jsonl") if folders else []

    def rounds(self) -> list[RoundEnded]:
        return select_events(self.events(), RoundEnded)

    def wait_for_round(self, number: int, seconds: float = 240.0, *, run: DrillRun) -> None:
        """Until a run has ended a round."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if f"round {number} of" in run.read_log():
                return
            assert run.process.poll() is None, f"the run ended before round {number}:\n{run.read_log()}"
            time.sleep(0.1)
        raise AssertionError(f"round {number} did not end in {seconds:g} s:\n{run.read_log()}")

    # --- sites -------------------------------------------------------------------------------------------------------

    def start_site(self, name: str, *words: object, prefix: Sequence[str] = (), more: Variables | None = None) -> None:
        """`site start` as a service would."""
        site = self.sites[name]
        assert not site.is_running()
        site.num_joined = site.read_log().count("  joined ")
        site.process = self.spawn("site", "start", site.file, *words, log=site.log, prefix=prefix, more=more)

    def start_sites(self) -> None:
        """Every site that does not run; returns when all have joined."""
        missing = [name for name, site in self.sites.items() if not site.is_running()]
        for name in missing:
            self.start_site(name)
        for name in missing:
            self.wait_for_joined(name)

    def wait_for_joined(self, name: str, seconds: float = 120.0) -> None:
        """Until a site that was just started has joined."""
        site = self.sites[name]
        assert wait_until(lambda: site.joined() or not site.is_running(), seconds), f"{name}: {site.last_line}"
        assert site.is_running(), f"{name}: {site.last_line}"

    def stop_site(self, name: str, number: int = signal.SIGTERM, seconds: float = 90.0) -> int:
        """Its exit code after a signal."""
        process = self.sites[name].process
        assert process is not None
        if process.poll() is None:
            process.send_signal(number)
        return process.wait(timeout=seconds)

    # --- what stays --------------------------------------------------------------------------------------------------

    def _is_marked(self, process: int) -> bool:
        try:
            return f"{_MARK}={self.mark}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def list_processes(self) -> list[int]:
        """Every process of this deployment that is alive."""
        for child in self.started:
            child.poll()  # One that has ended and was not waited for still counts as alive for those that watch it.
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [number for number in numbers if self._is_marked(number) and is_alive(number)]

    def end(self) -> None:
        """Ends all of it, by force where it has to be."""
        for site in self.sites.values():
            if site.is_running():
                assert site.process is not None
                with contextlib.suppress(ProcessLookupError):
                    site.process.send_signal(signal.SIGCONT)
                    site.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.stop()
        wait_until(lambda: not self.list_processes(), 20)
        for process in self.list_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for child in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
        for site in self.sites.values():
            site.proxy.close()


def make_deployment(folder: Path, *, approval: str = "automatic") -> Deployment:
    """A federation and its sites, made by the commands; nothing runs yet."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(3)
    made = Deployment(folder, ports, {}, mark=f"{os.getpid()}-{folder}")
    made.must("coordinator", "init", made.fed, "--name", "hearts", "--address", f"127.0.0.1:{ports[0]}")
    settings = made.fed / "federation.yaml"
    for name, port in zip(("control_port", "health_port"), ports[1:], strict=True):
        settings.write_text(re.sub(rf"{name}: \d+", f"{name}: {port}", settings.read_text()))
    made.run_file.write_text(RUN)
    with ThreadPoolExecutor() as side_by_side:
        tasks = {name: side_by_side.submit(_make_site, made, name, tasks, approval) for name, tasks in SITES.items()}
    made.sites |= {name: task.result() for name, task in tasks.items()}
    return made


def _make_site(made: Deployment, name: str, tasks: Sequence[str], approval: str) -> DrillSite:
    folder, kit = made.folder / name, made.folder / f"{name}.zip"
    made.must("site", "init", folder, "--name", name)
    made.must("coordinator", "admit", made.fed, name, "--key", folder / "keys" / f"{name}.pub")
    made.must("coordinator", "kit", made.fed, name, "--run", made.run_file, "--out", kit)
    made.must("site", "init", folder, "--kit", kit)
    site = DrillSite(name, folder, BadProxy(f"127.0.0.1:{made.ports[0]}"))
    (folder / "rows.csv").write_text(_TABLE)
    values = yaml.safe_load((folder / "site.yaml").read_text().replace("FILL_IN: ", "fill_in: "))
    values["budget"]["epsilon"] = 9_000.0
    values["sources"] = {"records": {"kind": "table", "path": "./rows.csv", "columns": ["age", "sex"]}}
    values["tasks"] = {
        task: {"source": "records", "label": task, "missing": "skip", "public_size": 80} for task in tasks
    }
    values["coordinator"]["address"] = site.proxy.address
    values |= {"ledger_dir": "./ledgers", "cache_dir": "./cache", "reply_every_s": 0.3, "approval": approval}
    values["device"] = "cpu"
    (folder / "site.yaml").write_text(yaml.safe_dump(values))
    if approval == "required":
        made.must("site", "approve", site.file, folder / "offers" / "drill.json")
    return site


@contextlib.contextmanager
def running_deployment(folder: Path) -> Iterator[Deployment]:
    """A federation whose sites wait for their coordinator; ended afterwards."""
    made = make_deployment(folder)
    try:
        made.start_coordinator()
        made.start_sites()
        yield made
    finally:
        made.end()
