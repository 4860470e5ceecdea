"""A line that harms what is sent: nothing it does to a connection is final, and nothing of it reaches a person raw."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from client.connection.fleet import ConnectionLost, ConnectionRefused, Fleet
from client.connection.keys import read_key
from tests.answering import Answer, answering
from tests.bad_proxy import Mode, bad_proxy
from tests.client.connection.test_fleet import coordinator
from tests.federation import (
    DAY,
    ROOT,
    Authority,
    link,
    started,
    wait_for,
    write_run,
    write_site,
)

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own build


def ask(site: Fleet) -> ConnectionLost | None:
    """The failure of one request, which may be none."""
    try:
        site.activate()
    except ConnectionLost as error:
        return error
    return None


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.PLAIN, Mode.FLIP, Mode.TRUNCATE, Mode.REORDER])
def test_whatever_a_line_does_may_pass_and_the_next_request_on_a_good_line_succeeds(tmp_path: Path, mode: Mode) -> None:
    """The harm begins before, within and after the handshake, on new connections and on open ones."""
    authority = Authority.new("test authority")
    with answering(authority.issue(tmp_path), lambda path: Answer()) as server, bad_proxy(server.address) as proxy:
        where = coordinator(tmp_path / "site", proxy.address, authority)
        site = Fleet(where, read_key(where.key), stopping=threading.Event(), timeout_s=1.0)
        failures = []
        with contextlib.closing(site):
            for clean_bytes in (0, 100, 700, 2500):
                proxy.mode, proxy.clean_bytes = mode, clean_bytes
                failures += [ask(site), ask(site)]
                proxy.mode = Mode.PASS
                until = time.monotonic() + 10
                while (failed := ask(site)) is not None and time.monotonic() < until:
                    failures.append(failed)  # Of a connection that was harmed before.
                assert failed is None
        lost = [each for each in failures if each is not None]
        assert lost and proxy.num_harmed
        for each in lost:
            assert "\n" not in str(each)
            assert len(site.explain_loss(each)) > 20


def test_a_certificate_of_another_authority_is_final_also_for_a_site_that_had_joined(tmp_path: Path) -> None:
    authority = Authority.new("test authority")
    with (
        answering(authority.issue(tmp_path / "a"), lambda path: Answer()) as server,
        answering(Authority.new("inspection").issue(tmp_path / "b"), lambda path: Answer()) as other,
        bad_proxy(server.address) as proxy,
    ):
        where = coordinator(tmp_path / "site", proxy.address, authority)
        site = Fleet(where, read_key(where.key), stopping=threading.Event(), timeout_s=2.0)
        with contextlib.closing(site):
            assert ask(site) is None
            proxy.target = other.address
            proxy.drop()
            with pytest.raises(ConnectionRefused, match="issued by CN=inspection"):
                ask(site), ask(site)  # The first may meet the old connection, which is closed.
        assert other.asked == []


def test_a_transfer_is_tried_again_until_the_line_is_back_and_says_so_once(tmp_path: Path) -> None:
    authority, said = Authority.new("test authority"), list[str]()
    with answering(authority.issue(tmp_path), lambda path: Answer()) as server, bad_proxy(server.address) as proxy:
        where = coordinator(tmp_path / "site", proxy.address, authority)
        site = Fleet(where, read_key(where.key), stopping=threading.Event(), report=said.append, timeout_s=1.0)
        proxy.mode = Mode.REFUSE
        threading.Timer(1.5, lambda: setattr(proxy, "mode", Mode.PASS)).start()
        with contextlib.closing(site):
            assert site.fetch_bundle(7, 5) == b""
        (sentence,) = said
        assert sentence.startswith("a transfer is tried again for 600 s: ")


# --- real processes --------------------------------------------------------------------------------------------------


def count(log: Path, text: str) -> int:
    return log.read_text().count(text)


def wait_for_another(log: Path, text: str, before: int, timeout_s: float = 60.0) -> None:
    """Waits until the log holds a text more often than before."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if count(log, text) > before:
            return
        time.sleep(0.1)
    raise AssertionError(f"expected another {text!r} in:\n{log.read_text()}")


