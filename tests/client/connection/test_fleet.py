"""What a coordinator can do to a connection: nothing unbounded, nothing elsewhere; each failure is a sentence."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from hashlib import sha256
from pathlib import Path

import pytest

from client.config import Coordinator
from client.connection.diagnose import (
    create_trusting_context,
    diagnose_connection,
    explain_clock_skew,
    explain_connection_failure,
    find_proxy,
    open_tls,
)
from client.connection.fleet import (
    ConnectionLost,
    ConnectionRefused,
    Delivery,
    ExplainedLoss,
    Fleet,
    InvalidAnswer,
    Outgoing,
    RunInactive,
    UploadTooLarge,
)
from client.connection.keys import read_key, write_key_pair
from common.flower import fleet_pb2, message_pb2
from tests.answering import Answer, Answering, answering
from tests.federation import DAY, Authority, free_port

HOUR = datetime.timedelta(hours=1)
Reached = Callable[[str], Answer]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.new("test authority")


def coordinator(folder: Path, address: str, authority: Authority) -> Coordinator:
    folder.mkdir(exist_ok=True)
    if not (folder / "key").exists():
        write_key_pair(folder / "key", "site")
    return Coordinator(address=address, ca=authority.write(folder / "ca.crt"), key=folder / "key")


@contextlib.contextmanager
def fleet(where: Coordinator) -> Iterator[Fleet]:
    connection = Fleet(where, read_key(where.key), stopping=threading.Event(), timeout_s=5.0)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def reached(folder: Path, authority: Authority, answer: Reached) -> Iterator[tuple[Fleet, Answering]]:
    with (
        answering(authority.issue(folder), answer) as server,
        fleet(coordinator(folder, server.address, authority)) as connection,
    ):
        yield connection, server


def fetch(site: Fleet) -> Delivery:
    """Returns the message that waits, with its content."""
    claim = site.claim_message(7)
    assert claim is not None
    return site.fetch_content(7, claim)


def delivered(objects: dict[str, bytes], names: list[str]) -> Reached:
    """A coordinator that hands out one message of these objects."""

    def answer(path: str) -> Answer:
        if path.endswith("pull-messages"):
            tree = message_pb2.ObjectTree(object_id=names[0])
            tree.children.extend(message_pb2.ObjectTree(object_id=name) for name in names[1:])
            message = message_pb2.Message(metadata=message_pb2.Metadata(run_id=5))
            reply = fleet_pb2.PullMessagesResponse(messages_list=[message], message_object_trees=[tree])
            return Answer(body=reply.SerializeToString())
        if path.endswith("pull-object"):
            content = objects.get(names[0], b"")
            found = message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=content)
            return Answer(body=found.SerializeToString())
        return Answer()

    return answer


def test_a_message_arrives_whole_and_its_parts_are_named_by_their_digests(tmp_path: Path, authority: Authority) -> None:
    content = b"RecordDict,,5\x00hello"
    name = sha256(content).hexdigest()
    with reached(tmp_path, authority, delivered({name: content}, [name])) as (site, server):
        delivery = fetch(site)
        assert (delivery.root, dict(delivery.objects)) == (name, {name: content})
        assert server.asked[-1] == "/v1/fleet/confirm-message-received"


def test_a_part_that_is_not_what_its_digest_says_is_refused(tmp_path: Path, authority: Authority) -> None:
    name = sha256(b"agreed").hexdigest()
    with reached(tmp_path, authority, delivered({name: b"another"}, [name])) as (site, server):
        with pytest.raises(InvalidAnswer, match="digest"):
            fetch(site)
        assert "/v1/fleet/confirm-message-received" not in server.asked


def test_a_message_of_too_many_parts_is_refused_before_any_is_fetched(tmp_path: Path, authority: Authority) -> None:
    tree = message_pb2.ObjectTree(object_id="0")
    tree.children.extend(message_pb2.ObjectTree() for _ in range(100_001))
    reply = fleet_pb2.PullMessagesResponse(messages_list=[message_pb2.Message()], message_object_trees=[tree])
    with reached(tmp_path, authority, lambda path: Answer(body=reply.SerializeToString())) as (site, server):
        with pytest.raises(InvalidAnswer, match="parts"):
            fetch(site)
        assert server.asked == ["/v1/fleet/pull-messages"]


def test_an_answer_beyond_its_bound_is_not_read_to_its_end(tmp_path: Path, authority: Authority) -> None:
    with (
        reached(tmp_path, authority, lambda path: Answer(body=bytes(5 << 20))) as (site, _),
        pytest.raises(InvalidAnswer, match="larger than"),
    ):
        site.activate()


def test_a_redirect_is_not_followed(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.issue(tmp_path)
    with answering(certificate, lambda path: Answer()) as elsewhere:
        moved = Answer(status=307, headers={"location": f"https://{elsewhere.address}/v1/fleet/activate-node"})
        with (
            reached(tmp_path, authority, lambda path: moved) as (site, _),
            pytest.raises(ConnectionRefused, match="version"),
        ):
            site.activate()
        assert elsewhere.asked == []


def test_bytes_that_are_no_answer_are_a_fault_and_no_crash(tmp_path: Path, authority: Authority) -> None:
    with (
        reached(tmp_path, authority, lambda path: Answer(body=b"\xff\xff<html>")) as (site, _),
        pytest.raises(InvalidAnswer, match="cannot be read"),
    ):
        site.activate()


@pytest.mark.parametrize(
    ("status", "path", "kind", "words"),
    [
        (412, "activate-node", ConnectionRefused, "does not know this site's key"),
        (401, "activate-node", ConnectionRefused, "does not know this site's key"),
        (404, "activate-node", ConnectionRefused, "no coordinator"),
        (403, "activate-node", ConnectionRefused, "no coordinator"),
        (503, "activate-node", ConnectionLost, "503"),
        (500, "activate-node", ConnectionLost, "500"),
        (429, "activate-node", ConnectionLost, "429"),
        (400, "activate-node", InvalidAnswer, "400"),
    ],
)
def test_each_status_has_its_meaning(
    tmp_path: Path, authority: Authority, status: int, path: str, kind: type[Exception], words: str
) -> None:
    with reached(tmp_path, authority, lambda path: Answer(status=status)) as (site, server):
        with pytest.raises(kind, match=words):
            site.activate()
        assert server.asked == [f"/v1/fleet/{path}"]


def test_a_run_that_is_over_is_said_of_requests_about_a_run_only(tmp_path: Path, authority: Authority) -> None:
    with (
        reached(tmp_path, authority, lambda path: Answer(status=403)) as (site, _),
        pytest.raises(RunInactive, match="not running"),
    ):
        site.fetch_bundle(7, 5)


@pytest.mark.parametrize("status", [301, 403, 404])
def test_something_else_at_the_address_is_final_only_before_the_coordinator_has_answered_once(
    tmp_path: Path, authority: Authority, status: int
) -> None:
    answers = [Answer(), Answer(status=status)]
    with reached(tmp_path, authority, lambda path: answers.pop(0)) as (site, _):
        site.activate()
        with pytest.raises(ExplainedLoss, match="check coordinator.address"):
            site.activate()


@pytest.mark.parametrize(("hours", "side"), [(-1, "ahead of"), (1, "behind")])
def test_a_refused_signature_with_a_wrong_clock_names_the_clock(
    tmp_path: Path, authority: Authority, hours: int, side: str
) -> None:
    date = format_datetime(datetime.datetime.now(datetime.UTC) + hours * HOUR, usegmt=True)
    with (
        reached(tmp_path, authority, lambda path: Answer(status=401, date=date)) as (site, _),
        pytest.raises(ExplainedLoss, match=rf"3\d\d\d s {side} the coordinator's"),
    ):
        site.activate()


def test_a_key_that_was_known_is_not_refused_for_good_at_once(tmp_path: Path, authority: Authority) -> None:
    """A coordinator's clock that is moved refuses signatures, while the time that it states is still the old one."""
    answers = [Answer(), Answer(status=401), Answer(status=401), Answer()]
    with reached(tmp_path, authority, lambda path: answers.pop(0)) as (site, _):
        site.activate()
        for _ in range(2):
            with pytest.raises(ExplainedLoss, match="refuses this site's signature"):
                site.activate()
        site.activate()


