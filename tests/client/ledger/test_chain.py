"""The keyed chain: what is detected, what is healed, and real processes that die."""

from __future__ import annotations

import errno
import hmac
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import chain
from common.types import BadInput, LedgerDamaged

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain of six facts."""
    place = tmp_path / "chain"
    chain.create(place, "created", {"number": 0})
    for number in range(1, 6):
        append(place, number)
    return place


def append(folder: Path, number: int) -> None:
    with chain.exclusive(folder) as opened:
        opened.append("fact", {"number": number})


def facts(folder: Path) -> list[int]:
    with chain.exclusive(folder) as opened:
        lines = [json.loads(body) for body in opened.bodies]
    return [line["number"] for line in lines if "number" in line]


def events(folder: Path) -> list[str]:
    with chain.exclusive(folder) as opened:
        return [json.loads(body)["event"] for body in opened.bodies]


def lines(folder: Path) -> list[bytes]:
    return (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def write(folder: Path, rows: list[bytes]) -> None:
    (folder / "ledger.jsonl").write_bytes(b"".join(rows))


def test_facts_come_back_in_order_as_json_lines(folder: Path) -> None:
    assert facts(folder) == [0, 1, 2, 3, 4, 5]
    assert [json.loads(line)["number"] for line in lines(folder)] == [0, 1, 2, 3, 4, 5]


def test_every_file_is_its_owners_only(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        name: 0o600 for name in ("ledger.jsonl", "ledger.key", "anchor.json", "lock")
    }


def test_creating_again_changes_nothing(folder: Path) -> None:
    before = (folder / "ledger.jsonl").read_bytes()
    chain.create(folder, "created", {"number": 99})
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_a_long_chain_takes_as_many_hmacs_as_a_short_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes are compared instead: the tests of damage below edit chains that verified in this process before."""
    made: list[object] = []
    new = hmac.new

    def counted(key: bytes, message: bytes, digest: Callable[..., Any]) -> hmac.HMAC:
        made.append(digest)
        return new(key, message, digest)

    monkeypatch.setattr(hmac, "new", counted)
    counts = []
    for number in range(6, 60):
        made.clear()
        append(folder, number)
        counts.append(len(made))
    assert set(counts[1:]) == {counts[-1]} and counts[-1] < 6


# --- damage ----------------------------------------------------------------------------------------------------------


def edited(folder: Path) -> None:
    rows = lines(folder)
    write(folder, [*rows[:2], rows[2].replace(b'"number":2', b'"number":7'), *rows[3:]])


def reordered(folder: Path) -> None:
    rows = lines(folder)
    write(folder, [*rows[:2], rows[3], rows[2], *rows[4:]])


def without_one_line(folder: Path) -> None:
    rows = lines(folder)
    write(folder, rows[:2] + rows[3:])


def cut(folder: Path) -> None:
    write(folder, lines(folder)[:-1])


def cut_inside_the_last_line(folder: Path) -> None:
    write(folder, [*lines(folder)[:-1], lines(folder)[-1][:-9]])


def emptied(folder: Path) -> None:
    write(folder, [])


def with_a_repeated_line(folder: Path) -> None:
    write(folder, [*lines(folder), lines(folder)[-1], lines(folder)[-1]])


