"""The image, the compose file and the chart name commands, options, ports and paths that exist, and grant nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from common.process.console import load_verb, read_verbs
from headwater.__main__ import make_app
from tests.federation import ROOT

FOLDER = ROOT / "configs/containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
COMMENTS = (FOLDER / "compose.yaml").read_text()
VALUES: dict[str, Any] = yaml.safe_load((FOLDER / "chart/values.yaml").read_text())
TEMPLATES = {path.name: path.read_text() for path in (FOLDER / "chart/templates").iterdir()}
PACKAGES = {"coordinator": "server.commands", "site": "client.commands"}
COMMANDS = [
    *(service["command"] for service in COMPOSE["services"].values()),
    *(
        line.split()
        for line in re.findall(r"--rm \w+ ((?:site|coordinator) .*)", (FOLDER / "compose.yaml").read_text())
    ),
    *(line.split() for line in re.findall(r"headwater (coordinator start .*)", (FOLDER / "compose.yaml").read_text())),
    *(text.split(", ") for name in TEMPLATES for text in re.findall(r"args: \[(.*)\]", TEMPLATES[name])),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_and_its_options_exist(command: list[str]) -> None:
    side, verb, *rest = command
    assert verb in read_verbs(PACKAGES[side])
    known = {option for parameter in load_verb(PACKAGES[side], verb).params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 12


def test_ports_are_those_that_init_writes(tmp_path: Path) -> None:
    """`init` puts control and health beside the public port."""
    made = CliRunner().invoke(
        make_app(), ["coordinator", "init", f"{tmp_path}/fed", "--name", "a", "--address", "coordinator:9092"]
    )
    assert made.exit_code == 0, made.output
    settings = yaml.safe_load((tmp_path / "fed/federation.yaml").read_text())
    health = settings["health_port"]
    assert VALUES["coordinator"]["port"] == int(settings["bind"].split(":")[1]) == 9092
    assert VALUES["coordinator"]["healthPort"] == health
    assert COMPOSE["services"]["coordinator"]["environment"]["HEALTH_PORT"] == str(health)
    assert f"HEALTH_PORT={health}" in DOCKERFILE
    for name in ("north", "south", "east"):
        assert COMPOSE["services"][name]["environment"]["HEALTH_PORT"] == str(VALUES["site"]["healthPort"])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_the_compose_file_can_do_little(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "ports", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert COMPOSE["networks"][service["networks"][0]] == {"internal": True}
    kept = [volume for volume in service["volumes"] if volume.endswith(":/data")]
    assert kept == [f"{name}:/data"]
    assert not [volume for volume in service["volumes"] if "/records/" in volume and not volume.endswith(":ro")]


def test_the_image_runs_as_nobody_from_locked_wheels_and_keeps_no_secret() -> None:
    final = DOCKERFILE.split("FROM ${BASE}\n")[1]
    assert "USER 10001:10001" in final
    assert "HEALTHCHECK" in final
    assert 'ENTRYPOINT ["headwater"]' in final
    assert "--require-hashes" in DOCKERFILE and DOCKERFILE.count("--no-index") == 2
    # What is copied is code; a folder of keys or settings would stay in a layer for ever.
    assert re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) == [
        "${WHEELS}/ /build/wheels/",
        "${LOCK} /build/requirements.lock",
        "headwater-*.whl /build/",
        "--from=build /opt/headwater /opt/headwater",
    ]
    assert not re.search(r"curl|wget|apt|ADD ", re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE))


def test_the_ledger_lies_on_the_volume() -> None:
    """A population's ledger in a container's own layer would be a fresh budget after each upgrade."""
    assert "XDG_DATA_HOME=/data" in DOCKERFILE
    assert 'VOLUME ["/data"]' in DOCKERFILE
    for name in ("coordinator.yaml", "site.yaml"):
        assert "{name: data, mountPath: /data}" in TEMPLATES[name]
        assert "replicas: 1 " in TEMPLATES[name]


def test_a_pod_of_the_chart_can_do_little() -> None:
    for line in (
        *("runAsNonRoot: true", "allowPrivilegeEscalation: false", "readOnlyRootFilesystem: true"),
        *("capabilities: {drop: [ALL]}", "seccompProfile: {type: RuntimeDefault}"),
        *("automountServiceAccountToken: false", "fsGroupChangePolicy: OnRootMismatch"),
    ):
        assert TEMPLATES["_pod.tpl"].count(line) == 1, line
    for name in ("coordinator.yaml", "site.yaml"):
        text = TEMPLATES[name]
        assert 'include "headwater.pod"' in text and 'include "headwater.container"' in text
        assert "policyTypes: [Ingress, Egress]" in text
    assert "egress: []" in TEMPLATES["coordinator.yaml"]
    assert "ingress: []" in TEMPLATES["site.yaml"]
