"""The federation folder: settings, certificates, admitted sites and kits, as files and through the real commands."""

from __future__ import annotations

import datetime
import json
import os
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from client.connection import keys as site_keys
from client.connection.kit import read_kit
from common.process.address import Address
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load
from server.__main__ import app
from server.deployment import admitted_sites, certificates
from server.deployment.federation import FederationConfig, open_federation
from server.deployment.kit import write_kits
from tests.server.deployment.federations import new_federation, write_key_pair

ROOT = Path(__file__).resolve().parents[3]
RUN = """
name: {name}
seed: 3
rounds: 2
backbone: {{kind: identity, dim: 4}}
tasks: {{size: {{kind: classification, labels: [small, large]}}}}
solver: {{kind: dp_sgd, sampling_rate: 1.0, steps: 2, clip_norm: 1.0, learning_rate: 1.0}}
privacy: {{unit: example, delta: 1.0e-5, noise_multiplier: 2.0}}
aggregation: {{kind: mean}}
"""


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def init(folder: Path, *more: str) -> tuple[int, str]:
    return command("init", folder, "--name", "hearts", "--address", "fed.example.org:9092", *more)


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_makes_a_folder_whose_secrets_only_its_owner_can_read(tmp_path: Path) -> None:
    code, _ = init(tmp_path / "fed")
    assert code == 0
    for path in [tmp_path / "fed", *(tmp_path / "fed").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & 0o077, path
    federation = open_federation(tmp_path / "fed")
    assert federation.config.bind == Address("0.0.0.0", 9092)
    assert admitted_sites.load_all_sites(federation) == []


def test_the_example_run_file_is_valid(tmp_path: Path) -> None:
    init(tmp_path / "fed")
    run = load(RunConfig, tmp_path / "fed" / "run.yaml")
    assert run.cohort.min_sites == 2
    assert run.solver.kind == "head_sum" and run.chosen  # What `auto`, as in README, takes for a linear head.


def test_init_leaves_a_folder_with_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, output = init(tmp_path)
    assert code == 2
    assert "new or empty folder" in output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--address", "fed.example.org"], "--address"),
        (["--address", "fed.example.org:99999"], "--address"),
        (["--address", "fd00::1:9092"], "--address"),
        (["--also", "not a host"], "also"),
        (["--bind", "fed.example.org:9092"], "bind"),
        (["--name", "Hearts!"], "name"),
    ],
)
def test_init_refuses_what_is_no_address_or_name(tmp_path: Path, arguments: list[str], key: str) -> None:
    code, output = init(tmp_path / "fed", *arguments)
    assert code == 2
    assert output.startswith("error: " + key)
    assert output.count("\n") == 1
    assert not (tmp_path / "fed").exists()


def test_unknown_settings_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    init(tmp_path / "fed")
    with (tmp_path / "fed" / "federation.yaml").open("a") as file:
        file.write("helth_port: 1\n")
    with pytest.raises(BadInput, match=r"helth_port: unknown key \(nearest: 'health_port'\)"):
        open_federation(tmp_path / "fed")


def test_three_listeners_need_three_ports() -> None:
    values = {"name": "a", "address": "a:1", "bind": "0.0.0.0:1", "control_port": 2, "health_port": 2}
    with pytest.raises(ValueError, match="three different ports"):
        FederationConfig.model_validate(values)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write everywhere")
def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    federation.runs.chmod(0o500)
    with pytest.raises(BadInput, match="can write"):
        open_federation(tmp_path / "fed")


