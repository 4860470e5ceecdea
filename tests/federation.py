"""A real coordinator for tests of a site: Flower's own SuperLink over TLS on loopback, with a tiny run to submit.

Only what a test starts is ended, by process id; every wait is bounded.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.yaml import write_yaml
from tests.tiny import run_config, site_config

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DAY = datetime.timedelta(days=1)
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Authority:
    """A certificate authority made for one test."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(
        cls, name: str, *, valid: tuple[datetime.timedelta, datetime.timedelta] = (-365 * DAY, 365 * DAY)
    ) -> Authority:
        """A self-signed authority."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = _builder(subject, subject, key, (now + valid[0], now + valid[1]))
        builder = builder.add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
        return cls(subject, key, builder.add_extension(identifier, False).sign(key, hashes.SHA384()))

    def write(self, path: Path) -> Path:
        """The authority's certificate as PEM."""
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def issue(
        self,
        folder: Path,
        *,
        names: tuple[str, ...] = ("localhost", "127.0.0.1"),
        valid: tuple[datetime.timedelta, datetime.timedelta] = (-DAY, 90 * DAY),
    ) -> tuple[Path, Path]:
        """A server certificate and its key, as files."""
        folder.mkdir(parents=True, exist_ok=True)
        key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([_general(name) for name in names])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = _builder(subject, self.name, key, (now + valid[0], now + valid[1]))
        builder = builder.add_extension(alternatives, False).add_extension(authority, False)
        certificate = builder.add_extension(usage, False).sign(self.key, hashes.SHA384())
        (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        (folder / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return folder / "server.crt", folder / "server.key"


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    valid: tuple[datetime.datetime, datetime.datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """For child processes: this checkout's code, nothing that reports home, no proxy."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return {**kept, **OFFLINE, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **more}


@contextlib.contextmanager
def process(command: list[str], log: Path, env: dict[str, str], prefix: tuple[str, ...] = ()) -> Iterator[Any]:
    """A running child; ended, with its whole session, when the test is done with it."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            [*prefix, *command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(timeout=15)


def wait_for(log: Path, text: str, timeout_s: float = 60.0, child: Any = None) -> str:
    """The log's text once it holds `text`; fails when it does not in time or the child has ended without."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        seen = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if text in seen:
            return seen
        if child is not None and child.poll() is not None:
            seen = log.read_text(encoding="utf-8", errors="replace")
            if text in seen:
                return seen
            break
        time.sleep(0.1)
    raise AssertionError(f"expected {text!r} in:\n{log.read_text(encoding='utf-8', errors='replace')}")


@dataclass(frozen=True)
class Link:
    """A running SuperLink.

    Attributes:
        folder: for its files.
        address: host and port.
        authority: who signed its certificate.
        ca: the authority's certificate, as a file.
        prefix: of every command, such as one that enters a network namespace.
    """

    folder: Path
    address: str
    authority: Authority
    ca: Path
    prefix: tuple[str, ...] = ()

    def flwr(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Flower's own command line, at this link."""
        done = subprocess.run(
            [*self.prefix, str(BIN / "flwr"), *arguments],
            env=environment(FLWR_HOME=str(self.folder / "flwr")),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.stdout + done.stderr

    def admit(self, public_key: Path) -> int:
        """Register a site's key; its node id."""
        answer = self.flwr("supernode", "register", str(public_key), "test", "--format", "json")
        return int(json.loads(answer[answer.index("{") :])["node-id"])

    def submit(self, app: Path, run_file: Path, run_dir: Path) -> str:
        """Submit a run; its id."""
        settings = f'run-file="{run_file}" run-dir="{run_dir}"'
        answer = self.flwr("run", str(app), "test", "--run-config", settings, "--format", "json")
        return str(json.loads(answer[answer.index("{") :])["run-id"])

    def finished(self, run: str, timeout_s: float = 120.0) -> str:
        """The status of a run once it has ended."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            answer = self.flwr("list", "test", "--run-id", run, "--format", "json")
            status = str(json.loads(answer[answer.index("{") :])["runs"][0]["status"])
            if status.startswith("finished"):
                return status
            time.sleep(1.0)
        raise AssertionError(f"run {run} did not end in {timeout_s} s")


@contextlib.contextmanager
def link(
    folder: Path,
    *,
    authority: Authority | None = None,
    certificate: tuple[Path, Path] | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
) -> Iterator[Link]:
    """A SuperLink with TLS and node authentication."""
    folder.mkdir(parents=True, exist_ok=True)
    signer = authority or Authority.new("test authority")
    ca = signer.write(folder / "ca.crt")
    crt, key = certificate or signer.issue(folder, names=("localhost", host))
    address = f"{host}:{port or free_port()}"
    home = folder / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    )
    command = [str(BIN / "flower-superlink"), "--host", host, "--port", address.rpartition(":")[2]]
    command += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(crt), "--ssl-keyfile", str(key)]
    command += ["--enable-supernode-auth", "--database", str(folder / "state.db")]
    command += ["--disable-runtime-dependency-installation"]
    log = folder / "superlink.log"
    with process(command, log, environment(FLWR_HOME=str(home)), prefix) as child:
        wait_for(log, "Uvicorn running", child=child)
        yield Link(folder, address, signer, ca, prefix)


def write_site(folder: Path, name: str, where: Link | str, ca: Path | None = None, **changes: Any) -> Path:
    """A site made by the real `init`, its file filled in with tiny data; the site file."""
    client("init", str(folder), "--name", name)
    values = site_config(folder / "data", name).model_dump(mode="json")
    address = where if isinstance(where, str) else where.address
    trusted = ca or (None if isinstance(where, str) else where.ca)
    coordinator = {"address": address, "ca": str(trusted), "key": f"./keys/{name}"}
    values |= {
        "ledger_dir": "./state/ledgers",
        "state_dir": "./state",
        "coordinator": coordinator,
        "reply_every_s": 0.05,
    }
    values |= changes
    (folder / "site.yaml").write_text(yaml.safe_dump(values))
    return folder / "site.yaml"


def write_run(path: Path, **changes: Any) -> Path:
    """A tiny run's file."""
    write_yaml(path, run_config(**changes))
    return path


def app_of(folder: Path, rooms: tuple[str, ...] = ("client", "common", "server")) -> Path:
    """A copy of the project that `flwr run` can bundle, to change at will."""
    folder.mkdir(parents=True)
    for room in rooms:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def client(*arguments: str, timeout_s: float = 120.0, **env: str) -> subprocess.CompletedProcess[str]:
    """The real command line of a site, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "client", *arguments],
        env=environment(**env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@contextlib.contextmanager
def started(site_file: Path, log: Path, *arguments: str, prefix: tuple[str, ...] = (), **env: str) -> Iterator[Any]:
    """A site's `start` in the background."""
    command = [sys.executable, "-m", "client", "start", str(site_file), *arguments]
    with process(command, log, environment(**env), prefix) as child:
        yield child
