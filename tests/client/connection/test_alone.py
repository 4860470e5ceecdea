"""A site contacts its coordinator and nobody else: the real commands in a network of their own, every packet captured.

Two network namespaces, one for the coordinator and one for the site, joined by a wire; the site's default route leads
over that wire too, so that whatever it tried to reach elsewhere would be seen. Flower's own switches are left at what
they are by default: that nothing reports home is the site's doing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation import ROOT, environment, free_port, link, process, wait_for, write_run, write_site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # Flower's own build
]
COORDINATOR, SITE = "10.77.0.1", "10.77.0.2"
CAPTURE = """
import socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
seen = set()
print("listening", flush=True)
while True:
    frame, about = wire.recvfrom(65535)
    kind = int.from_bytes(frame[12:14], "big")
    if kind == 0x0806:
        continue  # Address resolution on the wire itself.
    if kind != 0x0800:
        line = f"other {kind:#06x} on {about[0]}"
    else:
        size = 4 * (frame[14] & 15)
        ends = [".".join(map(str, frame[at : at + 4])) for at in (26, 30)]
        ports = [int.from_bytes(frame[at : at + 2], "big") for at in (14 + size, 16 + size)]
        inward = about[2] == socket.PACKET_HOST and about[0] != "lo"
        far = (ends[0], ports[0]) if inward else (ends[1], ports[1])
        line = f"protocol {frame[23]} {'from' if inward else 'to'} {far[0]}:{far[1]} on {about[0]}"
    if line not in seen:
        seen.add(line)
        print(line, flush=True)
"""


@contextlib.contextmanager
def network() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Command prefixes that enter the coordinator's and the site's namespace."""
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("needs Linux, root, and ip, unshare and nsenter for network namespaces")
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "600"], stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        first, second = (("nsenter", "--target", str(holder.pid), "--net") for holder in holders)
        try:
            _wait_for_namespaces([holder.pid for holder in holders])
            _run(*first, "ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
            _run(*first, "ip", "link", "set", "wire1", "netns", str(holders[1].pid))
            for prefix, device, address in ((first, "wire0", COORDINATOR), (second, "wire1", SITE)):
                # IPv6 would announce itself on every new wire, whatever runs there.
                _run(*prefix, "sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{device}/disable_ipv6 || true")
                _run(*prefix, "ip", "address", "add", f"{address}/24", "dev", device)
                for name in (device, "lo"):
                    _run(*prefix, "ip", "link", "set", name, "up")
            _run(*second, "ip", "route", "add", "default", "via", COORDINATOR)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield first, second
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_a_site_contacts_its_coordinator_and_nobody_else(tmp_path: Path) -> None:
    with network() as (there, here), link(tmp_path / "link", host=COORDINATOR, port=free_port(), prefix=there) as where:
        site = write_site(tmp_path / "site", "alone", where)
        where.admit(tmp_path / "site/keys/alone.pub")
        captured, log = tmp_path / "packets.log", tmp_path / "site.log"
        inside = defaults()
        with process([sys.executable, "-c", CAPTURE], captured, inside, here):
            wait_for(captured, "listening")
            checked = subprocess.run(
                [*here, sys.executable, "-m", "client", "check", str(site)],
                env=inside, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert "ready to join" in checked.stdout
            with process([sys.executable, "-m", "client", "start", str(site)], log, inside, here) as child:
                wait_for(log, "joined")
                run = where.submit(ROOT, write_run(tmp_path / "run.yaml", cohort=COHORT), tmp_path / "runs")
                assert where.finished(run) == "finished:completed"
                os.kill(child.pid, signal.SIGINT)
                wait_for(log, "left")
            seen = captured.read_text().splitlines()[1:]
    port = where.address.rpartition(":")[2]
    assert set(seen) == {f"protocol 6 {way} {COORDINATOR}:{port} on wire1" for way in ("to", "from")}


def test_the_capture_sees_a_name_being_looked_up_and_a_connection_elsewhere(tmp_path: Path) -> None:
    with network() as (_, here):
        captured = tmp_path / "packets.log"
        elsewhere = "import socket; s = socket.socket(); s.settimeout(1); s.connect(('192.0.2.7', 443))"
        asked = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'?', ('192.0.2.53', 53))"
        with process([sys.executable, "-c", CAPTURE], captured, defaults(), here):
            wait_for(captured, "listening")
            for code in (elsewhere, asked):
                subprocess.run([*here, sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=30, check=False)
            wait_for(captured, "protocol 6 to 192.0.2.7:443 on wire1", 10)
            wait_for(captured, "protocol 17 to 192.0.2.53:53 on wire1", 10)


COHORT = {"min_sites": 1, "timeout_s": 90, "join_timeout_s": 60}


def defaults() -> dict[str, str]:
    """The environment without Flower's switches."""
    return {name: value for name, value in environment().items() if not name.startswith("FLWR")}


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)


def _wait_for_namespaces(pids: list[int]) -> None:
    own = os.readlink("/proc/self/ns/net")
    for pid in pids:
        _run("sh", "-c", f'for i in $(seq 50); do [ "$(readlink /proc/{pid}/ns/net)" != "{own}" ] && exit 0; '
             "sleep 0.1; done; echo unshare did not work >&2; exit 1")  # fmt: skip