def test_the_clock_may_differ_by_what_flower_tolerates() -> None:
    assert [explain_clock_skew(skew) is None for skew in (None, 0.0, 3.0, -200.0, 5.0, -305.0)] == [True] * 4 + [
        False
    ] * 2


# --- certificates ----------------------------------------------------------------------------------------------------


def sentence(folder: Path, server: Answering, trusted: Authority, kind: type[Exception] = ConnectionRefused) -> str:
    """What is said of a certificate; `kind` tells whether it is final."""
    where = coordinator(folder, server.address, trusted)
    with fleet(where) as site, pytest.raises(kind) as refused:
        site.activate()
    assert server.asked == []  # Nothing was said to a server that is not trusted.
    found = diagnose_connection(where)
    assert found is not None
    assert str(refused.value) == found.sentence
    assert type(refused.value) is kind
    return str(refused.value)


def test_an_intercepting_proxy_is_named_by_its_issuer(tmp_path: Path, authority: Authority) -> None:
    proxy = Authority.new("Hospital TLS inspection")
    with answering(proxy.issue(tmp_path), lambda path: Answer()) as server:
        said = sentence(tmp_path / "site", server, authority)
    assert "issued by CN=Hospital TLS inspection" in said
    assert "CN=test authority" in said
    assert "intercepts" in said


