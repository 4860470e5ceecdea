"""What a stranger or a damaged disk hands over is accepted or refused in one sentence (benchmarks/fuzz), in short.

The inputs below are faults that longer runs found; each was mended.
"""

from __future__ import annotations

import base64
import json
import random
import ssl
from functools import cache
from pathlib import Path

import pytest

from benchmarks.fuzz import PART, Broken, Tally, Target, check, fuzz_randomly, mutate, record
from benchmarks.fuzz.targets import RUN, TARGETS
from client.connection.diagnose import read_authorities
from client.ledger import chain
from common.types import BadInput, LedgerDamaged
from common.yaml import read_yaml
from server.deployment.certificates import read_validity

DEEP = b"[" * 100_000


@cache
def open_target(name: str) -> Target:
    return TARGETS[name]()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_is_accepted(name: str) -> None:
    target = open_target(name)
    assert [check(target, content) for content in target.seeds] == [True] * len(target.seeds)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_mutations_give_nothing_but_sentences(name: str) -> None:
    target, tally, rng = open_target(name), Tally(), random.Random(name)
    for _ in range(100):
        record(target, mutate(rng.choice(target.seeds), target, rng), tally, None)
    assert not tally.faults


FAULTS: dict[str, tuple[str, bytes]] = {
    "a date that is none": ("site_file", b"name: 2026-99-99"),
    "an empty integer": ("federation_file", b'name: !!int ""'),
    "a number that is none": ("run_file", b"rounds: !!int labels"),
    "YAML nested a thousand deep": ("run_file", b"name: " + b"[" * 3000),
    "YAML that holds itself": ("site_file", b"name: &a [*a]"),
    "YAML that doubles forty times": (
        "site_file",
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)),
    ),
    "a kit whose settings double forty times": (
        "kit",
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)),
    ),
    "a value of sixty thousand characters": ("federation_file", b"address: l" + b"1" * 60_000),
    "a word of sixty thousand characters": ("site_file", b"evaluation: " + b"x" * 60_000),
    "admitted sites nested deeply": (
        "federation_file",
        b"name: hearts\naddress: localhost:9092\nbind: 127.0.0.1:9092\ncontrol_port: 9093\nhealth_port: 9094\n"
        + PART
        + DEEP,
    ),
    "witnesses nested deeply": ("witnesses", DEEP),
    "a witness whose length is a text": (
        "witnesses",
        json.dumps({"north": {"chain": "0" * 64, "length": "3", "mac": "0" * 64, "tag": "0" * 64}}).encode(),
    ),
    "a bundle's integer of 5000 digits": ("bundle", b"a = " + b"1" * 5000),
    "weights that pop from an empty stack": ("weights", b"p\x80\x02."),
    "weights that end in an integer": ("weights", b"p\x80\x02J\x00"),
    "a frame of 2**64 - 1 bytes": ("frames", b"\x00\x00\x00\x01" + b"\xff" * 8),
}


def test_a_certificate_of_an_unknown_version_is_no_certificate(tmp_path: Path) -> None:
    seed = open_target("kit").seeds[-1]
    settings, certificate, offer = seed.split(PART)
    text = b"".join(certificate.splitlines()[1:-1])
    der = base64.b64decode(text).replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03", 1)
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    assert not check(open_target("kit"), PART.join([settings, pem, offer]))
    (tmp_path / "ca.crt").write_bytes(pem)
    with pytest.raises(ValueError, match="known version"):
        read_authorities(tmp_path / "ca.crt")
    with pytest.raises(BadInput, match="expected a certificate"):
        read_validity(tmp_path / "ca.crt")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_an_input_that_was_a_fault_is_refused_in_one_sentence(name: str) -> None:
    target, content = FAULTS[name]
    assert not check(open_target(target), content)


@pytest.mark.parametrize(
    ("anchor", "said"),
    [(DEEP, "cannot be read"), (b'{"length": 1, "last": "", "mac": "\\ud800"}', "cannot be read")],
    ids=["nested deeply", "half a character"],
)
def test_an_anchor_of_anything_is_a_damaged_ledger(tmp_path: Path, anchor: bytes, said: str) -> None:
    place = tmp_path / "chain"
    chain.create(place, "created", {"number": 0})
    (place / "anchor.json").write_bytes(anchor)
    with pytest.raises(LedgerDamaged, match=said), chain.exclusive(place):
        pass


def test_a_line_nested_deeply_is_not_legible_and_others_are(tmp_path: Path) -> None:
    place = tmp_path / "chain"
    chain.create(place, "created", {"number": 0})
    with (place / "ledger.jsonl").open("ab") as file:
        file.write(DEEP + b"\n")
    assert [line["event"] for line in chain.read_legible(place)] == ["created"]


def test_a_long_list_and_aliases_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("a: &a {b: 1}\nc: [*a, *a]\nd: [" + "1, " * 10_000 + "1]\n")
    assert read_yaml(path)["c"] == [{"b": 1}, {"b": 1}]
    path.write_text("\n".join("a: 1" for _ in range(3)) + "\nb: ${NO_SUCH_VARIABLE}\n")
    with pytest.raises(BadInput, match="NO_SUCH_VARIABLE"):
        read_yaml(path)


# --- the fuzzer itself -----------------------------------------------------------------------------------------------


def test_the_fuzzer_finds_a_planted_fault_and_the_same_one_from_the_same_seed() -> None:
    def run(content: bytes) -> None:
        if b"null" in content and content.count(b"{") > 1:
            raise KeyError("planted")
        if len(content) > 40_000:
            raise BadInput("too\nlong")

    target = Target("planted", [json.dumps(RUN).encode()], run)
    first, second = fuzz_randomly(target, 1.0, seed=7), fuzz_randomly(target, 1.0, seed=7)
    assert any(place.startswith("KeyError") for place in first.faults)
    shared = set(first.faults) & set(second.faults)
    assert shared and all(first.faults[place] == second.faults[place] for place in shared)


@pytest.mark.parametrize("text", ["", "two\nlines", "x" * 3000])
def test_an_error_that_is_no_sentence_is_a_fault(text: str) -> None:
    def run(content: bytes) -> None:
        raise BadInput(text)

    with pytest.raises(Broken, match="one sentence"):
        check(Target("planted", [b""], run), b"")
