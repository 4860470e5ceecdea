"""A federation folder on free loopback ports, and site keys, for tests."""

from __future__ import annotations

import socket
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.deployment import admitted_sites, certificates
from server.deployment.federation import Federation, FederationConfig, create_federation


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def new_federation(folder: Path, *, bind: str = "127.0.0.1", **changes: object) -> Federation:
    """A federation as `init` makes it; `changes` replace settings."""
    public, control, health = free_ports(3)
    values = {
        "name": "hearts",
        "address": f"localhost:{public}",
        "also": ["127.0.0.1"],
        "bind": f"{bind}:{public}",
        "control_port": control,
        "health_port": health,
        **changes,
    }
    federation = create_federation(folder, FederationConfig.model_validate(values))
    admitted_sites.write_no_sites(federation)
    certificates.write_authority(federation.tls, "hearts")
    certificates.write_server(federation.tls, federation.config.hosts())
    return federation


def write_key_pair(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> Path:
    """A private key `name` in OpenSSH format and its public key `name.pub`, whose path is returned."""
    key = ec.generate_private_key(curve or ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / name).write_bytes(private)
    (folder / name).chmod(0o600)
    path = folder / f"{name}.pub"
    path.write_bytes(public + f" {name}@hospital\n".encode())
    return path