def without(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        (folder / name).unlink()

    remove.__name__ = f"without_{name}"
    return remove


def with_another_key(folder: Path) -> None:
    (folder / "ledger.key").write_bytes(bytes(32))


def with_a_short_key(folder: Path) -> None:
    (folder / "ledger.key").write_bytes(b"")


def with_a_lowered_anchor(folder: Path) -> None:
    anchor = json.loads((folder / "anchor.json").read_bytes())
    anchor["length"] = 3
    (folder / "anchor.json").write_text(json.dumps(anchor))
    write(folder, lines(folder)[:3])


def with_a_garbled_anchor(folder: Path) -> None:
    (folder / "anchor.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (edited, "line 3 of 6 was edited"),
        (reordered, "line 3 of 6 was edited, moved"),
        (without_one_line, "line 3 of 6 was edited, moved or removed"),
        (cut, "holds 5 whole lines where its anchor says 6"),
        (cut_inside_the_last_line, "holds 5 whole lines where its anchor says 6"),
        (emptied, "holds 0 whole lines where its anchor says 6"),
        (with_a_repeated_line, "more than a torn line"),
        (without("ledger.jsonl"), "'ledger.jsonl' is missing"),
        (without("ledger.key"), "'ledger.key' is missing"),
        (without("anchor.json"), "'anchor.json' is missing"),
        (without("lock"), "'lock' is missing"),
        (with_another_key, "does not verify"),
        (with_a_short_key, "key"),
        (with_a_lowered_anchor, "anchor does not verify"),
        (with_a_garbled_anchor, "anchor cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named_and_nothing_is_written(folder: Path, damage: Callable[[Path], None], seen: str) -> None:
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LedgerDamaged, match=seen):
        append(folder, 6)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.key", "anchor.json", "lock"])
def test_a_folder_where_a_file_was_is_damage(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(LedgerDamaged, match=f"'{name}' is no file"):
        facts(folder)


def test_a_file_where_the_folder_was_is_damage(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")
    with pytest.raises(LedgerDamaged, match="'lock' is no file in a folder"):
        facts(folder)


def test_a_file_that_may_not_be_read_is_no_damage_and_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as after a command of another user; a recovery would count the whole cap for it."""

    def refuse(*arguments: object, **options: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadInput, match="'lock' cannot be opened: Permission denied"):
        facts(folder)


def test_an_anchor_of_infinite_length_is_damage(folder: Path) -> None:
    (folder / "anchor.json").write_text('{"length": 1e999, "last": "", "mac": ""}')
    with pytest.raises(LedgerDamaged, match="anchor cannot be read"):
        facts(folder)


def test_an_older_copy_of_the_facts_is_detected(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ledger.jsonl", tmp_path / "backup")
    append(folder, 6)
    shutil.copy(tmp_path / "backup", folder / "ledger.jsonl")
    with pytest.raises(LedgerDamaged, match="older copy"):
        facts(folder)


def test_facts_of_another_chain_are_detected(folder: Path, tmp_path: Path) -> None:
    chain.create(tmp_path / "other", "created", {"number": 0})
    for number in range(1, 6):
        append(tmp_path / "other", number)
    shutil.copy(tmp_path / "other" / "ledger.jsonl", folder / "ledger.jsonl")
    with pytest.raises(LedgerDamaged):
        facts(folder)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_bit_of_an_anchored_fact_can_be_turned(
    position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("chains") / "chain"
    chain.create(place, "created", {"number": 0})
    append(place, 1)
    content = bytearray((place / "ledger.jsonl").read_bytes())
    content[position % len(content)] ^= 1 << bit
    (place / "ledger.jsonl").write_bytes(content)
    with pytest.raises(LedgerDamaged):
        facts(place)


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_whole_line_beyond_the_anchor_counts_and_is_anchored(folder: Path) -> None:
    """The process died between writing the line and moving the anchor."""
    anchor = (folder / "anchor.json").read_bytes()
    append(folder, 6)
    newest = (folder / "anchor.json").read_bytes()
    (folder / "anchor.json").write_bytes(anchor)
    assert facts(folder) == [0, 1, 2, 3, 4, 5, 6]
    assert (folder / "anchor.json").read_bytes() == newest


@pytest.mark.parametrize("torn", [b"{", b'{"n":6,"time":1.0,"event":"fa', b"\x00" * 40, b'{"n":6}\n'], ids=repr)
def test_a_torn_last_line_is_removed_and_noted(folder: Path, torn: bytes) -> None:
    write(folder, [*lines(folder), torn])
    append(folder, 6)
    assert facts(folder) == [0, 1, 2, 3, 4, 5, 6]
    assert events(folder)[-2:] == ["sealed", "fact"]


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A real Python process with the project on its path."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


# The kernel cuts the write at the file size limit and kills the process at the next byte: a line really torn on disk.
TEAR = """
import resource, signal, sys
from pathlib import Path
from client.ledger import chain
folder = Path(sys.argv[1])
with chain.exclusive(folder) as opened:
    size = (folder / "ledger.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    opened.append("fact", {"number": 6, "padding": "x" * 2000})
print("acknowledged")
"""


@pytest.mark.parametrize("written", [1, 1500])
def test_a_process_killed_in_the_middle_of_a_line_is_recovered_as_a_crash(folder: Path, written: int) -> None:
    whole = (folder / "ledger.jsonl").stat().st_size
    process = run(TEAR, str(folder), str(written))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGXFSZ and output == ""
    assert (folder / "ledger.jsonl").stat().st_size == whole + written
    append(folder, 6)
    assert facts(folder) == [0, 1, 2, 3, 4, 5, 6]
    assert events(folder)[-2:] == ["sealed", "fact"]


APPEND_FOR_EVER = """
import sys
from pathlib import Path
from client.ledger import chain
number = int(sys.argv[2])
while True:
    with chain.exclusive(Path(sys.argv[1])) as opened:
        opened.append("fact", {"number": number})
    print(number, flush=True)
    number += 1
"""


def test_whenever_a_process_is_killed_every_acknowledged_fact_is_there(folder: Path) -> None:
    for delay_s in (0.0, 0.013, 0.031):
        start = facts(folder)[-1] + 1
        process = run(APPEND_FOR_EVER, str(folder), str(start))
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(delay_s)
        process.kill()
        # Not `communicate`, which would leave out what the first `readline` took into its buffer beside its line.
        rest = process.stdout.read()
        process.communicate(timeout=60)
        acknowledged = [int(line) for line in [first, *rest.splitlines()] if line.strip()]
        found = facts(folder)
        assert set(acknowledged) <= set(found)
        assert found == list(range(len(found)))
        assert len(found) <= acknowledged[-1] + 2  # At most the one whose acknowledgement was lost.


HOLD = """
import sys
from pathlib import Path
from client.ledger import chain
with chain.exclusive(Path(sys.argv[1])) as opened:
    print("locked", flush=True)
    sys.stdin.readline()
    opened.append("fact", {"number": 6})
"""


def test_a_second_writer_waits_for_the_first(folder: Path) -> None:
    holder = run(HOLD, str(folder))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    second = threading.Thread(target=append, args=(folder, 7))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    holder.communicate("\n", timeout=60)
    second.join(timeout=60)
    assert facts(folder) == [0, 1, 2, 3, 4, 5, 6, 7]


APPEND_TOGETHER = """
import sys
from pathlib import Path
from client.ledger import chain
chain.create(Path(sys.argv[1]), "created", {"number": -1})
for number in range(15):
    with chain.exclusive(Path(sys.argv[1])) as opened:
        opened.append("fact", {"number": number})
"""


def test_processes_that_create_and_append_at_once_share_one_chain(tmp_path: Path) -> None:
    processes = [run(APPEND_TOGETHER, str(tmp_path / "shared")) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert sorted(facts(tmp_path / "shared")) == sorted([-1, *range(15), *range(15)])
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_note_is_anchored_by_the_next_fact_and_its_loss_is_no_damage(tmp_path: Path) -> None:
    place = tmp_path / "chain"
    chain.create(place, "created", {})
    with chain.exclusive(place) as opened:
        opened.append("reserved", {})
        opened.append("committed", {}, durable=False)
    path, anchor = place / "ledger.jsonl", place / "anchor.json"
    whole = path.read_bytes()
    assert json.loads(anchor.read_bytes())["length"] == 2
    for number, lost in enumerate((b"", b"torn")):
        copy = shutil.copytree(place, tmp_path / str(number))
        (copy / "ledger.jsonl").write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1] + lost)
        assert events(copy)[:2] == ["created", "reserved"]
    with chain.exclusive(place) as opened:
        opened.append("reserved", {})
    assert events(place) == ["created", "reserved", "committed", "reserved"]
    assert json.loads(anchor.read_bytes())["length"] == 4


def test_what_was_verified_before_is_verified_again_when_a_byte_changed(tmp_path: Path) -> None:
    """Lines are remembered by their bytes, the HMAC before them and the key."""
    place = tmp_path / "chain"
    chain.create(place, "created", {"cap": 1})
    with chain.exclusive(place) as opened:
        opened.append("reserved", {"cost": 7})
    with chain.exclusive(place) as opened:
        assert json.loads(opened.bodies[1])["cost"] == 7
    path = place / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"cost":7', b'"cost":6'))
    with pytest.raises(LedgerDamaged, match="line 2 of 2"), chain.exclusive(place):
        pass


def edit_in_place(folder: Path) -> None:
    """Changes one digit of a fact, and gives the file its time back."""
    path = folder / "ledger.jsonl"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b'"number":2'))
        file.write(b'"number":7')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_of_one_digit_that_gives_the_file_its_size_and_time_back_is_seen(folder: Path) -> None:
    assert facts(folder) == [*range(6)]
    time.sleep(0.02)  # Longer than the coarsest clock of a file system here.
    edit_in_place(folder)
    with pytest.raises(LedgerDamaged, match="line 3 of 6"), chain.exclusive(folder):
        pass


def test_an_edit_by_one_who_takes_no_lock_is_seen_after_the_fact_that_was_under_way(folder: Path) -> None:
    with chain.exclusive(folder) as opened:
        time.sleep(0.02)
        edit_in_place(folder)
        opened.append("fact", {"number": 6})
    with pytest.raises(LedgerDamaged, match="line 3 of 7"), chain.exclusive(folder):
        pass


def test_facts_of_another_process_are_read_and_followed(folder: Path) -> None:
    assert facts(folder) == [*range(6)]
    run(APPEND_TOGETHER, str(folder)).communicate(timeout=60)
    append(folder, 15)
    assert facts(folder) == [*range(6), *range(16)]
    chain._KNOWN.clear()  # As in a new process.
    assert facts(folder) == [*range(6), *range(16)]


def test_a_thread_that_has_a_chain_gets_it_again_and_every_other_waits(folder: Path) -> None:
    entered, order = threading.Event(), []

    def append_elsewhere() -> None:
        entered.set()
        append(folder, 7)
        order.append("other")

    other = threading.Thread(target=append_elsewhere)
    with chain.exclusive(folder) as outer:
        with chain.exclusive(folder) as inner:
            assert inner is outer
        other.start()
        assert entered.wait(60)
        other.join(0.2)  # Leaving the inner one gives nothing away.
        append(folder, 6)
        order.append("own")
        assert outer.bodies[-1] == inner.bodies[-1]
    other.join(60)
    assert order == ["own", "other"]
    assert facts(folder) == [*range(8)]


def test_what_an_error_left_of_a_chain_in_memory_is_not_gone_on_from(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), chain.exclusive(folder) as opened:
        opened.append("fact", {"number": 6})
        opened.bodies.append(opened.bodies[-1])  # As far as an interrupted append may come.
        raise KeyboardInterrupt
    append(folder, 7)
    assert facts(folder) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_chain_that_was_held_is_verified_anew_afterwards(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), chain.exclusive(folder), chain.exclusive(folder):
        raise ZeroDivisionError
    write(folder, lines(folder)[:-1])
    with pytest.raises(LedgerDamaged, match="it was cut"), chain.exclusive(folder):
        pass