# --- certificates ----------------------------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; raises SSLError where one side refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=host),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def contexts(tls: Path, ca: Path | None = None) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls / "server.crt", tls / "server.key")
    client = ssl.create_default_context(cafile=str(ca or tls / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    return server, client


def test_the_certificate_holds_for_every_public_name_and_no_other(tmp_path: Path) -> None:
    init(tmp_path / "fed", "--also", "203.0.113.7", "--also", "2001:db8::7", "--bind", "10.0.0.5:8443")
    server, client = contexts(tmp_path / "fed" / "tls")
    for host in ("fed.example.org", "203.0.113.7", "2001:db8::7"):
        handshake(server, client, host)
    for host in ("other.example.org", "10.0.0.5"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(server, client, host)


def test_another_federations_authority_does_not_vouch_for_this_server(tmp_path: Path) -> None:
    init(tmp_path / "fed")
    init(tmp_path / "other")
    server, client = contexts(tmp_path / "fed" / "tls", ca=tmp_path / "other" / "tls" / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "fed.example.org")


def test_the_server_certificate_cannot_sign_others(tmp_path: Path) -> None:
    init(tmp_path / "fed")
    certificate = x509.load_pem_x509_certificate((tmp_path / "fed" / "tls" / "server.crt").read_bytes())
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False


def test_renewing_keeps_the_authority_that_sites_trust(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    ca, server = (federation.tls / "ca.crt").read_bytes(), (federation.tls / "server.crt").read_bytes()
    code, output = command("renew", tmp_path / "fed")
    assert (code, "sites need nothing" in output) == (0, True)
    assert (federation.tls / "ca.crt").read_bytes() == ca
    assert (federation.tls / "server.crt").read_bytes() != server
    handshake(*contexts(federation.tls), "localhost")


def test_a_new_authority_at_once_is_said_to_need_new_kits(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    ca = (federation.tls / "ca.crt").read_bytes()
    code, output = command("renew", tmp_path / "fed", "--ca", "--at-once")
    assert (code, "new kit" in output) == (0, True)
    assert (federation.tls / "ca.crt").read_bytes() != ca
    handshake(*contexts(federation.tls), "localhost")


def test_an_expired_certificate_is_refused_with_its_date_and_remedy(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    certificates.write_server(federation.tls, ["localhost"], days=-2)
    expired = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    with pytest.raises(BadInput, match=rf"expired on {expired:%Y-%m-%d}; `headwater coordinator renew`"):
        certificates.check_server(federation.tls, ["localhost"])


def test_a_changed_address_needs_another_certificate(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with pytest.raises(BadInput, match=r"moved\.example\.org.*renew"):
        certificates.check_server(federation.tls, ["moved.example.org"])


# --- admitted sites --------------------------------------------------------------------------------------------------


def test_an_admitted_site_is_found_by_its_key_and_fingerprint(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    path = write_key_pair(tmp_path, "north")
    code, output = command("admit", tmp_path / "fed", "north", "--key", path)
    assert code == 0
    printed = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1] in output
    assert list(admitted_sites.load_admitted_sites(federation)) == ["north"]


def test_a_private_key_is_refused_and_not_copied(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    write_key_pair(tmp_path, "north")
    code, output = command("admit", tmp_path / "fed", "north", "--key", tmp_path / "north")
    assert (code, "PRIVATE" in output, output.count("\n")) == (2, True, 1)
    assert admitted_sites.load_all_sites(federation) == []


@pytest.mark.parametrize("content", ["", "ssh-rsa AAAA", "hello", "ecdsa-sha2-nistp384 AAAA north"])
def test_a_file_that_is_no_key_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    new_federation(tmp_path / "fed")
    (tmp_path / "key.pub").write_text(content)
    code, output = command("admit", tmp_path / "fed", "north", "--key", tmp_path / "key.pub")
    assert (code, output.count("\n")) == (2, 1)
    assert "P-384 public key in OpenSSH format" in output


def test_another_curve_is_refused(tmp_path: Path) -> None:
    new_federation(tmp_path / "fed")
    path = write_key_pair(tmp_path, "north", ec.SECP256R1())
    code, output = command("admit", tmp_path / "fed", "north", "--key", path)
    assert (code, "another kind" in output) == (2, True)


def test_neither_a_name_nor_a_key_is_admitted_twice(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    first, second = write_key_pair(tmp_path, "north"), write_key_pair(tmp_path, "south")
    admitted_sites.admit_site(federation, "north", first)
    with pytest.raises(BadInput, match="admitted already, for site north"):
        admitted_sites.admit_site(federation, "south", first)
    with pytest.raises(BadInput, match="site north is admitted already"):
        admitted_sites.admit_site(federation, "north", second)


def test_a_key_with_another_comment_is_the_same_key(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    path = write_key_pair(tmp_path, "north")
    admitted_sites.admit_site(federation, "north", path)
    path.write_text(" ".join(path.read_text().split()[:2]) + " somebody-else\n")
    with pytest.raises(BadInput, match="admitted already"):
        admitted_sites.admit_site(federation, "south", path)


def test_a_removed_key_stays_revoked_and_a_new_one_may_come(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    old, new = write_key_pair(tmp_path, "old"), write_key_pair(tmp_path, "new")
    admitted_sites.admit_site(federation, "north", old)
    admitted_sites.remove_site(federation, "north")
    assert admitted_sites.load_admitted_sites(federation) == {}
    with pytest.raises(BadInput, match="stays revoked"):
        admitted_sites.admit_site(federation, "north", old)
    assert admitted_sites.admit_site(federation, "north", new).removed is None


def test_removing_an_unknown_site_names_the_nearest(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    code, output = command("remove", tmp_path / "fed", "nort")
    assert (code, "nearest: 'north'" in output) == (2, True)


def test_names_become_file_names_and_nothing_else(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    path = write_key_pair(tmp_path, "north")
    for name in ("../north", "North", "", "a" * 65, "nörd"):
        with pytest.raises(BadInput, match="site's name"):
            admitted_sites.admit_site(federation, name, path)


def test_sites_admitted_at_the_same_moment_are_all_kept(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    paths = {name: write_key_pair(tmp_path, name) for name in (f"site-{number}" for number in range(12))}
    threads = [
        threading.Thread(target=admitted_sites.admit_site, args=(federation, name, path))
        for name, path in paths.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(admitted_sites.load_admitted_sites(federation)) == set(paths)


def test_a_key_made_for_another_site_is_not_admitted(tmp_path: Path) -> None:
    """It could only be revoked again, for ever."""
    new_federation(tmp_path / "fed")
    key = site_keys.write_key_pair(tmp_path / "south", "south")
    code, output = command("admit", tmp_path / "fed", "north", "--key", key)
    assert (code, "made for 'south'" in output) == (2, True)
    assert command("admit", tmp_path / "fed", "south", "--key", key)[0] == 0


def test_a_trial_on_loopback_listens_on_loopback(tmp_path: Path) -> None:
    assert command("init", tmp_path / "fed", "--name", "trial", "--address", "127.0.0.1:19092")[0] == 0
    assert open_federation(tmp_path / "fed").config.bind == Address("127.0.0.1", 19092)


# --- kit -------------------------------------------------------------------------------------------------------------


def test_a_kit_holds_what_a_site_needs_and_nothing_secret(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    (tmp_path / "run.yaml").write_text(RUN.format(name="tiny"))
    code, _ = command("kit", tmp_path / "fed", "north", "--run", tmp_path / "run.yaml", "--out", tmp_path / "kit.zip")
    assert code == 0
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) == {"kit.yaml", "ca.crt", "offers/tiny.json"}
    assert files["ca.crt"] == (federation.tls / "ca.crt").read_bytes()
    offer = json.loads(files["offers/tiny.json"])
    assert set(offer) == {"run", "backbones"}
    assert offer["run"]["name"] == "tiny"
    assert len(offer["backbones"]["backbone"]) == 64
    secrets = [path.read_bytes() for path in federation.folder.rglob("*.key")]
    assert len(secrets) == 4
    for content in files.values():
        assert b"PRIVATE" not in content
        assert not any(secret in content for secret in secrets)
        assert str(tmp_path).encode() not in content


def test_a_site_can_read_the_kit(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    (tmp_path / "run.yaml").write_text(RUN.format(name="tiny"))
    write_kits(federation, {"north": tmp_path / "kit.zip"}, [tmp_path / "run.yaml"])
    kit = read_kit(tmp_path / "kit.zip")
    assert (kit.settings.federation, kit.settings.site, kit.settings.address) == (
        "hearts",
        "north",
        federation.config.address,
    )
    assert [run.name for run in kit.runs()] == ["tiny"]


def test_a_kit_of_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    write_kits(federation, {"north": tmp_path / "one.zip"}, [])
    write_kits(federation, {"north": tmp_path / "two.zip"}, [])
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_all_admitted_sites_get_the_kits_that_each_would_get_alone(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    code, output = command("kit", tmp_path / "fed", "--all")
    assert (code, "no site is admitted" in output) == (2, True)
    for site in ("north", "south", "gone"):
        admitted_sites.admit_site(federation, site, write_key_pair(tmp_path, site))
    admitted_sites.remove_site(federation, "gone")
    (tmp_path / "run.yaml").write_text(RUN.format(name="tiny"))
    code, output = command("kit", tmp_path / "fed", "--all", "--run", tmp_path / "run.yaml", "--out", tmp_path / "kits")
    assert code == 0, output
    assert {path.name for path in (tmp_path / "kits").iterdir()} == {"north-kit.zip", "south-kit.zip"}
    for site in ("north", "south"):
        write_kits(federation, {site: tmp_path / "alone.zip"}, [tmp_path / "run.yaml"])
        assert (tmp_path / "kits" / f"{site}-kit.zip").read_bytes() == (tmp_path / "alone.zip").read_bytes()
    for arguments in ((), ("north", "--all")):
        code, output = command("kit", tmp_path / "fed", *arguments)
        assert (code, "a site's name or --all" in output) == (2, True)


def test_a_site_can_get_its_kit_before_its_key_is_known(tmp_path: Path) -> None:
    """The kit's site file comes with the key: `client init --kit`, then the key is sent and admitted."""
    new_federation(tmp_path / "fed")
    code, _ = command("kit", tmp_path / "fed", "north", "--out", tmp_path / "kit.zip")
    assert code == 0
    assert read_kit(tmp_path / "kit.zip").settings.site == "north"
    code, output = command("kit", tmp_path / "fed", "../north", "--out", tmp_path / "other.zip")
    assert (code, "a site's name" in output) == (2, True)


def test_a_folder_that_is_no_federation_is_said_by_the_real_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "kit", str(tmp_path), "north"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "headwater coordinator init" in done.stderr
