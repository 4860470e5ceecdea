"""A systemd unit for a process that is to run all the time: one text for the coordinator and for a site.

The unit confines its process: it gains no privileges and, as a unit of the system, writes to the named folders only. A
unit of a user's own systemd lacks that part, because it needs namespaces, which many machines do not grant to users.
Nothing that hides devices is in it, because a site may use a GPU. Nothing is enabled or started here.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.bundle import find_installation
from common.errors import instead
from common.files import write_atomic
from common.types import BadInput

_FIRST_FREE_PORT = 1024
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+@%$-]+")
_UNIT = """\
{mark} Put changes into a drop-in: systemctl edit {unit}
[Unit]
Description=Headwater {side} {name}
After=network-online.target
Wants=network-online.target

[Service]
WorkingDirectory={installation}
ExecStart={command}
Restart=on-failure
RestartSec={restart_s}
# Exit code 2 is a wrong file or a port in use: no restart mends it.
RestartPreventExitStatus=2
# SIGTERM goes to the first process only, so that an answer under way may end.
KillMode=mixed
TimeoutStopSec={stop_s}
UMask=0077
NoNewPrivileges=true
RestrictSUIDSGID=true
LockPersonality=true
{more}
[Install]
WantedBy={target}
"""
_CONFINED = """\
User={owner}
PrivateTmp=true
ProtectSystem=strict
ReadWritePaths={writable}
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
CapabilityBoundingSet={rights}
AmbientCapabilities={rights}
"""


@dataclass(frozen=True)
class Service:
    """A process that systemd is to keep running.

    Attributes:
        side: word after `headwater` on the command line; it also names the unit.
        name: name of the federation or site.
        command: the executable and its arguments.
        owner: number of the user who owns its files, as whom a unit of the system runs it.
        writable: folders that it writes to.
        restart_s: pause before it is started again after a failure, in seconds.
        stop_s: longest time that it may take to end, in seconds.
        port: port that it listens on; below 1024 the unit grants that right.
        environment: variables that it needs.
    """

    side: str
    name: str
    command: Sequence[str]
    owner: int
    writable: Sequence[Path]
    restart_s: int
    stop_s: int
    port: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Name of the unit's file."""
        return f"headwater-{self.side}-{self.name}.service"


def install_service(service: Service, *, user: bool, out: Path | None) -> list[str]:
    """Writes a service's unit, makes the folders that it writes to, and returns lines that say what to do next.

    Args:
        service: the process.
        user: whether the unit is for the present user's own systemd.
        out: file to write; by default the one where systemd looks for it.

    Raises:
        BadInput: the file cannot be written or is not one of ours, or the unit would be for another user's files.
    """
    owner = name_user(service.owner)
    if user and service.owner != os.getuid():
        raise BadInput(f"--user: expected a folder of this user, got one of {owner}")
    text, path = make_unit(service, user=user), out or _find_folder(user) / service.unit
    try:
        if path.exists() and not path.read_bytes().startswith(_make_mark(service).encode()):
            raise BadInput(f"{path}: expected no file or one that this command wrote, got another; move it away")
        for folder in service.writable:
            _make_folder(folder, service.owner)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        path.chmod(0o644)
    except OSError as error:
        raise BadInput(
            f"{path}: expected a place that this user can write{instead(error)}; run this as root, or with `--user` "
            "for a unit of your own, or with `--out FILE`"
        ) from error
    control = "systemctl --user" if user else "systemctl"
    enable = [f"{control} daemon-reload", f"{control} enable --now {service.unit}"]
    enable += [f"loginctl enable-linger {owner}"] if user else []
    written = f"{path}: runs as {owner}; nothing was enabled or started"
    return [written, *_verify(path, user), *(f"next: {line}" for line in enable)]


def make_unit(service: Service, *, user: bool) -> str:
    """Returns the text of a service's unit, for a user's own systemd or for the system's.

    Raises:
        BadInput: a path has a character that a unit cannot hold.
    """
    more = "".join(f"Environment={_quote(f'{name}={value}')}\n" for name, value in service.environment.items())
    if not user:
        needs_right = service.port is not None and service.port < _FIRST_FREE_PORT
        more += _CONFINED.format(
            owner=name_user(service.owner),
            writable=" ".join(_quote(str(folder)) for folder in service.writable),
            rights="CAP_NET_BIND_SERVICE" if needs_right else "",
        )
    executable, *arguments = service.command
    return _UNIT.format(
        mark=_make_mark(service),
        unit=service.unit,
        side=service.side,
        name=service.name,
        installation=_escape(str(find_installation())),
        # In the arguments, and nowhere else in a unit, systemd expands variables.
        command=" ".join(map(_quote, (executable, *(each.replace("$", "$$") for each in arguments)))),
        restart_s=service.restart_s,
        stop_s=service.stop_s,
        more=more,
        target="default.target" if user else "multi-user.target",
    )


def name_user(number: int) -> str:
    """Returns the name of a user of this machine, or the number where there is none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _make_mark(service: Service) -> str:
    return f"# Written by `headwater {service.side} install-service`."


def _find_folder(user: bool) -> Path:
    if not user:
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def _make_folder(path: Path, owner: int) -> None:
    """Makes a folder and its parents, where they are missing, for their owner only; systemd makes none of them."""
    if path.is_dir():
        return
    _make_folder(path.parent, owner)
    path.mkdir(mode=0o700)
    if owner != os.getuid():
        os.chown(path, owner, -1)


def _escape(text: str) -> str:
    """Returns a text of which systemd expands nothing."""
    if not text.isprintable() or set(text) & set("\"'\\"):
        raise BadInput(f"expected paths without quotes, backslashes and line breaks for a unit, got {text!r}")
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    """Returns a text as one word of a unit."""
    escaped = _escape(text)
    return escaped if _PLAIN.fullmatch(escaped) else f'"{escaped}"'


def _verify(path: Path, user: bool) -> list[str]:
    """Returns what systemd finds wrong in a unit; nothing where it is not installed."""
    tool = shutil.which("systemd-analyze")
    if tool is None or path.suffix != ".service":
        return []
    scope = ["--user"] if user else []
    done = subprocess.run([tool, *scope, "--man=no", "verify", str(path)], capture_output=True, text=True, check=False)
    return [f"systemd-analyze: {line}" for line in done.stderr.splitlines() if path.name in line]
