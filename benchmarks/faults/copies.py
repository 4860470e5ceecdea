"""Backups put back, copies, other versions, and certificates that expire."""

from __future__ import annotations

import datetime
import os
import shutil
import time

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from benchmarks.faults.parts import (
    expect_end,
    expect_end_or_resume,
    expect_resume,
    find_sentence,
    kill_daemon,
    row,
)
from tests.deployment import Deployment, wait_until
from tests.federation import DAY, Authority, app_of
from tests.invariants import (
    read_charges,
)


@row
def ledger_restored(made: Deployment) -> str:
    """a site's ledger is put back from before the last run"""
    site, kept, now = made.sites["beta"], made.folder / "ledger-before", made.folder / "ledger-now"
    expect_end(made.start_run(rounds=2))
    place = site.ledger
    shutil.copytree(place, kept)
    expect_end(made.start_run(rounds=2))
    made.stop_site("beta")
    shutil.move(place, now)
    shutil.copytree(kept, place)
    try:
        made.start_sites()
        run = made.start_run(rounds=2, cohort__join_timeout_s=20)
        said = expect_end_or_resume(made, run)
        assert "beta" not in made.rounds()[-1].sites, "it took part with an old ledger"
        return f"{said} without the site, which said {find_sentence(site.read_log(), 'older', 'recover')!r}"
    finally:
        made.stop_site("beta")
        shutil.rmtree(place)
        shutil.move(now, place)
        shutil.rmtree(kept)


@row
def coordinator_restored(made: Deployment) -> str:
    """the coordinator's folder is put back to a state two rounds older, in the middle of a run"""
    run = made.start_run(rounds=5)
    made.wait_for_round(2, run=run)
    kept = made.folder / "fed-before"
    shutil.copytree(made.fed, kept, ignore_dangling_symlinks=True)
    made.wait_for_round(4, run=run)
    kill_daemon(made)
    run.wait(200)
    assert wait_until(lambda: made.find_run_process() is None, 30)
    shutil.move(made.fed, made.folder / "fed-lost")
    shutil.move(kept, made.fed)
    charged = {name: len(read_charges(site.ledger)) for name, site in made.sites.items()}
    said = expect_resume(made, run)
    more = {name: len(read_charges(site.ledger)) - charged[name] for name, site in made.sites.items()}
    shutil.rmtree(made.folder / "fed-lost")
    return f"{said}; further rounds charged: {more}"


@row
def second_coordinator(made: Deployment) -> str:
    """a second coordinator on the same folder, and on a copy of it at the same ports"""
    twin = made.folder / "fed-copy"
    shutil.copytree(made.fed, twin)
    run = made.start_run(rounds=4)
    said = []
    for folder in (made.fed, twin):
        done = made.command("coordinator", "serve", folder)
        assert done.returncode == 2, done.stderr
        said.append(done.stderr.strip().splitlines()[-1])
    shutil.rmtree(twin)
    return f"{said}; {expect_end(run)}"


@row
def upgraded(made: Deployment) -> str:
    """the coordinator's code is another one after a restart between two rounds"""
    other = made.folder / "upgraded"
    app_of(other, ("client", "common", "server", "headwater", "simulations"))
    with (other / "common" / "types.py").open("a") as file:
        file.write("\n# A later release.\n")
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    made.stop()
    run.wait(60)
    charged = {name: len(read_charges(site.ledger)) for name, site in made.sites.items()}
    made.root, before = other, made.root
    made.start_coordinator()
    again = made.resume()
    code = again.wait(300)
    made.stop()
    made.root = before
    assert code in (1, 2), again.read_log()
    assert charged == {name: len(read_charges(site.ledger)) for name, site in made.sites.items()}
    made.start_coordinator()
    last = made.resume()
    assert last.wait(400) == 0, last.last_line
    shutil.rmtree(other)
    return f"{again.last_line!r}; nothing spent; with the old release resumed and completed"


@row
def certificate_expires(made: Deployment) -> str:
    """the server's certificate expires on a running link; its staff renews it"""
    run = made.start_run(rounds=12)
    made.wait_for_round(2, run=run)
    _write_certificate(made, seconds=12)
    time.sleep(3)
    for site in made.sites.values():
        site.proxy.drop()
    time.sleep(15)
    for site in made.sites.values():
        site.proxy.drop()
    time.sleep(10)
    ended = [site.last_line[10:] for site in made.sites.values() if not site.is_running()]
    status = made.command("coordinator", "status", made.fed)
    made.must("coordinator", "renew", made.fed)
    time.sleep(3)
    made.start_sites()
    said = expect_end_or_resume(made, run)
    return f"status {status.returncode}; {len(ended)} site(s) ended{f' ({ended[0]!r})' if ended else ''}; {said}"


def _write_certificate(made: Deployment, *, seconds: float) -> None:
    """A server certificate of the federation's authority that expires soon."""
    tls = made.fed / "tls"
    certificate = x509.load_pem_x509_certificate((tls / "ca.crt").read_bytes())
    key = load_pem_private_key((tls / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    soon = datetime.timedelta(seconds=seconds)
    crt, private = Authority(certificate.subject, key, certificate).issue(made.folder / "short", valid=(-DAY, soon))
    os.replace(private, tls / "server.key")
    os.replace(crt, tls / "server.crt")