def test_an_authority_of_the_same_name_with_another_key_is_told_apart(tmp_path: Path, authority: Authority) -> None:
    with answering(Authority.new("test authority").issue(tmp_path), lambda path: Answer()) as server:
        assert "is not signed by the one in" in sentence(tmp_path / "site", server, authority)


def test_an_expired_certificate_says_when(tmp_path: Path, authority: Authority) -> None:
    with answering(authority.issue(tmp_path, valid=(-10 * DAY, -2 * DAY)), lambda path: Answer()) as server:
        said = sentence(tmp_path / "site", server, authority, ExplainedLoss)
    day = datetime.datetime.now(datetime.UTC) - 2 * DAY
    assert f"expired on {day:%Y-%m-%d}" in said
    assert "coordinator renew" in said


def test_a_certificate_of_tomorrow_points_to_the_clock(tmp_path: Path, authority: Authority) -> None:
    with answering(authority.issue(tmp_path, valid=(DAY, 9 * DAY)), lambda path: Answer()) as server:
        assert "set the clock" in sentence(tmp_path / "site", server, authority, ExplainedLoss)


def test_a_certificate_for_another_name_lists_its_names(tmp_path: Path, authority: Authority) -> None:
    names = ("federation.example.org", "10.1.2.3")
    with answering(authority.issue(tmp_path, names=names), lambda path: Answer()) as server:
        assert "is for federation.example.org, 10.1.2.3, not for 127.0.0.1" in sentence(
            tmp_path / "site", server, authority
        )


def test_an_expired_authority_says_that_the_site_needs_a_new_kit(tmp_path: Path) -> None:
    expired = Authority.new("test authority", valid=(-9 * DAY, -DAY))
    with answering(expired.issue(tmp_path), lambda path: Answer()) as server:
        said = sentence(tmp_path / "site", server, expired, ExplainedLoss)
    assert "ca.crt expired on" in said and "new kit" in said


def test_nothing_is_said_to_a_server_without_tls_also_on_loopback(tmp_path: Path, authority: Authority) -> None:
    with answering(None, lambda path: Answer()) as server:
        assert "answers without TLS" in sentence(tmp_path / "site", server, authority, ExplainedLoss)