@pytest.mark.slow
def test_a_site_outlives_a_bad_line_an_expired_certificate_and_a_proxy_without_a_coordinator(tmp_path: Path) -> None:
    """One site through one fault after the other; after each it is joined again, and at the end it trains a run."""
    authority = Authority.new("test authority")
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(link(tmp_path / "link", authority=authority))
        proxy = stack.enter_context(bad_proxy(where.address))
        site = write_site(tmp_path / "a", "a", proxy.address, where.ca)
        where.admit(tmp_path / "a" / "keys" / "a.pub")
        log = tmp_path / "a.log"
        with started(site, log) as child:
            wait_for(log, "joined", child=child)
            faults = {
                Mode.FLIP: "not joined: ",
                Mode.PLAIN: "answers without TLS: a proxy on the way has no coordinator behind it",
            }
            for mode, words in faults.items():
                lost, back = count(log, words), count(log, "joined 127")
                proxy.mode = mode
                wait_for_another(log, words, lost)
                proxy.mode = Mode.PASS
                proxy.drop()
                wait_for_another(log, "joined 127", back)
                assert child.poll() is None
            expired = authority.issue(tmp_path / "old", valid=(-9 * DAY, -DAY))
            with answering(expired, lambda path: Answer()) as renewing:
                back = count(log, "joined 127")
                proxy.target = renewing.address
                proxy.drop()
                wait_for(log, "certificate expired on", child=child)
                proxy.target = where.address
            wait_for_another(log, "joined 127", back)
            with answering(authority.issue(tmp_path / "new"), lambda path: Answer(status=404)) as elsewhere:
                back = count(log, "joined 127")
                proxy.target = elsewhere.address
                proxy.drop()
                wait_for(log, "is no coordinator of this version (status 404)", child=child)
                proxy.target = where.address
                proxy.drop()
            wait_for_another(log, "joined 127", back)
            cohort = {"cohort": {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 60}}
            run = where.submit(ROOT, write_run(tmp_path / "run.yaml", **cohort), tmp_path / "runs")
            wait_for(log, "asked: train", child=child)
            proxy.drop()  # In the middle of it.
            assert where.finished(run) == "finished:completed"
            assert child.poll() is None
            assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_patience_that_ends_in_a_running_run_says_what_to_do_in_one_sentence(tmp_path: Path) -> None:
    authority = Authority.new("test authority")
    with answering(authority.issue(tmp_path), lambda path: Answer()) as server, bad_proxy(server.address) as proxy:
        site = write_site(tmp_path / "b", "b", proxy.address, authority.write(tmp_path / "ca.crt"))
        log = tmp_path / "b.log"
        with started(site, log, "--patience", "0.05") as child:
            wait_for(log, "joined", child=child)
            proxy.mode = Mode.REFUSE
            proxy.drop()
            assert child.wait(timeout=60) == 1
        seen = log.read_text().splitlines()[-1]
        assert seen.startswith("error: gave up after 3 s: ")
        assert "`headwater site start` again" in seen and "sent at no further cost" in seen


@pytest.mark.slow
def test_a_clock_that_is_wrong_for_a_while_is_tried_again_with_the_sentence(tmp_path: Path) -> None:
    authority, answers = Authority.new("test authority"), [Answer(status=401, date="Fri, 01 Jan 2100 00:00:00 GMT")]
    with answering(authority.issue(tmp_path), lambda path: answers[-1]) as server:
        site = write_site(tmp_path / "c", "c", server.address, authority.write(tmp_path / "ca.crt"))
        log = tmp_path / "c.log"
        with started(site, log) as child:
            wait_for(log, "s behind the coordinator's, and signatures carry the time: set the clock", child=child)
            answers.append(Answer())
            wait_for(log, "joined 127", child=child)
