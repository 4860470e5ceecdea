"""A federation exchanges its authority while sites are joined: real commands of both sides, real TLS handshakes."""

from __future__ import annotations

import contextlib
import ssl
import threading
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app as site_app
from client.config import Coordinator
from client.connection.checks import _check_authorities
from client.connection.fleet import ConnectionLost, Fleet
from client.connection.keys import read_key, write_key_pair
from server.__main__ import app as coordinator_app
from server.deployment.federation import Federation
from tests.answering import Answer, answering
from tests.bad_proxy import bad_proxy
from tests.federation import DAY, Authority
from tests.server.deployment.federations import new_federation
from tests.server.deployment.test_federation import contexts, handshake


def coordinator(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(coordinator_app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def site(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(site_app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """A federation that has admitted the sites north and south, each with a kit of the first authority."""
    made = new_federation(tmp_path / "fed")
    for name in ("north", "south"):
        assert site("init", tmp_path / name, "--name", name)[0] == 0
        assert coordinator("admit", made.folder, name, "--key", tmp_path / name / "keys" / f"{name}.pub")[0] == 0
        take_new_kit(made, tmp_path / name)
    return made


def take_new_kit(federation: Federation, folder: Path) -> None:
    kit = folder.parent / f"{folder.name}.zip"
    code, said = coordinator("kit", federation.folder, folder.name, "--out", kit)
    assert code == 0, said
    code, said = site("init", folder, "--kit", kit)
    assert code == 0, said


def renew(federation: Federation, *options: str) -> str:
    code, said = coordinator("renew", federation.folder, *options)
    assert code == 0, said
    return said


def can_join(federation: Federation, folder: Path) -> bool:
    """Whether a site's TLS handshake with the coordinator's present certificate succeeds."""
    try:
        handshake(*contexts(federation.tls, ca=folder / "ca.crt"), "localhost")
    except ssl.SSLCertVerificationError:
        return False
    return True


def test_authorities_are_exchanged_without_a_moment_in_which_a_site_with_its_kits_is_locked_out(
    federation: Federation, tmp_path: Path
) -> None:
    north, south = tmp_path / "north", tmp_path / "south"
    assert "nothing changes for sites yet" in renew(federation, "--ca")
    assert can_join(federation, north) and can_join(federation, south)
    take_new_kit(federation, north)
    assert (north / "ca.crt").read_text().count("BEGIN CERTIFICATE") == 2
    code, said = coordinator("renew", federation.folder, "--ca", "--switch")
    assert code == 2 and "a new kit for each site first, there is none for south" in said
    assert can_join(federation, north) and can_join(federation, south)
    renew(federation, "--ca", "--switch", "--force")
    assert can_join(federation, north) and not can_join(federation, south)
    renew(federation, "--ca", "--switch")  # Taken back: south had not been waited for.
    assert can_join(federation, north) and can_join(federation, south)
    take_new_kit(federation, south)
    assert "join as before" in renew(federation, "--ca", "--switch")
    assert can_join(federation, north) and can_join(federation, south)
    renew(federation)  # The server's certificate alone, signed by the new authority.
    assert can_join(federation, north) and can_join(federation, south)
    renew(federation, "--ca", "--retire")
    assert can_join(federation, north) and can_join(federation, south)
    take_new_kit(federation, north)
    assert (north / "ca.crt").read_text().count("BEGIN CERTIFICATE") == 1
    assert can_join(federation, north)


def test_a_site_that_missed_the_exchange_takes_a_later_kit_because_the_old_authority_vouches(
    federation: Federation, tmp_path: Path
) -> None:
    for options in (("--ca",), ("--ca", "--switch", "--force"), ("--ca", "--retire")):
        renew(federation, *options)
    assert not can_join(federation, tmp_path / "south")
    take_new_kit(federation, tmp_path / "south")
    assert can_join(federation, tmp_path / "south")


def test_a_kit_with_the_true_authority_and_a_strangers_changes_nothing(federation: Federation, tmp_path: Path) -> None:
    """A certificate is no secret: that the true one is in a kit says nothing about who made the kit."""
    renew(federation, "--ca")
    coordinator("kit", federation.folder, "south", "--out", tmp_path / "true.zip")
    before = (tmp_path / "south" / "ca.crt").read_bytes()
    stranger = Authority.new("fed federation authority").write(tmp_path / "stranger.crt").read_bytes()
    with zipfile.ZipFile(tmp_path / "true.zip") as true, zipfile.ZipFile(tmp_path / "evil.zip", "w") as evil:
        for name in true.namelist():
            evil.writestr(name, before + stranger if name == "ca.crt" else true.read(name))
    code, said = site("init", tmp_path / "south", "--kit", tmp_path / "evil.zip")
    assert code == 2 and "does not vouch for it" in said
    assert (tmp_path / "south" / "ca.crt").read_bytes() == before


def test_an_authority_at_once_needs_the_staffs_word_at_each_site(federation: Federation, tmp_path: Path) -> None:
    """For a key that is lost or in other hands: whoever has the old key cannot vouch for anything any more."""
    renew(federation, "--ca")
    assert "every site needs the new authority" in renew(federation, "--ca", "--at-once")
    assert not can_join(federation, tmp_path / "south")
    coordinator("kit", federation.folder, "south", "--out", tmp_path / "new.zip")
    code, said = site("init", tmp_path / "south", "--kit", tmp_path / "new.zip")
    assert code == 2 and "in person" in said
    (tmp_path / "south" / "ca.crt").unlink()
    assert site("init", tmp_path / "south", "--kit", tmp_path / "new.zip")[0] == 0
    assert can_join(federation, tmp_path / "south")


@pytest.mark.parametrize(
    ("before", "options", "said"),
    [
        ([], ["--ca", "--switch"], "expected a second authority"),
        ([], ["--ca", "--retire"], "expected a second authority"),
        ([], ["--switch"], "expected --ca alone or with one of"),
        ([], ["--ca", "--switch", "--retire"], "expected --ca alone or with one of"),
        (["--ca"], ["--ca"], "two authorities are trusted already"),
    ],
)
def test_steps_out_of_order_change_nothing(
    federation: Federation, before: list[str], options: list[str], said: str
) -> None:
    if before:
        renew(federation, *before)
    kept = {path: path.read_bytes() for path in federation.tls.iterdir()}
    code, output = coordinator("renew", federation.folder, *options)
    assert (code, said in output) == (2, True), output
    assert {path: path.read_bytes() for path in federation.tls.iterdir()} == kept


def test_an_authority_whose_key_is_not_here_begins_no_exchange(federation: Federation, tmp_path: Path) -> None:
    (federation.tls / "ca.key").rename(tmp_path / "kept elsewhere")
    code, output = coordinator("renew", federation.folder, "--ca")
    assert code == 2 and "put your copy of it back" in output and "--at-once" in output


def test_a_running_site_trusts_what_a_new_kit_brought_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority.new("old"), Authority.new("new")
    write_key_pair(tmp_path / "key", "site")
    ca = old.write(tmp_path / "ca.crt")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(answering(old.issue(tmp_path / "a"), lambda path: Answer()))
        second = stack.enter_context(answering(new.issue(tmp_path / "b"), lambda path: Answer()))
        proxy = stack.enter_context(bad_proxy(first.address))
        where = Coordinator(address=proxy.address, ca=ca, key=tmp_path / "key")
        connection = Fleet(where, read_key(where.key), stopping=threading.Event(), timeout_s=5.0)
        stack.callback(connection.close)
        connection.activate()
        ca.write_bytes(ca.read_bytes() + new.write(tmp_path / "new.crt").read_bytes())
        proxy.target = second.address
        proxy.drop()
        for _ in range(3):
            with contextlib.suppress(ConnectionLost):
                connection.activate()
        assert second.asked


def test_check_names_each_authority_and_warns_of_one_that_expires_soon(tmp_path: Path) -> None:
    soon = Authority.new("soon", valid=(-DAY, 30 * DAY)).write(tmp_path / "soon.crt").read_bytes()
    later = Authority.new("later").write(tmp_path / "later.crt").read_bytes()
    (tmp_path / "ca.crt").write_bytes(soon + later)
    found = list(_check_authorities(tmp_path / "ca.crt"))
    assert [each.outcome for each in found] == ["warn", "pass"]
    assert "new kit" in found[0].remedy