def test_nobody_there_is_a_lost_connection_with_a_remedy(tmp_path: Path, authority: Authority) -> None:
    where = coordinator(tmp_path, f"127.0.0.1:{free_port()}", authority)
    with fleet(where) as site, pytest.raises(ConnectionLost):
        site.activate()
    with pytest.raises(OSError) as refused:
        open_tls(where, create_trusting_context(where.ca))
    assert "refuses connections" in explain_connection_failure(where, refused.value)


# --- the way out -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("address", "exempt", "expected"),
    [
        ("federation.example.org:9092", "", "http://proxy:3128"),
        ("federation.example.org:9092", "example.org", None),
        ("federation.example.org:9092", "other.org", "http://proxy:3128"),
        ("127.0.0.1:9092", "", None),
        ("localhost:9092", "", None),
        ("[::1]:9092", "", None),
    ],
)
def test_the_environments_proxy_is_used_outward_and_loopback_bypasses_it(
    tmp_path: Path,
    authority: Authority,
    no_proxies: pytest.MonkeyPatch,
    address: str,
    exempt: str,
    expected: str | None,
) -> None:
    no_proxies.setenv("HTTPS_PROXY", "http://proxy:3128")
    no_proxies.setenv("NO_PROXY", exempt)
    assert find_proxy(coordinator(tmp_path, address, authority)) == expected


def test_without_a_proxy_in_the_environment_the_way_is_direct(
    tmp_path: Path, authority: Authority, no_proxies: pytest.MonkeyPatch
) -> None:
    assert find_proxy(coordinator(tmp_path, "federation.example.org:9092", authority)) is None


def outgoing(size: int) -> Outgoing:
    content = b"x" * size
    name = sha256(content).hexdigest()
    return Outgoing(message_pb2.Message(), message_pb2.ObjectTree(object_id=name), {name: content})


def test_a_reply_above_the_stated_bound_is_not_begun(tmp_path: Path, authority: Authority) -> None:
    """Begun and not ended, it would keep the coordinator waiting for the rest of it."""
    with reached(tmp_path, authority, lambda path: Answer(headers={"x-headwater-max-upload": "5000"})) as (
        site,
        server,
    ):
        site.activate()
        with pytest.raises(UploadTooLarge, match=r"4,500 bytes .* takes 5,000.*max_upload_mib"):
            site.push_reply(7, outgoing(4500))
        assert server.asked == ["/v1/fleet/activate-node"]
        site.push_reply(7, outgoing(3000))
        assert server.asked[-1] == "/v1/fleet/push-messages"


def test_an_upload_that_a_proxy_refuses_by_its_size_is_not_tried_again(tmp_path: Path, authority: Authority) -> None:
    with reached(tmp_path, authority, lambda path: Answer(status=413)) as (site, server):
        with pytest.raises(UploadTooLarge, match="proxy"):
            site.push_reply(7, outgoing(10))
        assert len(server.asked) == 1


def test_a_push_that_broke_after_the_run_took_the_envelope_brings_the_parts(
    tmp_path: Path, authority: Authority
) -> None:
    """Asked again, Flower names no part that is missing, and a run that has the envelope would wait for them."""
    reply = outgoing(10)
    asked = fleet_pb2.PushMessagesResponse(objects_to_push=list(reply.objects), session_id="first")
    stored = message_pb2.PushObjectResponse(stored=True).SerializeToString()
    answers = {
        "push-messages": [Answer(body=asked.SerializeToString()), Answer()],
        "push-object": [Answer(status=503), Answer(body=stored)],
    }
    with reached(tmp_path, authority, lambda path: answers[path.rpartition("/")[2]].pop(0)) as (site, server):
        site.push_reply(7, reply)
    pushed = [message_pb2.PushObjectRequest.FromString(server.bodies[at]) for at in (1, 3)]
    assert [path.rpartition("/")[2] for path in server.asked] == ["push-messages", "push-object"] * 2
    assert [(part.session_id, part.object_content) for part in pushed] == [("first", b"x" * 10), ("", b"x" * 10)]
